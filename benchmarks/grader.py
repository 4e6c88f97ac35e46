# docs/benchmarks.md
r"""Answers a second that grader.py marks, on the reference answers of MATH-500, GSM8K and AIME.

A batch is that of a GRPO step with the defaults: 512 problems, 8 responses each, 4,096 answers. Of the 8, three repeat the
reference as it is written, one writes it differently (\dfrac for \frac, with dollar signs, or with a blank), three give one
wrong answer and one gives another: the references of other problems. A data set with fewer problems is repeated. "first"
is a batch that the grader has not seen; "again" the same batch once more, every verdict remembered.

"mathematics" are the distinct (reference, answer) pairs that same_at_sight leaves to math-verify, and CPU ms what the
workers spent on each of them, their start left out. Two idle cores would judge 2,000 / (CPU ms) of them a second.

    python benchmarks/grader.py ../shared/data/math500.jsonl ../shared/data/gsm8k_test.jsonl ../shared/data/aime24.jsonl
"""

import resource
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from infra import dataset  # noqa: E402
from infra.grader import Grader, normalize, same_at_sight  # noqa: E402

PROBLEMS, RESPONSES = 512, 8


def another_form(answer: str) -> str:
    if "\\frac" in answer:
        return answer.replace("\\frac", "\\dfrac")
    return f"${answer}$" if answer.isdigit() else f"{answer} "


def batch(answers: list[str], offset: int) -> list[tuple[str, str]]:
    """(reference, answer) of 512 problems x 8 responses."""
    pairs = []
    for i in range(PROBLEMS):
        reference, wrong, other = (answers[(i + k + offset) % len(answers)] for k in (0, 7, 31))
        given = [reference] * 3 + [another_form(reference)] + [wrong] * 3 + [other]
        pairs += [(reference, answer) for answer in given]
    return pairs


def children_seconds() -> float:
    """CPU seconds of the processes that this one has started and seen end."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def main(paths: list[str]) -> None:
    warm_up = ["\\boxed{x + 1}", "\\boxed{x + 2}"], ["1 + x", "2 + x"]
    with Grader() as grader:
        grader.grade(*warm_up)
    start_seconds = children_seconds()
    print("| data | answers/s, first | answers/s, again | mathematics | CPU ms each |")
    print("|---|---|---|---|---|")
    for path in paths:
        answers = [problem.answer for problem in dataset.load_problems(path, "FILE", need_answers=True)]
        pairs = batch(answers, 0)
        texts = [f"Adding up gives \\boxed{{{answer}}}." for _, answer in pairs]
        references = [reference for reference, _ in pairs]
        hard = {(normalize(a), normalize(b)) for a, b in pairs}
        hard = [pair for pair in hard if same_at_sight(*pair) is None]
        before = children_seconds()
        with Grader() as grader:
            grader.grade(*warm_up)  # the workers have started
            seconds = []
            for _ in range(2):
                start = time.perf_counter()
                grader.grade(texts, references)
                seconds.append(time.perf_counter() - start)
            assert grader.timeouts == grader.unparsable == 0
        cpu = children_seconds() - before - start_seconds
        each = f"{1000 * cpu / len(hard):.1f}" if hard else ""
        rates = " | ".join(f"{len(pairs) / s:,.0f}" for s in seconds)
        print(f"| {Path(path).stem} | {rates} | {len(hard)} | {each} |", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
