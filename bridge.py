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
import os
import random
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import checkpoint
import common
from common import require

ARMS = {  # arm: the stages whose labels it rests on, its own last
    "base": ["base"],
    "direct_grpo": ["direct_grpo"],
    "raw_teacher": ["raw_teacher_warmup", "raw_teacher"],
    "bridge": ["teacher_rl", "bridge_warmup", "bridge"],
    "bridge_grpo": ["teacher_rl", "bridge_warmup", "bridge", "bridge_grpo"],
}


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
    nproc: int = 1
    """processes per stage, one per GPU: each stage runs under torchrun"""
    force: bool = False
    """go on where a preflight finds an error; the stages record it in their run.json"""


def toy_settings(args: Args) -> None:
    """The embedded world's settings, chosen on its dev split (docs/bridge.md); flags of the command line come last."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # two threads gain little here, and stall on a busy machine
    world = f"{args.out}/world"
    args.teacher, args.student, args.benchmarks = f"{world}/teacher_base", f"{world}/student_base", (f"{world}/test.jsonl",)
    shared = f'--instruction "" --max-response-tokens 64 --eval-data {shlex.quote(world)}/dev.jsonl'
    grpo = f"{shared} --prompts-per-step 32 --minibatch-prompts 16 --micro-batch-tokens 2048 --eval-every 10"
    distil = f"{shared} --learning-rate 7e-4 --micro-batch-tokens 2048"
    args.teacher_grpo_flags = f"{grpo} --learning-rate 2e-4 --max-steps 40 {args.teacher_grpo_flags}"
    args.student_grpo_flags = f"{grpo} --learning-rate 2e-4 --max-steps 60 {args.student_grpo_flags}"
    args.stage3_flags = f"{grpo} --learning-rate 1e-4 --max-steps 40 {args.stage3_flags}"
    warmup = f"{distil} --rollouts-per-prompt 4 --rollouts-per-step 64 --eval-every 20"
    args.warmup_flags = f"{warmup} --max-steps 100 {args.warmup_flags}"
    args.opd_flags = f"{distil} --prompts-per-step 64 --eval-every 50 --max-steps 200 {args.opd_flags}"
    args.eval_flags = (
        f'--instruction "" --max-response-tokens 64 --samples 4 --temperature 1 --top-p 1 --top-k 0 {args.eval_flags}'
    )


def execute(command: str, done: Path, inputs: list[str] = (), nproc: int = 1) -> None:
    """Print and run one command; skip it when `done`, the file it writes last, says that it finished.

    Raises UsageError if what is there was made by another command, or before one of the `inputs` (run folders)."""
    command = shlex.join(shlex.split(command))
    record = json.loads(done.read_text()) if done.exists() else {"finished": False}
    finished = record.get("finished", True)
    made = done if finished else checkpoint.latest(done.parent)  # a stage that was stopped goes on from its checkpoint
    if made:
        require(
            record["command"] == command, f"{done.parent}: holds `{record['command']}`; delete it, or choose another --out"
        )
        newer = [i for i in inputs if (path := Path(i, "run.json")).exists() and path.stat().st_mtime > made.stat().st_mtime]
        require(
            not newer, f"{done.parent}: older than {', '.join(newer)}, which it was made from; delete it to make it again"
        )
    if finished:
        print(f"# finished before: {command}", flush=True)
        return
    call(command, nproc)


def call(command: str, nproc: int = 1) -> None:
    """Print and run one command, under torchrun for several processes; its exit code, unless 0, is this one's."""
    script, *flags = shlex.split(command)[1:]
    launcher = ["torchrun", "--standalone", f"--nproc_per_node={nproc}"] if nproc > 1 else ["python"]
    print(f"\n$ {shlex.join([*launcher, script, *flags])}", flush=True)
    launcher = ["-m", "torch.distributed.run", *launcher[1:]] if nproc > 1 else []
    code = subprocess.run([sys.executable, *launcher, str(Path(__file__).parent / script), *flags]).returncode
    if code:
        print(
            f"error: {script} ended with exit code {code}; the same bridge.py command continues from here", file=sys.stderr
        )
        sys.exit(code)


def split_labels(args: Args) -> tuple[str, str]:
    """Split --train-data into files of 80 % for stages 1 and 2 and 20 % held out for stage 3; returns both paths."""
    problems = common.load_problems(args.train_data, "--train-data", need_answers=True)
    random.Random(42).shuffle(problems)
    cut, data = len(problems) * 4 // 5, Path(args.out, "data")
    data.mkdir(parents=True, exist_ok=True)
    for name, part in (("train", problems[:cut]), ("heldout", problems[cut:])):
        rows = [{"prompt": [*p.messages, {"role": "user", "content": p.text}], "answer": p.answer} for p in part]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        path = data / f"{name}.jsonl"
        require(
            not path.exists() or path.read_text() == text,
            f"{path}: holds other problems than --train-data {args.train_data}; choose another --out",
        )
        path.write_text(text)
    return str(data / "train.jsonl"), str(data / "heldout.jsonl")


