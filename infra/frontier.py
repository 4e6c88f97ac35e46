# docs/report.md
"""Accuracy against labels: each arm at each label budget, the differences that matter, and the label efficiency: by which
factor the bridge needs fewer labels for the accuracy that direct GRPO reaches."""

from pathlib import Path

import numpy as np

from infra.bootstrap import bootstrap_ci95, drawn_means, verdict

PAIRS = ("direct_grpo < bridge", "long_grpo < bridge", "bridge_own_prompts < bridge", "raw_teacher < bridge",
         "long_grpo < bridge_own_prompts", "teacher_rl < bridge")  # fmt: skip
REFERENCES = ("direct_grpo", "long_grpo")  # whose accuracy the bridge is asked to reach with fewer labels
DRAWS = 4000


def frontier(values: dict[int, dict[str, np.ndarray]], costs: dict[int, dict[str, dict]]) -> dict:
    """The parts of report.json that --labels adds. values {budget: {arm: (S, P)}}, the budgets in rising order; costs
    {budget: {arm: what report.cost gives}}."""
    table, differences = {}, {}
    for budget, arms in values.items():
        table[budget] = {
            arm: {
                "accuracy": float(one.mean()),
                "ci95": bootstrap_ci95(one),
                "labels_used": costs[budget][arm]["labels_used"],
                "flops": costs[budget][arm]["flops"],
                "by_seed": one.mean(1).tolist(),
            }
            for arm, one in arms.items()
        }
        differences[budget] = {}
        for pair in PAIRS:
            low, high = pair.split(" < ")
            if low in arms and high in arms:
                gap = arms[high] - arms[low]
                ci95 = bootstrap_ci95(gap)
                differences[budget][pair] = {"difference": float(gap.mean()), "ci95": ci95, "verdict": verdict(ci95)}
    first = next(iter(values.values()))
    found = {arm: label_efficiency(values, arm) for arm in REFERENCES if {arm, "bridge"} <= first.keys() and len(values) > 1}
    return {"frontier": table, "frontier_differences": differences, "label_efficiency": found}


def label_efficiency(values: dict[int, dict[str, np.ndarray]], reference: str) -> dict[int, dict]:
    """{budget N: by which factor the bridge needs fewer labels for the accuracy of `reference` at N}.

    `factor` is the labels at which the reference reaches that accuracy (fewer than N where its curve is flat) over those at
    which the bridge does, both curves in straight lines over the logarithm of the labels and made rising from left to
    right; None where it is "outside", "below" what the bridge has at the smallest budget or "above" what it has at any.
    `ci95` are percentiles over DRAWS draws of seeds and of problems. A draw outside counts as the end of the range, so an
    end of the interval may be a bound as well."""
    budgets = np.array(list(values), dtype=float)
    bridge, direct = (np.stack([values[n][arm] for n in values]) for arm in ("bridge", reference))  # (N, S, P)

    def needed(accuracy, targets):
        return np.clip([labels_needed(budgets, accuracy, target) for target in targets], budgets[0], budgets[-1])

    draws = zip(drawn_means(bridge, DRAWS), drawn_means(direct, DRAWS), strict=True)
    sampled = np.array([needed(other, other) / needed(own, other) for own, other in draws])  # (DRAWS, N)
    own, other = bridge.mean((1, 2)), direct.mean((1, 2))
    factors, found = needed(other, other) / needed(own, other), {}
    for k, n in enumerate(values):
        reached = labels_needed(budgets, own, other[k])
        outside = "below" if reached < budgets[0] else "above" if reached > budgets[-1] else None
        ci95 = [float(x) for x in np.percentile(sampled[:, k], [2.5, 97.5])]
        found[n] = {"factor": None if outside else float(factors[k]), "ci95": ci95, "outside": outside}
    return found


def labels_needed(budgets: np.ndarray, accuracy: np.ndarray, target: float) -> float:
    """Labels at which `accuracy` (N,) reaches `target`: 0 for fewer than the smallest budget, inf for more than the
    largest."""
    accuracy = np.maximum.accumulate(accuracy)
    if target < accuracy[0]:
        return 0.0
    if target > accuracy[-1]:
        return float("inf")
    k = int(np.argmax(accuracy >= target))
    if k == 0:
        return float(budgets[0])
    share = (target - accuracy[k - 1]) / (accuracy[k] - accuracy[k - 1])
    return float(np.exp(np.log(budgets[k - 1]) + share * np.log(budgets[k] / budgets[k - 1])))


def markdown(record: dict) -> str:
    """The tables of report.md that --labels adds."""
    arms = list(next(iter(record["frontier"].values())))
    lines = [f"| labels | {' | '.join(arms)} |", "|---" * (len(arms) + 1) + "|"]
    for budget, row in record["frontier"].items():
        cells = [f"{row[arm]['accuracy']:.3f} [{row[arm]['ci95'][0]:.3f}, {row[arm]['ci95'][1]:.3f}]" for arm in arms]
        lines.append(f"| {budget} | {' | '.join(cells)} |")
    pairs = list(next(iter(record["frontier_differences"].values())))
    lines += ["", f"| labels | {' | '.join(pairs)} |", "|---" * (len(pairs) + 1) + "|"]
    for budget, row in record["frontier_differences"].items():
        cells = [f"{d['difference']:+.3f} [{d['ci95'][0]:+.3f}, {d['ci95'][1]:+.3f}] {d['verdict']}" for d in row.values()]
        lines.append(f"| {budget} | {' | '.join(cells)} |")
    references = record["label_efficiency"]
    if references:
        lines += ["", f"| accuracy with | {' | '.join(f'fewer labels than {arm}' for arm in references)} |"]
        lines.append("|---" * (len(references) + 1) + "|")
    for budget in record["frontier"] if references else ():
        cells = [efficiency_cell(row[budget]) for row in references.values()]
        lines.append(f"| {budget} labels | {' | '.join(cells)} |")
    if more := [arm for arm in record["arms"] if arm not in arms]:
        lines += ["", f"Not among them, as they use held-out labels besides: {', '.join(more)}."]
    return "\n".join(lines)


def efficiency_cell(row: dict) -> str:
    low, high = row["ci95"]
    if row["outside"]:
        return f"outside the range: {f'more than {low:.1f}' if row['outside'] == 'below' else f'less than {high:.1f}'} x"
    return f"{row['factor']:.1f} x [{low:.1f}, {high:.1f}]"


def plot(path: Path, record: dict) -> None:
    """Accuracy against labels on a logarithmic axis, a line with its 95 % band an arm, one dot a seed."""
    try:
        import matplotlib
    except ImportError:
        return  # report.plot has said so
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(9, 5), constrained_layout=True)
    budgets = [float(n) for n in record["frontier"]]
    for k, arm in enumerate(next(iter(record["frontier"].values()))):
        rows = [row[arm] for row in record["frontier"].values()]
        axes.plot(budgets, [row["accuracy"] for row in rows], color=f"C{k}", marker="o", label=arm)
        axes.fill_between(budgets, *zip(*[row["ci95"] for row in rows], strict=True), color=f"C{k}", alpha=0.15)
        for n, row in zip(budgets, rows, strict=True):
            axes.plot([n] * len(row["by_seed"]), row["by_seed"], ".", color=f"C{k}", markersize=4)
    axes.set_xscale("log", base=2)
    axes.set_xticks(budgets, [f"{n:g}" for n in budgets])
    axes.set(xlabel="labels", ylabel=f"accuracy on {record['benchmark']}; bands are 95 % intervals", ylim=(0, 1))
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path, dpi=110)
    plt.close(figure)
