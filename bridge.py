# docs/bridge.md
"""The whole recipe, stage after stage, as the commands a user would type: each is printed, then run.

    teacher --grpo.py--> RL teacher --fkl_warmup.py--> warmed-up student --opd.py--> bridge --grpo.py--> bridge_grpo

The arms ask where the labels are best spent: `direct_grpo` spends them on the student, `raw_teacher` sends an unrewarded
teacher through the same bridge, `bridge` spends them on the teacher, `bridge_grpo` adds held-out labels behind it. Run
again, it skips what is finished. Without --teacher it runs on the embedded world of toy.py, on a laptop CPU.

    python bridge.py
    python bridge.py --teacher Qwen/Qwen3-8B --student Qwen/Qwen3-1.7B --out runs/qwen3
"""

import json
import random
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import common
from common import require

ARMS = {  # arm: the stages whose labels it rests on, its own last
    "base": ["base"],
    "direct_grpo": ["direct_grpo"],
    "raw_teacher": ["raw_teacher_warmup", "raw_teacher"],
    "bridge": ["teacher_rl", "bridge_warmup", "bridge"],
    "bridge_grpo": ["teacher_rl", "bridge_warmup", "bridge", "bridge_grpo"],
}
HERE = Path(__file__).parent


@dataclass
class Args:
    out: str = "runs/demo"
    """folder of all stages, report.json, report.md and report.png"""
    teacher: str | None = None
    """hub id or local folder of the teacher before RL; None: the embedded world of toy.py"""
    student: str | None = None
    """hub id or local folder of the student; same tokenizer as the teacher"""
    train_data: str = "open-r1/DAPO-Math-17k-Processed"
    """labeled problems; 80 % are for stages 1 and 2, 20 % are held out for stage 3 (shuffled with seed 42)"""
    benchmarks: tuple[str, ...] = ("math500", "aime24", "aime25")
    """what eval_math.py measures; the first is the one plotted"""
    arms: tuple[str, ...] = ("all",)
    """all, or some of base direct_grpo raw_teacher bridge bridge_grpo"""
    teacher_grpo_flags: str = ""
    """more flags for grpo.py on the teacher, in one string"""
    student_grpo_flags: str = ""
    """more flags for grpo.py on the student (direct_grpo)"""
    stage3_flags: str = ""
    """more flags for grpo.py on the bridged student (bridge_grpo)"""
    warmup_flags: str = ""
    """more flags for fkl_warmup.py"""
    opd_flags: str = ""
    """more flags for opd.py"""
    eval_flags: str = ""
    """more flags for eval_math.py"""
    toy_flags: str = ""
    """more flags for toy.py"""
    seed: int = 1
    """seed of every stage"""


def toy_settings(args: Args) -> None:
    """The embedded world's settings, chosen on its dev split (docs/bridge.md); flags of the command line come last."""
    world = f"{args.out}/world"
    args.teacher, args.student, args.benchmarks = f"{world}/teacher_base", f"{world}/student_base", (f"{world}/test.jsonl",)
    shared = f'--instruction "" --max-response-tokens 64 --eval-data {world}/dev.jsonl'
    grpo = f"{shared} --prompts-per-step 32 --minibatch-prompts 16 --eval-every 10"
    args.teacher_grpo_flags = f"{grpo} --learning-rate 2e-4 --max-steps 40 {args.teacher_grpo_flags}"
    args.student_grpo_flags = f"{grpo} --learning-rate 2e-4 --max-steps 60 {args.student_grpo_flags}"
    args.stage3_flags = f"{grpo} --learning-rate 1e-4 --max-steps 40 {args.stage3_flags}"
    args.warmup_flags = (
        f"{shared} --rollouts-per-prompt 4 --rollouts-per-step 64 --eval-every 20 --learning-rate 7e-4 "
        f"--max-steps 60 {args.warmup_flags}"
    )
    args.opd_flags = f"{shared} --prompts-per-step 64 --eval-every 20 --learning-rate 7e-4 --max-steps 140 {args.opd_flags}"
    args.eval_flags = (
        f'--instruction "" --max-response-tokens 64 --samples 4 --temperature 1 --top-p 1 --top-k 0 {args.eval_flags}'
    )


