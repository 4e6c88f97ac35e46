# docs/report.md
"""What bridge.py reports: accuracy by arm over seeds and problems, what each arm has cost, the paper's comparisons with
their verdicts, and three plots. Everything is read from the stages' folders, so it can be written again at any time.

A difference is paired: the same problems, and the same seeds where stages are shared. Its interval comes from a bootstrap
that draws seeds and problems independently of each other, with replacement; a verdict needs the whole interval on one
side of 0. With three seeds that is a cautious one: one draw in nine has the same seed three times.

    python -m infra.report --runs runs/arithmetic runs/swaps
"""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from infra import cli, dataset
from infra.bootstrap import bootstrap_ci95
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


@dataclass
class Args:
    runs: tuple[str, ...]
    """output folders of bridge.py; their reports go into README.md, docs/ and benchmarks/results/"""


def verdict(ci95: list[float]) -> str:
    return "holds" if ci95[0] > 0 else "reversed" if ci95[1] < 0 else "not resolved"


def scores(out: Path, seeds: list[int], stage: str, benchmark: str) -> np.ndarray:
    """(S, P): accuracy over the samples of each problem, after `stage`, by seed."""
    folders = [out / f"seed{seed}/eval/{stage}/{benchmark}" for seed in seeds]
    by_seed = [dataset.mean_rewards(str(folder / "generations.jsonl"), "--runs") for folder in folders]
    return np.array([[row[problem] for problem in by_seed[0]] for row in by_seed])


def measured(values: np.ndarray) -> dict:
    """Accuracy of one stage or arm: values (S, P)."""
    by_seed = values.mean(1)
    se = float(by_seed.std(ddof=1) / len(by_seed) ** 0.5) if len(by_seed) > 1 else None
    return {"accuracy": float(values.mean()), "se": se, "ci95": bootstrap_ci95(values), "by_seed": by_seed.tolist()}


def cost(out: Path, seeds: list[int], stages: list[str]) -> dict:
    """What the stages have used, summed, as a mean over seeds: distinct labels, updates, sampled tokens, FLOPs."""
    total = {"labels_used": 0, "rl_updates": 0, "dense_updates": 0, "sampled_tokens": 0, "flops": 0}
    for seed in seeds:
        labels = set()
        for stage in stages:
            run = json.loads((out / f"seed{seed}/{stage}/run.json").read_text())
            labels |= set(json.loads((out / f"seed{seed}/{stage}/labels.json").read_text()))
            kind = "rl_updates" if "group_size" in run["args"] else "dense_updates"
            for key, value in ((kind, "updates"), ("sampled_tokens", "sampled_tokens"), ("flops", "flops")):
                total[key] += run[value] / len(seeds)
        total["labels_used"] += len(labels) / len(seeds)
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


def write(out: Path, benchmarks: list[str], seeds: list[int], arms: dict[str, list[str]], stages: list[str]) -> None:
    """Write report.json, report.md and report.png into `out`. arms: {arm: the stages it rests on, its own last}."""

    last = {arm: (used or [arm])[-1] for arm, used in arms.items()}  # the stage an arm stands for
    units = {"teacher_base": [], "base": []} | {stage: [stage] for stage in stages}
    values = {benchmark: {name: scores(out, seeds, name, benchmark) for name in units} for benchmark in benchmarks}
    figures = {name: {benchmark: measured(values[benchmark][name]) for benchmark in benchmarks} for name in units}

    def row(name: str, used: list[str]) -> dict:
        return {**figures[name][benchmarks[0]], "benchmarks": figures[name], **cost(out, seeds, used)}

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
    write_aside(out / "report.json", json.dumps(record, indent=2))
    text = markdown(record)
    (out / "report.md").write_text(
        f"# Accuracy on {benchmarks[0]}\n\n{text}\n\n![accuracy and learning curves](report.png)\n"
    )
    plot(out, record)
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
    return "\n".join(lines)


def plot(out: Path, record: dict) -> None:
    """Accuracy by arm with 95 % intervals and one dot a seed; accuracy against labels; learning curves (in-training
    evaluation, else reward), mean over seeds."""
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
            for seed in record["seeds"]:
                path = out / f"seed{seed}/{name}/metrics.jsonl"
                for row in map(json.loads, path.read_text().splitlines() if path.exists() else []):
                    if key in row:
                        curve.setdefault(row["step"], []).append(row[key])
            if curve:
                right.plot(list(curve), [np.mean(values) for values in curve.values()], label=name, marker=".")
                break
    right.set(xlabel="step of the stage", ylabel="accuracy in training, mean over seeds", ylim=(0, 1))
    right.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(out / "report.png", dpi=110)
    plt.close(figure)


def main(args: Args) -> None:
    """Put the reports of finished runs where the project shows them: README.md between its markers, docs/, results."""
    root = Path(__file__).parent.parent
    readme, results = root / "README.md", root / "benchmarks/results"
    for run in map(Path, args.runs):
        require((run / "report.json").exists(), f"--runs {run}: no report.json there; give an output folder of bridge.py")
        record, begin, end = json.loads((run / "report.json").read_text()), f"<!-- report {run.name} -->\n", "\n<!-- end -->"
        before, found, rest = readme.read_text().partition(begin)
        require(
            found and end in rest, f"--runs {run}: README.md has no block {begin.strip()} ... {end.strip()} to put it in"
        )
        readme.write_text(before + begin + markdown(record) + rest[rest.index(end) :])
        shutil.copy(run / "report.png", root / f"docs/{run.name}.png")
        write_aside(results / f"{run.name}.json", json.dumps(record, indent=1) + "\n")
        print(f"README.md, docs/{run.name}.png and benchmarks/results/{run.name}.json now show {run}")


if __name__ == "__main__":
    cli.run(main, Args)
