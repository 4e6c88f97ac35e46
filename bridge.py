# docs/bridge.md
"""The whole recipe, stage after stage, as the commands a user would type: each is printed, then run.

    teacher --grpo.py--> RL teacher --fkl_warmup.py--> warmed-up student --opd.py--> bridge --grpo.py--> bridge_grpo

The arms ask where the labels are best spent: `direct_grpo` spends them on the student, `raw_teacher` sends an unrewarded
teacher through the same bridge, `bridge` spends them on the teacher, `bridge_grpo` adds held-out labels behind it; the
others take one thing away or put something else in its place. Run again, it skips what is finished. Without --teacher it
runs on an embedded world of toy.py, on a laptop CPU.

    python bridge.py
    python bridge.py --arms all --seeds 3 --out runs/arithmetic
    python bridge.py --teacher Qwen/Qwen3-8B --student Qwen/Qwen3-1.7B --out runs/qwen3
"""

import ctypes
import json
import os
import random
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

from infra import checkpoint, cli, dataset, report, run_folder
from infra.cli import require

ARMS = {  # arm: the stages whose labels and compute it rests on, its own last
    "base": [],
    "direct_grpo": ["direct_grpo"],
    "raw_teacher": ["raw_teacher_warmup", "raw_teacher"],
    "bridge": ["teacher_rl", "bridge_warmup", "bridge"],
    "no_warmup": ["teacher_rl", "no_warmup"],
    "no_opd": ["teacher_rl", "no_opd"],
    "sft": ["teacher_rl", "sft"],
    "long_grpo": ["long_grpo"],
    "bridge_grpo": ["teacher_rl", "bridge_warmup", "bridge", "bridge_grpo"],
    "cold_grpo": ["cold_grpo"],
    "replay": ["teacher_rl", "bridge_warmup", "bridge", "replay"],
    "reward_free": ["reward_free"],
}
WORLDS = {  # where the settings of the embedded worlds differ; all were chosen on their dev splits (docs/bridge.md)
    "arithmetic": {"response_tokens": 64, "micro_batch_tokens": 2048, "teacher_steps": 40},
    "swaps": {"response_tokens": 72, "micro_batch_tokens": 4096, "teacher_steps": 60},
}


@dataclass
class Args:
    out: str = "runs/demo"
    """folder of all stages, report.json, report.md and report.png"""
    teacher: str | None = None
    """hub id or local folder of the teacher before RL; none: an embedded world of toy.py"""
    student: str | None = None
    """hub id or local folder of the student; same tokenizer as the teacher"""
    world: Literal["arithmetic", "swaps"] = "arithmetic"
    """which embedded world, without --teacher and --student"""
    train_data: str = "open-r1/DAPO-Math-17k-Processed"
    """labeled problems; 80 % are for stages 1 and 2, 20 % are held out for stage 3 (shuffled with seed 42)"""
    benchmarks: tuple[str, ...] = ("math500", "aime24", "aime25")
    """what eval_math.py measures; the first is the one compared and plotted"""
    arms: tuple[str, ...] = ("base", "direct_grpo", "raw_teacher", "bridge", "bridge_grpo")
    """all, or some of base direct_grpo raw_teacher bridge no_warmup no_opd sft long_grpo bridge_grpo cold_grpo replay
    reward_free"""
    teacher_grpo_flags: str = ""
    """more flags for grpo.py on the teacher, in one string"""
    student_grpo_flags: str = ""
    """more flags for grpo.py on the student (direct_grpo)"""
    stage3_flags: str = ""
    """more flags for grpo.py on held-out labels (bridge_grpo, cold_grpo)"""
    warmup_flags: str = ""
    """more flags for fkl_warmup.py"""
    opd_flags: str = ""
    """more flags for opd.py"""
    eval_flags: str = ""
    """more flags for eval_math.py"""
    toy_flags: str = ""
    """more flags for toy.py"""
    seed: int = 1
    """seed of every stage, and of the embedded world; with --seeds the first of them"""
    seeds: int = 1
    """how many times every stage is run, each with a seed of its own"""
    jobs: int | None = None
    """stages at work at once; none: on an embedded world one per CPU and at most 4, else 1"""
    nproc: int = 1
    """processes per stage, one per GPU: each stage runs under torchrun"""
    force: bool = False
    """go on where a preflight finds an error; the stages record it in their run.json"""


