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

import os
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from string import Formatter
from typing import Literal

from infra import cli, dataset, report, run_folder, stages
from infra.cli import require

BRIDGE = ["teacher_rl", "bridge_warmup", "bridge"]
ARMS = {  # arm: the stages whose labels and compute it rests on, its own last
    "base": [],
    "direct_grpo": ["direct_grpo"],
    "raw_teacher": ["raw_teacher_warmup", "raw_teacher"],
    "bridge": BRIDGE,
    "no_warmup": ["teacher_rl", "no_warmup"],
    "no_opd": ["teacher_rl", "no_opd"],
    "sft": ["teacher_rl", "sft"],
    "long_grpo": ["long_grpo"],
    "bridge_grpo": [*BRIDGE, "bridge_grpo"],
    "cold_grpo": ["cold_grpo"],
    "replay": [*BRIDGE, "replay"],
    "reward_free": ["reward_free"],
}
STAGES = {  # stage: (script, its model or its teacher and student, its problems, its flags), each behind those it needs
    "teacher_rl": ("grpo.py", "{teacher}", "labeled", "{teacher_grpo_flags}"),
    "direct_grpo": ("grpo.py", "{student}", "labeled", "{student_grpo_flags}"),
    "raw_teacher_warmup": ("fkl_warmup.py", "{teacher} {student}", "prompts", "{warmup_flags}"),
    "bridge_warmup": ("fkl_warmup.py", "{teacher_rl} {student}", "prompts", "{warmup_flags}"),
    "raw_teacher": ("opd.py", "{teacher} {raw_teacher_warmup}", "prompts", "{opd_flags}"),
    "bridge": ("opd.py", "{teacher_rl} {bridge_warmup}", "prompts", "{opd_flags}"),
    "bridge_grpo": ("grpo.py", "{bridge}", "heldout", "{stage3_flags}"),
    # controls: as many updates as the stages they are held against have made, or as many FLOPs
    "cold_grpo": ("grpo.py", "{student}", "heldout", "{stage3_flags}"),
    "no_warmup": ("opd.py", "{teacher_rl} {student}", "prompts", "{opd_flags} --max-steps {bridge_updates}"),
    "no_opd": ("fkl_warmup.py", "{teacher_rl} {student}", "prompts", "{warmup_flags} {bridge_rollouts}"),
    "sft": ("fkl_warmup.py", "{teacher_rl} {student}", "prompts", "{warmup_flags} --loss ce {bridge_rollouts}"),
    "long_grpo": ("grpo.py", "{student}", "labeled", "{student_grpo_flags} --max-steps 1000000 --max-flops {bridge_flops}"),
    "replay": ("opd.py", "{teacher_rl} {bridge}", "prompts", "{opd_flags} --max-steps {stage3_updates}"),
    # without a teacher's say; that its responses do not end is what it is to show
    "reward_free": ("variants/opd_sampled.py", "{teacher} {student}", "prompts",
                    "{opd_flags} --loss reward_free --stop-truncated-frac 0 --max-steps {bridge_updates}"),
}  # fmt: skip
SPENT = {  # what a control's flags take from the run.json of stages that are finished by then
    "bridge_updates": ("updates", ["bridge_warmup", "bridge"]),
    "bridge_rollouts": ("updates", ["bridge_warmup", "bridge"]),
    "bridge_flops": ("flops", BRIDGE),
    "stage3_updates": ("updates", ["bridge_grpo"]),
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
    unlabeled_data: str | None = None
    """prompts of every fkl_warmup.py and opd.py, whose answers are never read; none: the labeled problems"""
    labels: tuple[int, ...] = ()
    """label budgets: every arm once with each, on the first so many labeled problems; none: all of them, once"""
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


def before(stage: str) -> list[str]:
    """The stages that a stage's command names, or takes figures from."""
    _, models, _, flags = STAGES[stage]
    names = [name for _, name, _, _ in Formatter().parse(f"{models} {flags}") if name]
    return [one for name in names for one in SPENT.get(name, (None, [name]))[1] if one in STAGES]


def command_of(stage: str, args: Args, data: dict[str, str], at: Callable[[str], Path], seed: int) -> str:
    """The command of a stage, once the stages before it are finished; at(stage) is a stage's folder."""
    q = shlex.quote
    script, models, problems, flags = STAGES[stage]
    values = vars(args) | {"teacher": q(args.teacher), "student": q(args.student)} | {one: q(str(at(one))) for one in STAGES}
    for name, (key, stages_) in SPENT.items():
        if f"{{{name}}}" in flags:
            values[name] = sum(run_folder.finished(at(one))[key] for one in stages_)
    if "{bridge_rollouts}" in flags:  # so many that each is seen as often as in the warmup
        first, total = run_folder.finished(at("bridge_warmup")), values["bridge_rollouts"]
        rollouts = first["args"]["rollouts_per_prompt"] * -(-total // first["updates"])
        values["bridge_rollouts"] = f"--max-steps {total} --rollouts-per-prompt {rollouts}"
    names = ["--model"] if script == "grpo.py" else ["--teacher", "--student"]
    models = " ".join(f"{name} {model.format_map(values)}" for name, model in zip(names, models.split(), strict=True))
    force = " --force" if args.force and script != "grpo.py" else ""
    where = f"--train-data {q(data[problems])} --out {q(str(at(stage)))} --seed {seed} --resume"
    bound = q(data["heldout" if problems == "heldout" else "labeled"])  # of the label ledger: last, whatever the flags say
    return f"{script} {models} {where} {flags.format_map(values)}{force} --label-split {bound}"


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
        stages.execute(out / "world", "toy.json", lambda: world, 1, None)
        train, heldout = f"{out}/world/train.jsonl", f"{out}/world/heldout.jsonl"
    else:
        require(args.world == Args.world, f"--world {args.world} is an embedded one; leave out --teacher and --student")
        train, heldout = dataset.split_labels(args.train_data, "--train-data", out / "data")
    data = {"labeled": train, "prompts": train, "heldout": heldout}
    seeds, jobs = range(args.seed, args.seed + args.seeds), args.jobs or 1

    def at(stage, seed):
        return out / f"seed{seed}" / stage

    # ---- the stages that the arms need
    wanted = {stage for arm in arms for stage in ARMS[arm]}
    for stage in reversed(STAGES):
        wanted |= set(before(stage)) if stage in wanted else set()
    wanted = [stage for stage in STAGES if stage in wanted]

    # ---- do teacher and student fit? Asked before the first stage, not after days of teacher RL
    dense = any(STAGES[stage][0] != "grpo.py" for stage in wanted)
    if dense and not any(run_folder.finished(at(stage, seed)) for seed in seeds for stage in wanted):
        models = f"--teacher {q(args.teacher)} --student {q(args.student)}"
        flags = f"--train-data {q(train)} --seed {args.seed} {args.opd_flags}{' --force' if args.force else ''}"
        stages.call(f"opd.py --preflight-only {models} {flags}")

    # ---- train, then measure the base models and what every stage made
    tasks, names = {}, [dataset.benchmark_name(benchmark) for benchmark in args.benchmarks]
    for stage in wanted:
        for seed in seeds:
            folder, here = at(stage, seed), partial(at, seed=seed)
            command = partial(command_of, stage, args, data, here, seed)
            log = folder.with_suffix(".log") if jobs > 1 else None
            run = partial(stages.execute, folder, "run.json", command, args.nproc, log)
            tasks[stage, seed] = [(one, seed) for one in before(stage)], run
    for stage in ["base", "teacher_base", *wanted]:
        for seed in seeds:
            model = {"base": args.student, "teacher_base": args.teacher}.get(stage, str(at(stage, seed)))
            folder = at(f"eval/{stage}", seed)
            command = f"eval_math.py --model {q(model)} --benchmarks {shlex.join(args.benchmarks)} "
            command += f"--out {q(str(folder))} --seed {seed} {args.eval_flags}"
            log = at(f"eval_{stage}.log", seed) if jobs > 1 else None
            done = f"{names[-1]}/summary.json"
            run = partial(stages.execute, folder, done, lambda c=command: c, args.nproc, log)
            tasks["eval", stage, seed] = [(stage, seed)] if stage in wanted else [], run
    stages.run_all(tasks, jobs)
    report.write(out, names, list(seeds), {arm: ARMS[arm] for arm in arms}, wanted)


if __name__ == "__main__":
    cli.run(main, Args)
