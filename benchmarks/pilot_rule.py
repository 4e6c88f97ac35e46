# docs/pilot.md
"""Is the pilot's recommendation right? For every budget and seed of the recorded `--labels` studies, and of two smaller ones
with other students made here, the pilot is run on that world and those labels, and its rules are held against what the
study found: does `bridge` or `long_grpo`, with the same labels and FLOPs, answer more of the test problems?

    python benchmarks/pilot_rule.py

Run again, it goes on where it was stopped, as bridge.py does.
"""

import json
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import tyro

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import bridge  # noqa: E402
from infra import cli, dataset, pilot, stages, worlds  # noqa: E402
from infra.cli import require  # noqa: E402

RULES = ("probe", "cheap", "always the bridge")
ARMS = ("bridge", "long_grpo")


@dataclass
class Args:
    worlds: tuple[Literal["arithmetic", "swaps"], ...] = ("arithmetic", "swaps")
    """those whose study is asked, by its report benchmarks/results/WORLD_labels.json"""
    out: str = "runs/pilot_rule"
    """folder of the worlds, of the pilots, of the studies made here, of pilot_rule.json and pilot_rule.md"""
    skills: tuple[float, ...] = (0.6, 0.9)
    """for each a study of the arithmetic world with such a student (toy.py --student-skill)"""
    labels: tuple[int, ...] = (64, 256)
    """its label budgets"""
    seeds: int = 1
    """its seeds"""
    pilot_problems: int = 64
    """as bridge.py's"""
    pilot_samples: int = 16
    """as bridge.py's"""
    pilot_steps: int = 10
    """as bridge.py's"""
    toy_flags: str = ""
    """more flags for toy.py where studies are made"""
    bridge_flags: str = ""
    """more flags for bridge.py there, and in their pilots"""
    jobs: int | None = None
    """stages at work at once; none: one per CPU and at most 4"""


def report_of(world: str) -> Path:
    return ROOT / f"benchmarks/results/{world}_labels.json"


def recorded_study(args: Args, world: str) -> tuple[dict, Path]:
    """The report of a study that this project has run, and a folder with its world, which is made again."""
    out = Path(args.out, world)
    command = f"toy.py --world {world} --out {shlex.quote(str(out))}/world --seed 1"
    stages.execute(out / "world", "toy.json", lambda: command, 1, None)
    return json.loads(report_of(world).read_text(encoding="utf-8")), out


def small_study(args: Args, skill: float) -> tuple[dict, Path]:
    """Make, or go on with, the study of a student of that skill."""
    out, toy_flags = Path(args.out, f"skill{skill:g}"), f"{args.toy_flags} --student-skill {skill:g}"
    jobs = f" --jobs {args.jobs}" if args.jobs else ""
    stages.call(f"bridge.py --arms {' '.join(ARMS)} --labels {' '.join(map(str, args.labels))} --seeds {args.seeds} "
                f"--out {shlex.quote(str(out))} --toy-flags={shlex.quote(toy_flags)}{jobs} {args.bridge_flags}")  # fmt: skip
    return json.loads((out / "report.json").read_text(encoding="utf-8")), out


