# docs/eval_math.md
"""The result folder of one benchmark: responses kept as they come, what they were made from, and what makes two results
comparable.

partial.json        while it is at work: the settings and inputs of the command
partial_RANK.jsonl  ... and the responses so far, a line for each batch, {problem: [its responses]}
generations.jsonl   when it is finished, with samples.html
summary.json        the last to be written: with it the benchmark is finished
"""

import contextlib
import json
from dataclasses import asdict
from pathlib import Path

import numpy as np

from infra import dataset, parallel, run_folder, samples_page
from infra.cli import RunStopped, require
from infra.digest import digest_of, digests
from infra.files import read_record, write_aside
from infra.grader import last_boxed
from infra.sampler import Response

# what a result depends on; the other flags change memory and speed
SETTINGS = ["model", "limit", "samples", "temperature", "top_p", "top_k", "max_response_tokens", "sampler", "instruction"]
SETTINGS += ["thinking", "grader", "dtype", "seed"]
COMPARED = [name for name in SETTINGS if name not in ("model", "limit", "seed")]


def default_out(model: str) -> Path:
    """results/ and the last two parts of the model's path, so that A/final and B/final have a folder each."""
    path = Path(model).resolve() if Path(model).exists() else Path(model)
    return Path("results", "_".join(part for part in path.parts[-2:] if part != path.root))


def differences(before: dict, now: dict, settings: list[str], words: tuple[str, str]) -> list[str]:
    """What differs between two records (of partial.json or summary.json): flags among `settings`, and the benchmark. Inputs
    are told apart by what they hold, or by their names where that is not known. `words` stand before the two values."""
    found, keys = [], {"model": "model", "grader": "grader", "benchmark": "problems"}  # input: key of its digest
    for name in [*settings, "benchmark"]:
        a, b = [record.get(name, record["args"].get(name)) for record in (before, now)]
        one, other = [record.get("inputs", {}).get(keys.get(name)) for record in (before, now)]
        flag = "--benchmarks" if name == "benchmark" else f"--{name.replace('_', '-')}"
        if one and other and a == b and one != other:
            found.append(f"{flag} {a} had other contents")
        elif a != b and not (one and one == other) and (name in before or name in before["args"]):
            found.append(f"{flag} {words[0]} {a!r}, {words[1]} {b!r}")
    return found


class Result:
    """The folder of one benchmark (a file or hub dataset) with all its problems, held against other processes.

    summary  summary.json if the benchmark is finished, else None
    known    {problem: its responses} that a killed process has left

    Raises UsageError if the folder holds what other settings or inputs have made, unless `args.overwrite`."""

    def __init__(self, folder: Path, args, benchmark: str, problems):
        self.folder, self.file = run_folder.make_out(folder), None
        self.record = {
            "benchmark": benchmark,
            "inputs": digests(args, problems) | {"benchmark": parallel.on_rank_zero(digest_of, benchmark)},
            "args": json.loads(json.dumps(asdict(args))),
        }
        self.summary, self.known = parallel.on_rank_zero(self._open, args.overwrite)

    def _open(self, overwrite: bool) -> tuple[dict | None, dict[str, list[Response]]]:
        self.lock = run_folder.lock_folder(self.folder)
        with room(self.folder):
            for pattern in ("summary.json", "generations.jsonl", "samples.html", "partial*") if overwrite else ():
                for path in self.folder.glob(pattern):
                    path.unlink()
            summary, known = read_record(self.folder / "summary.json"), self._read_partial()
            before = summary or (read_record(self.folder / "partial.json") if known else None)
            way_out = "repeat its flags, choose another --out, or give --overwrite"
            changed = differences(before, self.record, SETTINGS, ("was", "now")) if before else []
            require(not changed, f"--out {self.folder}: measured before, {'; '.join(changed)}: {way_out}")
            strange = not before and (self.folder / "generations.jsonl").exists()
            require(not strange, f"--out {self.folder}: has generations.jsonl without a whole summary.json: {way_out}")
            if not before:
                write_aside(self.folder / "partial.json", json.dumps(self.record, indent=2))
        return summary, known

    def _read_partial(self) -> dict[str, list[Response]]:
        """The responses that the ranks of a killed process have left, moved into rank 0's file. Torn lines are cut."""
        paths, whole, known, torn = sorted(self.folder.glob("partial_*.jsonl")), [], {}, []
        for path in paths:
            for number, line in enumerate(path.read_bytes().splitlines(), 1):
                try:
                    known |= {text: [Response(*r) for r in responses] for text, responses in json.loads(line).items()}
                    whole.append(line.decode() + "\n")
                except (ValueError, AttributeError, TypeError):
                    torn.append(f"{path.name} line {number}")
        if torn:
            print(f"{self.folder}: {len(torn)} torn lines cut (first: {torn[0]}); what they held is sampled again")
        if paths:
            write_aside(self.folder / "partial_0.jsonl", "".join(whole))
        for path in paths:
            if path.name != "partial_0.jsonl":
                path.unlink()
        return known

    def keep(self, responses: dict[str, list[Response]]) -> None:
        """Write {problem: its responses} in one line: what was sampled together is kept together, or not at all."""
        row = {text: [list(r) for r in some] for text, some in responses.items()}
        with room(self.folder):
            self.file = self.file or (self.folder / f"partial_{parallel.rank()}.jsonl").open("a", encoding="utf-8")
            self.file.write(json.dumps(row) + "\n")
            self.file.flush()

    def finish(self, rows: list[dict], summary: dict, tokens_of) -> None:
        """Write generations.jsonl, samples.html and summary.json; the partial files go."""
        write(self.folder, rows, summary | self.record, tokens_of)
        for path in self.folder.glob("partial*"):
            path.unlink()


