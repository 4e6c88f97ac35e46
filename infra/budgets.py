# docs/bridge.md
"""The problems of a bridge: labeled ones for each budget, held out ones, prompts of its dense stages."""

from pathlib import Path

from infra import dataset
from infra.cli import require


def write(args, train: str, heldout: str, unlabeled: str | None, graded: bool) -> tuple[dict, list[dataset.Problem]]:
    """({label budget, and None for all labels: {"labeled", "prompts", "heldout": file}}, all labeled problems). Budgets are
    nested: the first so many. args: bridge.py's; `unlabeled` holds the dense stages' prompts, None: the labeled problems;
    `graded`: whether the benchmarks need answers.

    Raises UsageError where a budget is larger than `train`, and for a benchmark that is not there; one that is trained on
    is said."""
    labeled, others = (dataset.load_problems(path, "--train-data", need_answers=True) for path in (train, heldout))
    require(not args.labels or args.labels[-1] <= len(labeled),
            f"--labels {' '.join(map(str, args.labels))}: {train} has only {len(labeled)} problems")  # fmt: skip
    data, folder, prompts = {"labeled": train, "prompts": train, "heldout": heldout}, Path(args.out, "data"), []
    if unlabeled:
        prompts = dataset.load_problems(unlabeled, "--unlabeled-data", need_answers=False, answers=False)
        data["prompts"] = dataset.write_problems(folder / "unlabeled.jsonl", prompts, f"--unlabeled-data {unlabeled}")
    for spec in map(dataset.benchmark_spec, args.benchmarks):  # now, not behind days of training
        measured = dataset.load_problems(spec, "--benchmarks", need_answers=graded)
        dataset.warn_of_overlap([*labeled, *others, *prompts], measured)
    budgets = {None: data}
    for n in args.labels:
        file = dataset.write_problems(folder / f"labels{n}.jsonl", labeled[:n], train)
        budgets[n] = data | {"labeled": file} | ({} if unlabeled else {"prompts": file})
    return budgets, labeled