def points(args: Args, record: dict, study: Path, flags: str) -> list[dict]:
    """A row for each budget and seed of a study: what won at that budget, by all seeds, and what this seed's pilot says.
    flags: those of bridge.py that the study was made with, besides its world's."""
    world = json.loads((study / "world/toy.json").read_text(encoding="utf-8"))["args"]
    labeled, rows = dataset.load_problems(f"{study}/world/train.jsonl", "--worlds", need_answers=True), []
    flags += f" --pilot-problems {args.pilot_problems} --pilot-samples {args.pilot_samples} --pilot-steps {args.pilot_steps}"
    flags += f" --jobs {args.jobs}" if args.jobs else ""
    for budget, arms in record["frontier"].items():
        truth = pilot.recommend(record["frontier_differences"][budget]["long_grpo < bridge"]["ci95"])
        probed = min(args.pilot_problems, int(budget) // 2)  # budgets are nested: those that probe as many probe the same
        for place, seed in enumerate(record["seeds"]):
            typed = f"--out {shlex.quote(str(study))} --world {world['world']} --labels {budget} {flags}"
            settings = tyro.cli(bridge.Args, args=shlex.split(typed))
            worlds.fill_in(settings)
            folder = study / f"pilots/{probed}/seed{seed}"
            rules = pilot.run(settings, labeled[: int(budget)], folder, seed)["rules"] | {"always the bridge": pilot.TEACHER}
            accuracy = {arm: arms[arm]["by_seed"][place] for arm in ARMS}
            point = {"world": world["world"], "skill": world["student_skill"], "labels": int(budget), "seed": seed}
            rows.append(point | accuracy | {"truth": truth, "rules": rules})
    return rows


def outcome(recommended: str, truth: str) -> str:
    """hit: the same; miss: the other side; open: only one of the two is undecided."""
    if recommended == truth:
        return "hit"
    return "open" if pilot.CLOSE in (recommended, truth) else "miss"


def regret(row: dict, recommended: str) -> float:
    """Accuracy given away against the better arm of this budget and seed; undecided is a coin's throw between the two."""
    chosen = {pilot.TEACHER: ("bridge",), pilot.STUDENT: ("long_grpo",), pilot.CLOSE: ARMS}[recommended]
    return max(row[arm] for arm in ARMS) - float(np.mean([row[arm] for arm in chosen]))


def totals(rows: list[dict]) -> dict[str, dict]:
    """{rule: how many hits, misses and open points, and the mean regret}."""
    found = {}
    for rule in RULES:
        outcomes = [outcome(row["rules"][rule], row["truth"]) for row in rows]
        found[rule] = {name: outcomes.count(name) for name in ("hit", "miss", "open")}
        found[rule]["regret"] = float(np.mean([regret(row, row["rules"][rule]) for row in rows]))
    return found


def markdown(rows: list[dict]) -> str:
    lines = [f"| world | skill | labels | seed | bridge | long_grpo | better | {' | '.join(RULES[:2])} |", "|---" * 9 + "|"]
    for row in rows:
        said = [f"{row['rules'][rule]} ({outcome(row['rules'][rule], row['truth'])})" for rule in RULES[:2]]
        lines.append(
            f"| {row['world']} | {row['skill']:g} | {row['labels']} | {row['seed']} | {row['bridge']:.3f} | "
            f"{row['long_grpo']:.3f} | {row['truth']} | {' | '.join(said)} |"
        )
    lines += ["", "| rule | hits | misses | open | mean regret |", "|---|---|---|---|---|"]
    for rule, row in totals(rows).items():
        lines.append(f"| {rule} | {row['hit']} | {row['miss']} | {row['open']} | {row['regret']:.4f} |")
    return "\n".join(lines)


def main(args: Args) -> None:
    cli.require_positive(args, "seeds pilot_problems pilot_steps jobs")
    pilot.check(bridge.Args(pilot_samples=args.pilot_samples))
    require(args.worlds or args.skills, "--worlds and --skills: nothing to try the rule on; give one of them")
    missing = [world for world in args.worlds if not report_of(world).exists()]
    require(not missing, f"--worlds {' '.join(args.worlds)}: the study of {' '.join(missing)} has not been run")
    rows = [row for world in args.worlds for row in points(args, *recorded_study(args, world), "")]
    rows += [row for skill in args.skills for row in points(args, *small_study(args, skill), args.bridge_flags)]
    text, record = markdown(rows), {"points": rows, "totals": totals(rows)}
    Path(args.out, "pilot_rule.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    Path(args.out, "pilot_rule.md").write_text(f"# The pilot's rules against the studies\n\n{text}\n", encoding="utf-8")
    print(f"\n{text}\n\nwrote {args.out}/pilot_rule.json and pilot_rule.md")


if __name__ == "__main__":
    cli.run(main, Args)
