# docs/data.md
"""Problems: which rows are one, which have answers, what they are known by, and in which order they come."""

import hashlib
import json
import random
import re
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from infra.cli import require
from infra.columns import cell, read_answer, read_prompt
from infra.files import write_aside
from infra.rows import READERS, load_rows, numbered_rows

PROMPT_COLUMNS = ("problem", "question", "prompt")  # the first that there is
ANSWER_COLUMNS = ("answer", "solution", "reward_model.ground_truth")  # the first with something in it, row by row
BENCHMARKS = {
    "math500": "HuggingFaceH4/MATH-500:default:test",
    "aime24": "HuggingFaceH4/aime_2024:default:train",
    "aime25": "math-ai/aime25:default:test",
    "gsm8k": "openai/gsm8k:main:test",
}
CONFLICTING = "duplicates with another answer than an earlier row's, which counts"


@dataclass(frozen=True)
class Problem:
    text: str  # the problem itself, or the last user message of a chat prompt
    messages: tuple  # earlier chat messages (a system prompt, say), each {"role", "content"}
    answer: str | None  # reference answer; None for data without labels
    where: str = field(default="", compare=False, repr=False)  # flag, file and place of its row, for messages

    @property
    def key(self) -> str:
        """What a problem is known by in every file: its text, and a digest of the earlier messages if there are any."""
        if not self.messages:
            return self.text
        earlier = json.dumps([(m["role"], m["content"]) for m in self.messages])
        return f"{self.text}\n[after {hashlib.sha256(earlier.encode()).hexdigest()[:12]}]"


def text_of(key: str) -> str:
    """The text of the problem that has this key."""
    return re.sub(r"\n\[after [0-9a-f]{12}\]$", "", key)


def digest(problems: list[Problem]) -> str:
    """16 hex digits that stand for the problems with their earlier messages and answers, in order."""
    return hashlib.sha256(json.dumps([(p.key, p.answer) for p in problems]).encode()).hexdigest()[:16]


def columns(args) -> dict[str, str | None]:
    """--prompt-column and --answer-column, as load_problems takes them."""
    return {"prompt_column": args.prompt_column, "answer_column": args.answer_column}


def load_problems(
    spec: str, flag: str, need_answers: bool, prompt_column=None, answer_column=None, answers=True
) -> list[Problem]:
    """Distinct problems of a data file or hub dataset, in its order; without column names, from the first of the usual ones
    that it has. need_answers: leave out problems without one; answers=False: no answer is read. What is merged, left out or
    doubtful is counted and printed with its first row. Raises UsageError for a missing column, an unusable row or an empty
    dataset."""
    rows, data = numbered_rows(spec, flag), f"{flag} {spec}"
    require(rows, f"{data}: the dataset is empty; give one with at least one problem")
    columns = sorted({column for _, row in rows for column in row})

    def has(column):
        return column is None or any(cell(row, column) is not None for _, row in rows)

    if flag == "--eval-data":  # often a benchmark with names of its own
        prompt_column, answer_column = (column if has(column) else None for column in (prompt_column, answer_column))
    for column, name in ((prompt_column, "--prompt-column"), (answer_column if need_answers else None, "--answer-column")):
        require(has(column), f"{name} {column}: {data} has only {', '.join(columns)}")
    text_column = prompt_column or next((column for column in PROMPT_COLUMNS if column in columns), None)
    or_prompt, or_answer = [  # they do not hold for the other flags' files
        f" (or {name})" if flag in ("--train-data", "--eval-data", "--label-split") else ""
        for name in ("--prompt-column", "--answer-column")
    ]
    needed = f"a column problem, question or prompt{or_prompt}"
    require(text_column, f"{data}: needs {needed}; it has {', '.join(columns)}")
    answer_columns = ((answer_column,) if answer_column else ANSWER_COLUMNS) if answers else ()

    problems, duplicates, found = {}, [], defaultdict(list)
    for place, row in rows:
        where = f"{data}, {place}"
        answer, remark = read_answer(row, answer_columns)
        problem = Problem(*read_prompt(row, text_column, where), answer, where)
        first = problems.setdefault(problem.key, problem)
        if first is not problem:
            duplicates.append(place)
            if first.answer is None:
                problems[problem.key] = problem
            elif answer not in (None, first.answer):
                remark = remark or CONFLICTING
        if remark:
            found[remark].append(place)
    problems = list(problems.values())
    if duplicates:
        distinct = f"{len(problems)} distinct problem{'s' * (len(problems) > 1)}"
        print(f"{data}: {len(rows)} rows are {distinct}: {len(duplicates)} duplicates (first: {duplicates[0]})")
    for remark, places in found.items():
        print(f"{data}: {len(places)} {remark} (first: {places[0]})")
    if need_answers:
        labeled = [p for p in problems if p.answer]
        require(
            labeled,
            f"{data}: needs a column answer, solution or reward_model.ground_truth with the "
            f"reference answers{or_answer}; it has {', '.join(columns)}",
        )
        if len(labeled) < len(problems):
            first = next(p.where for p in problems if not p.answer)
            print(f"{data}: {len(problems) - len(labeled)} problems without an answer left out (first: {first})")
        problems = labeled
    return problems


