# docs/report.md
"""What bridge.py reports: accuracy by arm over seeds and problems, what each arm has cost, the paper's comparisons with
their verdicts, and three plots. Everything is read from the stages' folders, so it can be written again at any time.

A difference is paired: the same problems, and the same seeds where stages are shared. Its interval is over both, the
problems by a bootstrap and the few seeds by Student's t; a verdict needs the whole interval on one side of 0.

    python -m infra.report --runs runs/arithmetic runs/swaps
"""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from infra import cli, dataset, frontier
from infra.bootstrap import bootstrap_ci95, verdict
from infra.cli import require
from infra.files import write_aside

COMPARISONS = {  # name: is the second better than the first?
    "raw_teacher < direct_grpo": "a teacher without RL is worth less than RL on the student",
    "direct_grpo < bridge": "the labels are better spent on the teacher",
    "long_grpo < bridge": "control: at as many FLOPs too",
    "no_warmup < bridge": "the forward-KL warmup pays, at as many updates",
    "no_opd < bridge": "on-policy distillation pays, at as many updates",
    "replay < bridge_grpo": "stage 3 is more than further updates",
    "bridge < bridge_grpo": "stage 3 pays",
    "cold_grpo < bridge_grpo": "the same labels do more behind the bridge",
    "sft < no_opd": "control: the teacher's distribution says more than its samples",
    "reward_free < no_warmup": "control: without a teacher nothing is learned",
}

SUMMARY = {
    "base": "the student as it comes",
    "raw_teacher": "distilled from the teacher as it comes",
    "direct_grpo": "RL on the student",
    "teacher_rl": "RL on the teacher: what is handed down below",
    "bridge": "the RL'd teacher distilled into the student",
    "bridge_grpo": "RL on that student, with labels held back for it",
}


@dataclass
class Args:
    runs: tuple[str, ...]
    """output folders of bridge.py; their reports go into docs/results.md, README.md, docs/ and benchmarks/results/"""


def scores(folders: list[Path], benchmark: str) -> np.ndarray:
    """(S, P): accuracy over the samples of each problem, from one stage's folder a seed."""
    files = [folder.parent / "eval" / folder.name / benchmark / "generations.jsonl" for folder in folders]
    by_seed = [dataset.mean_rewards(str(file), "--runs") for file in files]
    return np.array([[row[problem] for problem in by_seed[0]] for row in by_seed])


def measured(values: np.ndarray) -> dict:
    """Accuracy of one stage or arm: values (S, P)."""
    by_seed = values.mean(1)
    se = float(by_seed.std(ddof=1) / len(by_seed) ** 0.5) if len(by_seed) > 1 else None
    return {"accuracy": float(values.mean()), "se": se, "ci95": bootstrap_ci95(values), "by_seed": by_seed.tolist()}


def cost(folders: list[list[Path]]) -> dict:
    """What stages have used, summed, as a mean over seeds: distinct labels, updates, sampled tokens, FLOPs. folders: those
    of the stages, a list a seed."""
    total = {"labels_used": 0, "rl_updates": 0, "dense_updates": 0, "sampled_tokens": 0, "flops": 0}
    for stages in folders:
        labels = set()
        for folder in stages:
            run = json.loads((folder / "run.json").read_text(encoding="utf-8"))
            labels |= set(json.loads((folder / "labels.json").read_text(encoding="utf-8")))
            kind = "rl_updates" if "group_size" in run["args"] else "dense_updates"
            for key, value in ((kind, "updates"), ("sampled_tokens", "sampled_tokens"), ("flops", "flops")):
                total[key] += run[value] / len(folders)
        total["labels_used"] += len(labels) / len(folders)
    return {key: round(value) for key, value in total.items()}


def compare(values: dict[str, np.ndarray]) -> dict[str, dict]:
    """{name: {difference, ci95, verdict}} of the COMPARISONS both of whose arms are there; values {arm: (S, P)}."""
    found = {}
    for name in COMPARISONS:
        low, high = name.split(" < ")
        if low in values and high in values:
            difference = values[high] - values[low]
            ci95 = bootstrap_ci95(difference)
            found[name] = {"difference": float(difference.mean()), "ci95": ci95, "verdict": verdict(ci95)}
    return found