def toy_settings(args: Args) -> None:
    """Fill in an embedded world's settings; flags of the command line come last, and the last one counts."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # two threads gain little here, and stall on a busy machine
    args.jobs = args.jobs or min(os.cpu_count(), 4)
    folder, world = f"{args.out}/world", WORLDS[args.world]
    args.teacher, args.student = f"{folder}/teacher_base", f"{folder}/student_base"
    args.benchmarks = (f"{folder}/test.jsonl",)
    prompt = f'--instruction "" --max-response-tokens {world["response_tokens"]}'
    shared, micro = (
        f"{prompt} --eval-data {shlex.quote(folder)}/dev.jsonl",
        f"--micro-batch-tokens {world['micro_batch_tokens']}",
    )
    grpo = f"{shared} --prompts-per-step 32 --minibatch-prompts 16 {micro} --eval-every 10"
    dense = f"{shared} --learning-rate 7e-4 {micro}"
    warmup = f"{dense} --rollouts-per-prompt 4 --rollouts-per-step 64 --eval-every 20"
    args.teacher_grpo_flags = f"{grpo} --learning-rate 2e-4 --max-steps {world['teacher_steps']} {args.teacher_grpo_flags}"
    args.student_grpo_flags = f"{grpo} --learning-rate 2e-4 --max-steps 60 {args.student_grpo_flags}"
    args.stage3_flags = f"{grpo} --learning-rate 1e-4 --max-steps 40 {args.stage3_flags}"
    args.warmup_flags = f"{warmup} --max-steps 100 {args.warmup_flags}"
    args.opd_flags = f"{dense} --prompts-per-step 64 --eval-every 50 --max-steps 200 {args.opd_flags}"
    args.eval_flags = f"{prompt} --samples 4 --temperature 1 --top-p 1 --top-k 0 {args.eval_flags}"


def split_labels(args: Args) -> tuple[str, str]:
    """Split --train-data into files of 80 % for stages 1 and 2 and 20 % held out for stage 3; returns both paths."""
    problems = dataset.load_problems(args.train_data, "--train-data", need_answers=True)
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


def stages_of(args: Args, seed: int, train: str, heldout: str) -> dict[str, tuple[list[str], Callable[[], str]]]:
    """{stage: (stages that come before it, its command)}, in an order in which they can run. A command is asked for when
    those before it are finished, since a control makes as many updates as the stages it is held against have made."""
    q = shlex.quote
    teacher, student, force = q(args.teacher), q(args.student), " --force" if args.force else ""

    def at(stage):
        return q(f"{args.out}/seed{seed}/{stage}")

    def command(script, stage, models, data, flags):  # last, the bound of the label ledger, whatever the flags say
        shared = f"--train-data {q(data)} --out {at(stage)} --seed {seed} --resume"
        return f"{script} {models} {shared} {flags} --label-split {q(data)}"

    def grpo(stage, model, data, flags):
        return command("grpo.py", stage, f"--model {model}", data, flags)

    def warmup(stage, teacher, more=""):
        models = f"--teacher {teacher} --student {student}"
        return command("fkl_warmup.py", stage, models, train, f"{args.warmup_flags} {more}{force}")

    def opd(stage, teacher, student, more=""):
        models = f"--teacher {teacher} --student {student}"
        return command("opd.py", stage, models, train, f"{args.opd_flags} {more}{force}")

    def made(stage):
        return run_folder.finished(f"{args.out}/seed{seed}/{stage}")

    def spent(key, *names):
        return sum(made(name)[key] for name in names)

    def updates(*names):
        return f"--max-steps {spent('updates', *names)}"

    def no_opd():  # rollouts in proportion, so that each is seen as often as in the warmup
        first, total = made("bridge_warmup"), spent("updates", "bridge_warmup", "bridge")
        rollouts = first["args"]["rollouts_per_prompt"] * -(-total // first["updates"])
        return f"--max-steps {total} --rollouts-per-prompt {rollouts}"

    def long_grpo():  # direct_grpo, bounded by nothing but the FLOPs that the bridge has cost
        return f"{args.student_grpo_flags} --max-steps 1000000 --max-flops {spent('flops', *bridge)}"

    def reward_free():  # that its responses do not end is what it is to show
        return f"--loss reward_free --stop-truncated-frac 0 {updates('bridge_warmup', 'bridge')}"

    rl, bridge = at("teacher_rl"), ["teacher_rl", "bridge_warmup", "bridge"]
    return {
        "teacher_rl": ([], lambda: grpo("teacher_rl", teacher, train, args.teacher_grpo_flags)),
        "direct_grpo": ([], lambda: grpo("direct_grpo", student, train, args.student_grpo_flags)),
        "raw_teacher_warmup": ([], lambda: warmup("raw_teacher_warmup", teacher)),
        "bridge_warmup": (["teacher_rl"], lambda: warmup("bridge_warmup", rl)),
        "raw_teacher": (["raw_teacher_warmup"], lambda: opd("raw_teacher", teacher, at("raw_teacher_warmup"))),
        "bridge": (["teacher_rl", "bridge_warmup"], lambda: opd("bridge", rl, at("bridge_warmup"))),
        "bridge_grpo": (["bridge"], lambda: grpo("bridge_grpo", at("bridge"), heldout, args.stage3_flags)),
        "cold_grpo": ([], lambda: grpo("cold_grpo", student, heldout, args.stage3_flags)),
        "no_warmup": (bridge, lambda: opd("no_warmup", rl, student, updates("bridge_warmup", "bridge"))),
        "no_opd": (bridge, lambda: warmup("no_opd", rl, no_opd())),
        "sft": (bridge, lambda: warmup("sft", rl, f"--loss ce {no_opd()}")),
        "long_grpo": (bridge, lambda: grpo("long_grpo", student, train, long_grpo())),
        "replay": (["bridge", "bridge_grpo"], lambda: opd("replay", rl, at("bridge"), updates("bridge_grpo"))),
        "reward_free": (bridge, lambda: opd("reward_free", teacher, student, reward_free())),
    }


def call(command: str, nproc: int = 1, log: Path | None = None) -> None:
    """Print and run one command, under torchrun for several processes; its exit code, unless 0, is this one's."""
    script, *flags = shlex.split(command)
    launcher = ["torchrun", "--standalone", f"--nproc_per_node={nproc}"] if nproc > 1 else ["python"]
    print(f"\n$ {shlex.join([*launcher, script, *flags])}" + (f"\n  > {log}" if log else ""), flush=True)
    launcher = ["-m", "torch.distributed.run", *launcher[1:]] if nproc > 1 else []
    command = [sys.executable, *launcher, str(Path(__file__).parent / script), *flags]
    with open(log, "a") if log else nullcontext() as output:
        code = subprocess.run(command, stdout=output, stderr=output, preexec_fn=end_with_parent).returncode
    if code:
        last = log.read_text().strip().splitlines()[-1:] if log else []
        print(*last, f"error: {script} ended with exit code {code}; the same bridge.py command continues from here",
              sep="\n", file=sys.stderr)  # fmt: skip
        sys.exit(code)