def main(args: Args) -> None:
    arms = list(ARMS) if "all" in args.arms else list(args.arms)
    require(set(arms) <= set(ARMS), f"--arms {' '.join(args.arms)}: choose all, or some of {' '.join(ARMS)}")
    require(bool(args.teacher) == bool(args.student), "--teacher and --student go together; give both or neither")
    out, q = args.out, shlex.quote
    if args.teacher:
        train, heldout = split_labels(args)
    else:
        require(
            (args.train_data, args.benchmarks) == (Args.train_data, Args.benchmarks),
            "--train-data and --benchmarks need --teacher and --student; without them the embedded world has its own",
        )
        toy_settings(args)
        execute(f"python toy.py --out {q(out)}/world --seed {args.seed} {args.toy_flags}", Path(out, "world/toy.json"))
        train, heldout = f"{out}/world/train.jsonl", f"{out}/world/heldout.jsonl"

    # ---- the stages in order: script, the models it starts from, problems, flags
    teacher, student, rl = args.teacher, args.student, f"{out}/teacher_rl"
    stages = {
        "teacher_rl": ("grpo.py", {"--model": teacher}, train, args.teacher_grpo_flags),
        "direct_grpo": ("grpo.py", {"--model": student}, train, args.student_grpo_flags),
        "raw_teacher_warmup": ("fkl_warmup.py", {"--teacher": teacher, "--student": student}, train, args.warmup_flags),
        "raw_teacher": ("opd.py", {"--teacher": teacher, "--student": f"{out}/raw_teacher_warmup"}, train, args.opd_flags),
        "bridge_warmup": ("fkl_warmup.py", {"--teacher": rl, "--student": student}, train, args.warmup_flags),
        "bridge": ("opd.py", {"--teacher": rl, "--student": f"{out}/bridge_warmup"}, train, args.opd_flags),
        "bridge_grpo": ("grpo.py", {"--model": f"{out}/bridge"}, heldout, args.stage3_flags),
    }
    wanted = [name for name in stages if any(name in ARMS[arm] for arm in arms)]

    # ---- do teacher and student fit? Asked before the first stage, not after days of teacher RL
    force = " --force" if args.force else ""
    if any(stages[name][0] == "opd.py" for name in wanted) and not any(common.finished(f"{out}/{name}") for name in wanted):
        models = f"--teacher {q(teacher)} --student {q(student)}"
        flags = f"--train-data {q(train)} --seed {args.seed} {args.opd_flags}{force}"
        call(shlex.join(shlex.split(f"python opd.py --preflight-only {models} {flags}")))

    for name in wanted:
        script, models, data, flags = stages[name]
        named = " ".join(f"{flag} {q(model)}" for flag, model in models.items())
        command = f"python {script} {named} --train-data {q(data)} --out {q(out)}/{name} --seed {args.seed} --resume {flags}"
        command += force if script != "grpo.py" else ""
        execute(command, Path(out, name, "run.json"), list(models.values()), args.nproc)

    # ---- measure the base models and the student of every stage
    results, names = {}, [common.benchmark_name(benchmark) for benchmark in args.benchmarks]
    for name in ["base", "teacher_base", *wanted]:
        model = {"base": student, "teacher_base": teacher}.get(name, f"{out}/{name}")
        command = (
            f"python eval_math.py --model {q(model)} --benchmarks {shlex.join(args.benchmarks)} "
            f"--out {q(out)}/eval/{name} --seed {args.seed} {args.eval_flags}"
        )
        folder = Path(out, "eval", name)
        execute(command, folder / names[-1] / "summary.json", [model], args.nproc)
        results[name] = {benchmark: json.loads((folder / benchmark / "summary.json").read_text()) for benchmark in names}
    report(args, arms, results)


def report(args: Args, arms: list[str], results: dict) -> None:
    """Write report.json, report.md and report.png. results: {stage: {benchmark: summary.json of eval_math.py}}"""
    out, first = Path(args.out), common.benchmark_name(args.benchmarks[0])
    kept = ("accuracy", "ci95", "pass_at_k", "response_length", "truncated_frac")

    def row(name, stages):
        runs = [path for stage in stages if (path := out / stage / "run.json").exists()]
        benchmarks = {benchmark: {key: summary[key] for key in kept} for benchmark, summary in results[name].items()}
        return {
            "accuracy": benchmarks[first]["accuracy"],
            "ci95": benchmarks[first]["ci95"],
            "benchmarks": benchmarks,
            "labels_used": sum(json.loads(path.read_text())["labels_used"] for path in runs),
        }

    record = {
        "benchmark": first,
        "seed": args.seed,
        "arms": {arm: row(arm, ARMS[arm]) for arm in arms},
        "stages": {name: row(name, [name]) for name in results},
    }
    (out / "report.json").write_text(json.dumps(record, indent=2))
    lines = ["| arm | accuracy | 95 % interval | labels used |", "|---|---|---|---|"]
    teachers = {name: row for name, row in record["stages"].items() if name.startswith("teacher")}
    for name, r in (teachers | record["arms"]).items():
        lines.append(f"| {name} | {r['accuracy']:.3f} | {r['ci95'][0]:.3f} to {r['ci95'][1]:.3f} | {r['labels_used']} |")
    table = "\n".join(lines)
    (out / "report.md").write_text(f"# Accuracy on {first}\n\n{table}\n\n![accuracy and learning curves](report.png)\n")
    plot(out, record)
    print(f"\n{table}\n\nwrote {out}/report.json and report.md")


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
    errors = [[r["accuracy"] - r["ci95"][0] for r in rows], [r["ci95"][1] - r["accuracy"] for r in rows]]
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