def write(
    out: Path, at, budgets: list, benchmarks: list[str], seeds: list[int], arms: dict, stages: list[str], within: list[str]
) -> None:
    """Write report.json, report.md, report.png and scores.npz into `out`. at(stage, seed, budget): a stage's folder; arms:
    {arm: the stages it rests on, its own last}, those of the largest of the label `budgets`, or of the only one, None;
    `within`: the arms that have no more labels than each budget."""
    last = {arm: (used or [arm])[-1] for arm, used in arms.items()}  # the stage an arm stands for
    units = {"teacher_base": [], "base": []} | {stage: [stage] for stage in stages}

    def scores_of(stage: str, benchmark: str, budget) -> np.ndarray:
        return scores([at(stage, seed, budget) for seed in seeds], benchmark)

    def cost_of(used: list[str], budget) -> dict:
        return cost([[at(stage, seed, budget) for stage in used] for seed in seeds])

    values = {b: {name: scores_of(name, b, budgets[-1]) for name in units} for b in benchmarks}
    kept = {f"{benchmark}/{name}": one for benchmark, row in values.items() for name, one in row.items()}
    figures = {name: {benchmark: measured(values[benchmark][name]) for benchmark in benchmarks} for name in units}

    def row(name: str, used: list[str]) -> dict:
        return {**figures[name][benchmarks[0]], "benchmarks": figures[name], **cost_of(used, budgets[-1])}

    compared = {b: compare({arm: values[b][stage] for arm, stage in last.items()}) for b in benchmarks}
    record = {
        "benchmark": benchmarks[0],
        "seeds": seeds,
        "arms": {arm: row(last[arm], used) for arm, used in arms.items()},
        "stages": {name: row(name, used) for name, used in units.items()},
        "comparisons": compared[benchmarks[0]],
    }
    for benchmark in benchmarks[1:]:
        for name, comparison in compared[benchmark].items():
            record["comparisons"][name].setdefault("benchmarks", {})[benchmark] = comparison
    if budgets != [None] and within:
        there = {arm: arms[arm] for arm in within}
        there |= {"teacher_rl": ["teacher_rl"]} if any("teacher_rl" in used for used in there.values()) else {}
        costs = {n: {arm: cost_of(used, n) for arm, used in there.items()} for n in budgets}
        by_budget = {n: {arm: scores_of(last.get(arm, arm), benchmarks[0], n) for arm in there} for n in budgets}
        record |= frontier.frontier(by_budget, costs)
        kept |= {f"{benchmarks[0]}/labels{n}/{arm}": one for n, row in by_budget.items() for arm, one in row.items()}
    np.savez_compressed(out / "scores.npz", **kept)
    write_aside(out / "report.json", json.dumps(record, indent=2))
    text, plots = markdown(record), "![](frontier.png)\n" if "frontier" in record else ""
    page = f"# {out.name}: accuracy on {record['benchmark']}\n\n{text}\n\n![](report.png)\n{plots}"
    (out / "report.md").write_text(page, encoding="utf-8")
    plot(out, record, {name: [at(name, seed, budgets[-1]) for seed in seeds] for name in units})
    if "frontier" in record:
        frontier.plot(out / "frontier.png", record)
    print(f"\n{text}\n\nwrote {out}/report.json and report.md")


def shown(record: dict) -> dict[str, dict]:
    """The teacher before and after RL, then the arms."""
    return {k: row for k, row in record["stages"].items() if k in ("teacher_base", "teacher_rl")} | record["arms"]


def markdown(record: dict) -> str:
    """The tables of arms and comparisons. record: report.json"""
    seeds = f"± standard error over {len(record['seeds'])} seeds" if len(record["seeds"]) > 1 else "one seed"
    lines = [f"| arm | accuracy, {seeds} | 95 % interval | labels | RL / dense updates | sampled tokens | FLOPs |"]
    lines.append("|---|---|---|---|---|---|---|")
    for name, row in shown(record).items():
        spread = f" ± {row['se']:.3f}" if row["se"] is not None else ""
        low, high = row["ci95"]
        cells = [name, f"{row['accuracy']:.3f}{spread}", f"{low:.3f} to {high:.3f}", str(row["labels_used"])]
        cells += [f"{row['rl_updates']} / {row['dense_updates']}", f"{row['sampled_tokens'] / 1e6:.2f} M"]
        lines.append(f"| {' | '.join(cells)} | {row['flops']:.1e} |")
    if record["comparisons"]:
        lines += ["", "| comparison | difference | 95 % interval | verdict |", "|---|---|---|---|"]
    for name, row in record["comparisons"].items():
        low, high = row["ci95"]
        lines.append(f"| {name} | {row['difference']:+.3f} | {low:+.3f} to {high:+.3f} | {row['verdict']} |")
    if "frontier" in record:
        lines = [frontier.markdown(record), "", f"With {max(map(int, record['frontier']))} labels:", "", *lines]
    return "\n".join(lines)


def summary(record: dict) -> str:
    """The small table for a newcomer: what the arms of SUMMARY are, and where they end. record: report.json"""
    lines = ["| arm | what it is | accuracy, 95 % interval | labels |", "|---|---|---|---|"]
    for name, what in SUMMARY.items():
        if row := shown(record).get(name):
            low, high = row["ci95"]
            lines.append(f"| `{name}` | {what} | {row['accuracy']:.3f} ({low:.3f} to {high:.3f}) | {row['labels_used']} |")
    return "\n".join(lines)