LIBC = ctypes.CDLL(None)


def end_with_parent() -> None:
    """In a child process: end when bridge.py is killed, so that the next one finds no stage still writing (Linux only)."""
    if sys.platform == "linux":
        LIBC.prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


def execute(folder: Path, done: str, command: Callable[[], str], inputs: list[Path], nproc: int, log: Path | None) -> None:
    """Run what `command()` says; skip it when FOLDER/`done`, the file it writes last, says that it finished.

    Raises UsageError if what is there was made by another command, or before one of the `inputs` (run folders)."""
    typed = shlex.join(["python", *shlex.split(command())])
    record = json.loads((folder / done).read_text()) if (folder / done).exists() else {"finished": False}
    finished = record.get("finished", True)
    made = folder / done if finished else checkpoint.latest(folder)  # a stage that was stopped goes on from its checkpoint
    if made:
        require(record["command"] == typed, f"{folder}: holds `{record['command']}`; delete it, or choose another --out")
        newer = [i for i in inputs if (path := i / "run.json").exists() and path.stat().st_mtime > made.stat().st_mtime]
        require(
            not newer,
            f"{folder}: older than {', '.join(map(str, newer))}, which it was made from; delete it to make it again",
        )
    if finished:
        print(f"# finished before: {typed}", flush=True)
    else:
        call(typed.removeprefix("python "), nproc, log)