def execute(script: str, flags: list[str], done: Path, inputs: tuple[Path, ...] = ()) -> None:
    """Print and run one command; skip it when `done`, the file it writes last, says that it finished."""
    command = ["python", script, *flags]
    if done.exists():
        record = json.loads(done.read_text())
        if record.get("finished", True):
            require(
                record.get("command", shlex.join(command)) == shlex.join(command),
                f"{done.parent}: finished with other settings ({record.get('command')}); delete it or choose another --out",
            )
            require(
                all(done.stat().st_mtime >= path.stat().st_mtime for path in inputs if path.exists()),
                f"{done.parent}: older than what it was made from; delete it to make it again",
            )
            print(f"# finished before: {shlex.join(command)}", flush=True)
            return
    print(f"\n$ {shlex.join(command)}", flush=True)
    result = subprocess.run([sys.executable, str(HERE / script), *flags])
    if result.returncode:
        print(f"error: {script} ended with exit code {result.returncode}; run bridge.py again to continue", file=sys.stderr)
        sys.exit(result.returncode)


def split_labels(args: Args) -> tuple[str, str]:
    """Paths of the train and held-out problems, disjoint. The embedded world has them; real data is split 80/20."""
    if args.teacher == f"{args.out}/world/teacher_base":
        return f"{args.out}/world/train.jsonl", f"{args.out}/world/heldout.jsonl"
    data = Path(args.out, "data")
    if not (data / "heldout.jsonl").exists():
        problems = common.load_problems(args.train_data, "--train-data", need_answers=True)
        random.Random(42).shuffle(problems)
        cut = len(problems) * 4 // 5
        data.mkdir(parents=True, exist_ok=True)
        for name, part in (("train", problems[:cut]), ("heldout", problems[cut:])):
            rows = [{"prompt": [*p.messages, {"role": "user", "content": p.text}], "answer": p.answer} for p in part]
            (data / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(data / "train.jsonl"), str(data / "heldout.jsonl")


def main(args: Args) -> None:
    arms = list(ARMS) if "all" in args.arms else list(args.arms)
    require(set(arms) <= set(ARMS), f"--arms {' '.join(args.arms)}: choose all, or some of {' '.join(ARMS)}")
    require(bool(args.teacher) == bool(args.student), "--teacher and --student go together; give both or neither")
    if not args.teacher:
        execute(
            "toy.py",
            ["--out", f"{args.out}/world", "--seed", str(args.seed), *shlex.split(args.toy_flags)],
            Path(args.out, "world/toy.json"),
        )
        toy_settings(args)
    train, heldout = split_labels(args)

    # ---- the stages of the chosen arms, in order; each is (script, its models, more flags)
    out, seed = args.out, ["--seed", str(args.seed)]
    teacher_rl = f"{out}/teacher_rl"
    stages = {
        "teacher_rl": ("grpo.py", {"--model": args.teacher}, train, args.teacher_grpo_flags),
        "direct_grpo": ("grpo.py", {"--model": args.student}, train, args.student_grpo_flags),
        "raw_teacher_warmup": (
            "fkl_warmup.py",
            {"--teacher": args.teacher, "--student": args.student},
            train,
            args.warmup_flags,
        ),
        "raw_teacher": (
            "opd.py",
            {"--teacher": args.teacher, "--student": f"{out}/raw_teacher_warmup"},
            train,
            args.opd_flags,
        ),
        "bridge_warmup": ("fkl_warmup.py", {"--teacher": teacher_rl, "--student": args.student}, train, args.warmup_flags),
        "bridge": ("opd.py", {"--teacher": teacher_rl, "--student": f"{out}/bridge_warmup"}, train, args.opd_flags),
        "bridge_grpo": ("grpo.py", {"--model": f"{out}/bridge"}, heldout, args.stage3_flags),
    }
    wanted = {stage for arm in arms for stage in ARMS[arm]}
    for name, (script, models, data, flags) in stages.items():
        if name in wanted:
            named = [part for pair in models.items() for part in pair]
            execute(
                script,
                [*named, "--train-data", data, "--out", f"{out}/{name}", *seed, *shlex.split(flags)],
                Path(out, name, "run.json"),
                tuple(Path(path, "run.json") for path in models.values()),
            )

    # ---- measure the base models and the student of every stage
    checkpoints = {
        "base": args.student,
        "teacher_base": args.teacher,
        **{name: f"{out}/{name}" for name in stages if name in wanted},
    }
    results = {}
    for name, model in checkpoints.items():
        flags = [
            "--model",
            model,
            "--benchmarks",
            *args.benchmarks,
            "--out",
            f"{out}/eval/{name}",
            *seed,
            *shlex.split(args.eval_flags),
        ]
        folders = [Path(out, "eval", name, common.benchmark_name(benchmark)) for benchmark in args.benchmarks]
        execute("eval_math.py", flags, folders[-1] / "summary.json", (Path(model, "run.json"),))
        results[name] = {folder.name: json.loads((folder / "summary.json").read_text()) for folder in folders}
    report(args, arms, results, wanted)


def report(args: Args, arms: list[str], results: dict, wanted: set[str]) -> None:
    """Write report.json, report.md and report.png from the finished stages."""
    out = Path(args.out)
    labels = {name: json.loads((out / name / "run.json").read_text())["labels_used"] for name in wanted - {"base"}}
    first = common.benchmark_name(args.benchmarks[0])

    def row(name, stages):
        summary = results[name][first]
        return {
            "accuracy": summary["accuracy"],
            "ci95": summary["ci95"],
            "labels_used": sum(labels.get(s, 0) for s in stages),
            "benchmarks": {
                b: {k: s[k] for k in ("accuracy", "ci95", "pass_at_k", "response_length", "truncated_frac")}
                for b, s in results[name].items()
            },
        }

    stages = {name: row(name, []) | {"labels_used": labels.get(name, 0)} for name in results}
    record = {"benchmark": first, "arms": {arm: row(arm, ARMS[arm]) for arm in arms}, "stages": stages, "seed": args.seed}
    (out / "report.json").write_text(json.dumps(record, indent=2))

    lines = [f"# Accuracy on {first}", "", "| arm | accuracy | 95 % interval | labels used |", "|---|---|---|---|"]
    for name, r in {**{n: stages[n] for n in ("teacher_base", "teacher_rl") if n in stages}, **record["arms"]}.items():
        lines.append(f"| {name} | {r['accuracy']:.3f} | {r['ci95'][0]:.3f} to {r['ci95'][1]:.3f} | {r['labels_used']} |")
    (out / "report.md").write_text("\n".join(lines) + "\n\n![accuracy and learning curves](report.png)\n")
    plot(out, record)
    print("\n" + "\n".join(lines[2:]) + f"\n\nwrote {out}/report.json, report.md, report.png")


def plot(out: Path, record: dict) -> None:
    """Left: accuracy by stage with 95 % intervals. Right: learning curves (in-training evaluation, else reward)."""
    try:
        import matplotlib
    except ImportError:
        print("no plot: pip install matplotlib")
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.5), constrained_layout=True)
    names, rows = list(record["stages"]), list(record["stages"].values())
    accuracy = [r["accuracy"] for r in rows]
    errors = [
        [a - r["ci95"][0] for a, r in zip(accuracy, rows, strict=True)],
        [r["ci95"][1] - a for a, r in zip(accuracy, rows, strict=True)],
    ]
    colors = ["tab:gray" if n.startswith("teacher") else "tab:blue" if n in record["arms"] else "tab:cyan" for n in names]
    left.barh(names, accuracy, xerr=errors, color=colors, capsize=3)
    left.invert_yaxis()
    left.set(xlabel=f"accuracy on {record['benchmark']}, 95 % interval", xlim=(0, 1))
    for name in names:
        path = out / name / "metrics.jsonl"
        metrics = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        for key in ("eval/accuracy", "charts/reward"):
            points = [(m["step"], m[key]) for m in metrics if key in m]
            if points:
                right.plot(*zip(*points, strict=True), label=name, marker=".")
                break
    right.set(xlabel="step of the stage", ylabel="accuracy in training", ylim=(0, 1))
    right.legend(fontsize=8)
    figure.savefig(out / "report.png", dpi=120)


if __name__ == "__main__":
    common.run(main, Args)