def plot(out: Path, record: dict, folders: dict[str, list[Path]]) -> None:
    """Accuracy by arm with 95 % intervals and one dot a seed; accuracy against labels; learning curves (in-training
    evaluation, else reward), mean over seeds, from each stage's folders."""
    try:
        import matplotlib
    except ImportError:
        print("no plot: pip install matplotlib")
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(18, 5), constrained_layout=True)
    rows = shown(record)
    accuracy = np.array([row["accuracy"] for row in rows.values()])
    ends = np.array([row["ci95"] for row in rows.values()]).T  # (2, arms)
    colors = ["tab:gray" if name not in record["arms"] else "tab:blue" for name in rows]
    left.barh(list(rows), accuracy, xerr=abs(ends - accuracy), color=colors, capsize=3, alpha=0.8)
    for place, row in enumerate(rows.values()):
        left.plot(row["by_seed"], [place] * len(row["by_seed"]), ".k", markersize=4)
    left.invert_yaxis()
    left.set(xlabel=f"accuracy on {record['benchmark']}; 95 % interval, dots are seeds", xlim=(0, 1))

    used = [row["labels_used"] for row in record["arms"].values()]
    accuracy = np.array([row["accuracy"] for row in record["arms"].values()])
    ends = np.array([row["ci95"] for row in record["arms"].values()]).T
    middle.errorbar(used, accuracy, yerr=abs(ends - accuracy), fmt="o", capsize=3)
    for labels in set(used):  # names beside their points, at least a line apart
        place = -1.0
        for name, row in sorted(record["arms"].items(), key=lambda item: item[1]["accuracy"]):
            if row["labels_used"] == labels:
                place = max(place + 0.032, row["accuracy"] - 0.01)
                middle.text(labels + 0.03 * max(used), place, name, fontsize=8)
    middle.set(xlabel="labels used", ylabel="accuracy", ylim=(0, 1), xlim=(-0.05 * max(used) - 1, 1.3 * max(used) + 1))

    right.set_prop_cycle(color=plt.cm.tab20.colors)
    for name in record["stages"]:
        for key in ("eval/accuracy", "charts/reward"):
            curve = {}
            for folder in folders[name]:
                path = folder / "metrics.jsonl"
                for row in map(json.loads, path.read_text(encoding="utf-8").splitlines() if path.exists() else []):
                    if key in row:
                        curve.setdefault(row["step"], []).append(row[key])
            if curve:
                right.plot(list(curve), [np.mean(values) for values in curve.values()], label=name, marker=".")
                break
    right.set(xlabel="step of the stage", ylabel="accuracy in training, mean over seeds", ylim=(0, 1))
    if right.lines:
        right.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(out / "report.png", dpi=110)
    plt.close(figure)


def put(page: Path, block: str, text: str) -> bool:
    """Write `text` between the page's `<!-- BLOCK -->` and the next `<!-- end -->`; False if there is no such block."""
    before, begin, rest = page.read_text(encoding="utf-8").partition(f"<!-- {block} -->\n")
    _, end, after = rest.partition("\n<!-- end -->")
    if begin and end:
        page.write_text(before + begin + text + end + after, encoding="utf-8")
    return bool(begin and end)


def main(args: Args) -> None:
    """Put the reports of finished runs where the project shows them: tables into docs/results.md, a small one into README.md
    for the world that has a place there, plots into docs/, figures and the scores behind them into benchmarks/results/."""
    root = Path(__file__).parent.parent
    for run in map(Path, args.runs):
        require((run / "report.json").exists(), f"--runs {run}: no report.json there; give an output folder of bridge.py")
        record = json.loads((run / "report.json").read_text(encoding="utf-8"))
        require(
            put(root / "docs/results.md", f"report {run.name}", markdown(record)),
            f"--runs {run}: docs/results.md has no block <!-- report {run.name} --> ... <!-- end --> to put it in",
        )
        put(root / "README.md", f"summary {run.name}", summary(record))
        shutil.copy(run / ("frontier.png" if "frontier" in record else "report.png"), root / f"docs/{run.name}.png")
        shutil.copy(run / "scores.npz", root / f"benchmarks/results/{run.name}.npz")
        write_aside(root / f"benchmarks/results/{run.name}.json", json.dumps(record, indent=1) + "\n")
        print(f"docs/results.md, docs/{run.name}.png and benchmarks/results/{run.name}.json now show {run}")


if __name__ == "__main__":
    cli.run(main, Args)