def rows_of(problems, samples: int, responses: list[Response], texts: list[str], rewards: list[float]) -> list[dict]:
    """Rows of generations.jsonl; all lists have an entry per response, `samples` of each problem in a row."""
    return [
        {
            "problem": problem.key,
            "answer": problem.answer,
            "sample": k % samples,
            "reward": reward,
            "length": len(response.ids),
            "truncated": response.truncated,
            "response": text,
        }
        for k, (problem, response, text, reward) in enumerate(zip(problems, responses, texts, rewards, strict=True))
    ]


def show(folder: Path, summary: dict, finished: str = "") -> None:
    (low, high), samples = summary["ci95"], summary["samples"]
    passed = f"pass@{samples} {summary['pass_at_k'][str(samples)]:.4f}  " if summary["pass_at_k"] else ""
    print(
        f"{folder.name}: accuracy {summary['accuracy']:.4f}  95 % interval [{low:.4f}, {high:.4f}]  "
        f"{passed}{summary['problems']} problems x {samples}  "
        f"length {summary['response_length']:.0f}  truncated {summary['truncated_frac']:.3f}  -> {folder}/{finished}"
    )


def write(folder: Path, rows: list[dict], summary: dict, tokens_of=None) -> None:
    """Each file aside and renamed, summary.json last. tokens_of: as for samples_page.evaluation_page"""
    page = samples_page.evaluation_page(f"{folder.parent.name}/{folder.name}", rows, summary["samples"], tokens_of)
    with room(folder):
        write_aside(folder / "generations.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
        write_aside(folder / "samples.html", page)
        write_aside(folder / "summary.json", json.dumps(summary, indent=2))


@contextlib.contextmanager
def room(folder: Path):
    """Within, an error of the disk is a RunStopped."""
    try:
        yield
    except OSError as error:
        raise RunStopped(
            f"--out {folder}: {error.strerror or error}; make room, then run the same command again: it goes on with the "
            f"responses that are written"
        ) from None


def find_results(folder: str, flag: str) -> dict[str, Path]:
    """{benchmark: its folder} of a result folder, which is one benchmark's or holds several."""
    paths = sorted([*Path(folder).glob("generations.jsonl"), *Path(folder).glob("*/generations.jsonl")])
    require(paths, f"{flag} {folder}: no generations.jsonl there; give a folder that eval_math.py wrote")
    return {path.parent.name: path.parent for path in paths}


def regrade(args, grade, figures) -> None:
    """Grade the saved responses of the result folder --regrade again, each as the text that was graded, so that no model is
    needed. grade and figures: those of eval_math.py."""
    for folder in find_results(args.regrade, "--regrade").values():
        rows, summary, _lock = open_finished(folder)
        problems = [dataset.Problem(dataset.text_of(row["problem"]), (), row["answer"]) for row in rows]
        grades, counted = grade(args, [row["response"] for row in rows], problems)
        changed = [k for k, row in enumerate(rows) if row["reward"] != grades[k]]
        graded = [row | {"reward": reward} for row, reward in zip(rows, grades, strict=True)]
        before, summary = summary["accuracy"], summary | figures(np.array(grades).reshape(-1, summary["samples"])) | counted
        summary |= {"regraded": run_folder.command_line(), "args": summary["args"] | {"grader": args.grader}}
        write(folder, graded, summary)
        print(
            f"{folder}: accuracy {before:.4f} before, {summary['accuracy']:.4f} now: {len(changed)} of {len(rows)} verdicts "
            f"have changed"
        )
        for k in changed[:1]:
            print(f"  first: {last_boxed(rows[k]['response'])!r} for {rows[k]['answer']!r}, {rows[k]['reward']:g} "
                  f"before, {grades[k]:g} now, sample {rows[k]['sample']} of {rows[k]['problem'][:60]!r}")  # fmt: skip


def open_finished(folder: Path):
    """(rows of generations.jsonl, summary.json, lock) of a finished benchmark."""
    lock = run_folder.lock_folder(folder)
    rows, summary = dataset.load_rows(str(folder / "generations.jsonl"), "--regrade"), read_record(folder / "summary.json")
    expected = summary["problems"] * summary["samples"] if summary else None
    require(
        len(rows) == expected,
        f"--regrade {folder}: {len(rows)} responses where summary.json says {expected}: not a finished result; run the "
        f"command that made it again",
    )
    return rows, summary, lock


def incomparable(a: Path, b: Path) -> list[str]:
    """Why the figures of two results of one benchmark should not be held against each other."""
    summaries = [read_record(folder / "summary.json") for folder in (a, b)]
    unknown = [folder for folder, summary in zip((a, b), summaries, strict=True) if not summary]
    if unknown:
        return [f"{unknown[0]} has no whole summary.json: how it was sampled is not known"]
    found = differences(*summaries, COMPARED, (f"is in {a}", f"in {b}"))
    answers = [{row["problem"]: row.get("answer") for row in dataset.load_rows(str(f / "generations.jsonl"), "--compare")}
               for f in (a, b)]  # fmt: skip
    other = [problem for problem in answers[0] if answers[0][problem] != answers[1].get(problem, answers[0][problem])]
    if other:
        found.append(f"{len(other)} problems have another reference answer there (first: {other[0][:60]!r})")
    return found