def run_all(tasks: dict, jobs: int) -> None:
    """tasks: {name: (names of the tasks it waits for, all before it in the dict, function)}. `jobs` at a time, in order;
    behind a failure none is started, and the first one is raised when those at work have ended."""
    futures, failed = {}, []

    def work(needs, function):
        try:
            if not any(futures[need].exception() for need in needs) and not failed:
                function()
        except BaseException as error:
            failed.append(error)
            raise

    pool = ThreadPoolExecutor(jobs)
    try:
        for name, (needs, function) in tasks.items():
            futures[name] = pool.submit(work, needs, function)
        for future in as_completed(futures.values()):
            future.result()
    finally:
        failed.append(None)  # also when the user interrupts
        pool.shutdown(cancel_futures=True)


def main(args: Args) -> None:
    arms = list(ARMS) if "all" in args.arms else list(args.arms)
    require(set(arms) <= set(ARMS), f"--arms {' '.join(args.arms)}: choose all, or some of {' '.join(ARMS)}")
    require(bool(args.teacher) == bool(args.student), "--teacher and --student go together; give both or neither")
    cli.require_positive(args, "seeds jobs nproc")
    out, q, embedded = Path(args.out), shlex.quote, not args.teacher
    if embedded:
        require(
            (args.train_data, args.benchmarks) == (Args.train_data, Args.benchmarks),
            "--train-data and --benchmarks need --teacher and --student; without them the embedded world has its own",
        )
        toy_settings(args)
        world = f"toy.py --world {args.world} --out {q(args.out)}/world --seed {args.seed} {args.toy_flags}"
        execute(out / "world", "toy.json", lambda: world, [], 1, None)
        train, heldout = f"{out}/world/train.jsonl", f"{out}/world/heldout.jsonl"
    else:
        require(args.world == Args.world, f"--world {args.world} is an embedded one; leave out --teacher and --student")
        train, heldout = split_labels(args)

    # ---- the stages that the arms need, once per seed
    seeds, jobs = range(args.seed, args.seed + args.seeds), args.jobs or 1
    stages = {seed: stages_of(args, seed, train, heldout) for seed in seeds}
    wanted = {stage for arm in arms for stage in ARMS[arm]}
    for stage, (before, _) in reversed(stages[args.seed].items()):
        wanted |= set(before) if stage in wanted else set()
    wanted = [stage for stage in stages[args.seed] if stage in wanted]

    # ---- do teacher and student fit? Asked before the first stage, not after days of teacher RL
    dense = any(stage not in ("teacher_rl", "direct_grpo", "cold_grpo") for stage in wanted)
    if dense and not any(run_folder.finished(out / f"seed{seed}" / stage) for seed in seeds for stage in wanted):
        models = f"--teacher {q(args.teacher)} --student {q(args.student)}"
        flags = f"--train-data {q(train)} --seed {args.seed} {args.opd_flags}{' --force' if args.force else ''}"
        call(f"opd.py --preflight-only {models} {flags}")

    # ---- train, then measure the base models and what every stage made
    tasks, names = {}, [dataset.benchmark_name(benchmark) for benchmark in args.benchmarks]
    for stage in wanted:
        for seed in seeds:
            folder, (before, command) = out / f"seed{seed}", stages[seed][stage]
            log = folder / f"{stage}.log" if jobs > 1 else None
            folder.mkdir(parents=True, exist_ok=True)
            run = partial(execute, folder / stage, "run.json", command, [folder / b for b in before], args.nproc, log)
            tasks[stage, seed] = [(b, seed) for b in before], run
    for stage in ["base", "teacher_base", *wanted]:
        for seed in seeds:
            folder = out / f"seed{seed}"
            model = {"base": args.student, "teacher_base": args.teacher}.get(stage, str(folder / stage))
            command = f"eval_math.py --model {q(model)} --benchmarks {shlex.join(args.benchmarks)} "
            command += f"--out {q(str(folder))}/eval/{stage} --seed {seed} {args.eval_flags}"
            log = folder / f"eval_{stage}.log" if jobs > 1 else None
            folder.mkdir(parents=True, exist_ok=True)
            done = f"{names[-1]}/summary.json"
            run = partial(execute, folder / "eval" / stage, done, lambda c=command: c, [Path(model)], args.nproc, log)
            tasks["eval", stage, seed] = [(stage, seed)] if stage in wanted else [], run
    run_all(tasks, jobs)
    report.write(out, names, list(seeds), {arm: ARMS[arm] for arm in arms}, wanted)


if __name__ == "__main__":
    cli.run(main, Args)