def warn_of_overlap(trained: list[Problem], measured: list[Problem]) -> None:
    """Say how many problems that something is measured on are trained on as well, whatever messages come before them."""
    texts = {problem.text: problem for problem in trained}
    both = [problem for problem in measured if problem.text in texts]
    if both:
        first = f"{both[0].where}, is {texts[both[0].text].where}"
        print(f"warning: {len(both)} of {len(measured)} problems to measure are among those to train on (first: {first})")


def report_ungradable(problems: list[Problem], gradable: list[bool]) -> None:
    """Say how many reference answers the grader cannot read, by its verdict on each: no response is ever right there."""
    bad = [problem for problem, fine in zip(problems, gradable, strict=True) if not fine]
    if bad:
        first = f"{bad[0].where}: {bad[0].answer[:80]!r}"
        print(f"warning: the grader cannot read {len(bad)} of {len(problems)} reference answers (first: {first})")


def mean_rewards(spec: str, flag: str) -> dict[str, float]:
    """{problem: mean reward of its responses} of the generations.jsonl `spec` of eval_math.py."""
    by_problem = {}
    for row in load_rows(spec, flag):
        known = isinstance(row.get("problem"), (str, int)) and isinstance(row.get("reward"), (int, float))
        require(known, f"{flag} {spec}: needs problem and reward in every row; give a generations.jsonl of eval_math.py")
        by_problem.setdefault(row["problem"], []).append(float(row["reward"]))
    return {problem: float(np.mean(rewards)) for problem, rewards in by_problem.items()}


def paced_weights(spec: str, problems: list[Problem]) -> list[float]:
    """p(1 - p) of every problem (arXiv 2603.11178), p its pass rate in the generations.jsonl `spec` of eval_math.py."""
    rewards = mean_rewards(spec, "--paced")
    missing = sum(p.key not in rewards for p in problems)
    require(
        not missing,
        f"--paced {spec}: lacks {missing} of the {len(problems)} problems; make it by running eval_math.py on --train-data",
    )
    pass_rates = [rewards[p.key] for p in problems]
    require(
        any(0 < p < 1 for p in pass_rates),
        f"--paced {spec}: every problem is passed always or never, so all weights are 0; raise eval_math.py's --samples",
    )
    return [p * (1 - p) for p in pass_rates]


class ProblemStream:
    """Indices 0..count-1 without end, one fresh permutation after another, so that every epoch sees every problem once.
    `position` is how many were taken; setting it continues a run."""

    def __init__(self, count: int, seed: int):
        self.count, self.seed, self.position = count, seed, 0

    def take(self, k: int) -> list[int]:
        epochs = range(self.position // self.count, (self.position + k - 1) // self.count + 1)
        indices = np.concatenate([np.random.default_rng((self.seed, epoch)).permutation(self.count) for epoch in epochs])
        start = self.position % self.count
        self.position += k
        return indices[start : start + k].tolist()


def write_problems(path: Path, problems: list[Problem], source: str) -> str:
    """Write problems as chat prompts, answers too where they have one; returns the path as text. Raises UsageError where
    the file holds others than those of `source`."""
    rows = [{"prompt": [*p.messages, {"role": "user", "content": p.text}]} for p in problems]
    rows = [row | ({} if p.answer is None else {"answer": p.answer}) for row, p in zip(rows, problems, strict=True)]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    require(
        not path.exists() or path.read_text(encoding="utf-8") == text,
        f"{path}: holds other problems than {source}; choose another --out",
    )
    write_aside(path, text)
    return str(path)


def split_labels(spec: str, flag: str, folder: str | Path) -> tuple[str, str]:
    """Split the problems of `spec` into files of 80 % and 20 %, shuffled with seed 42; returns FOLDER/train.jsonl and
    FOLDER/heldout.jsonl. Raises UsageError where these hold other problems."""
    problems = load_problems(spec, flag, need_answers=True)
    random.Random(42).shuffle(problems)
    cut = len(problems) * 4 // 5
    parts = {"train": problems[:cut], "heldout": problems[cut:]}
    return tuple(write_problems(Path(folder, f"{name}.jsonl"), part, f"{flag} {spec}") for name, part in parts.items())


def benchmark_spec(benchmark: str) -> str:
    """Where the problems of one of the BENCHMARKS lie; any data file or hub dataset is its own."""
    return BENCHMARKS.get(benchmark, benchmark)


def benchmark_name(spec: str) -> str:
    """Folder name of a benchmark: a file's stem, or the hub spec without its slashes and colons."""
    path = Path(spec)
    return path.stem if path.suffix.lower() in READERS else re.sub("[/:]", "_", spec)


def benchmark_names(specs: tuple[str, ...]) -> list[str]:
    """Folder names of --benchmarks. Raises UsageError where two have the same."""
    names = [benchmark_name(spec) for spec in specs]
    require(len(set(names)) == len(names), f"--benchmarks: {' '.join(names)} would share a result folder; rename a file")
    return names
