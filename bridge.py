# docs/bridge.md
"""The whole recipe, stage after stage, as the commands a user would type: each is printed, then run.

    teacher --grpo.py--> RL teacher --fkl_warmup.py--> warmed-up student --opd.py--> bridge --grpo.py--> bridge_grpo

The arms ask where the labels are best spent: `direct_grpo` spends them on the student, `raw_teacher` sends an unrewarded
teacher through the same bridge, `bridge` spends them on the teacher, `bridge_grpo` adds held-out labels behind it; the
others take one thing away or put something else in its place. Run again, it skips what is finished. Without --teacher it
runs on an embedded world of toy.py, on a laptop CPU.

    python bridge.py
    python bridge.py --arms all --seeds 3 --out runs/arithmetic
    python bridge.py --teacher Qwen/Qwen3-8B --student Qwen/Qwen3-1.7B --nproc 8 --train-flags=--gradient-checkpointing
"""

import shlex
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from string import Formatter
from typing import Literal

from infra import budgets, cli, dataset, parallel, pilot, report, run_folder, stages, worlds
from infra.cli import require
from infra.reward import make_grader

# each but the first is a stage, with the labels and the compute of all that it starts from
ARMS = ("base", "direct_grpo", "raw_teacher", "bridge", "bridge_own_prompts", "no_warmup", "no_opd", "sft", "long_grpo",
        "bridge_grpo", "cold_grpo", "replay", "reward_free")  # fmt: skip
STAGES = {  # stage: (script, its model or its teacher and student, its problems, its flags), each behind those it needs
    "teacher_rl": ("grpo.py", "{teacher}", "labeled", "{teacher_grpo_flags}"),
    "direct_grpo": ("grpo.py", "{student}", "labeled", "{student_grpo_flags}"),
    "raw_teacher_warmup": ("fkl_warmup.py", "{teacher} {student}", "prompts", "{warmup_flags}"),
    "bridge_warmup": ("fkl_warmup.py", "{teacher_rl} {student}", "prompts", "{warmup_flags}"),
    "raw_teacher": ("opd.py", "{teacher} {raw_teacher_warmup}", "prompts", "{opd_flags}"),
    "bridge": ("opd.py", "{teacher_rl} {bridge_warmup}", "prompts", "{opd_flags}"),
    "bridge_grpo": ("grpo.py", "{bridge}", "heldout", "{stage3_flags}"),
    "own_prompts_warmup": ("fkl_warmup.py", "{teacher_rl} {student}", "labeled",
                           "{warmup_flags} --rollouts-per-prompt {own_rollouts}"),
    "bridge_own_prompts": ("opd.py", "{teacher_rl} {own_prompts_warmup}", "labeled", "{opd_flags}"),
    # controls: as many updates as the stages they are held against have made, or as many FLOPs
    "cold_grpo": ("grpo.py", "{student}", "heldout", "{stage3_flags}"),
    "no_warmup": ("opd.py", "{teacher_rl} {student}", "prompts", "{opd_flags} --max-steps {bridge_updates}"),
    "no_opd": ("fkl_warmup.py", "{teacher_rl} {student}", "prompts",
               "{warmup_flags} --max-steps {bridge_updates} --rollouts-per-prompt {bridge_rollouts}"),
    "sft": ("fkl_warmup.py", "{teacher_rl} {student}", "prompts",
            "{warmup_flags} --loss ce --max-steps {bridge_updates} --rollouts-per-prompt {bridge_rollouts}"),
    "long_grpo": ("grpo.py", "{student}", "labeled", "{student_grpo_flags} --max-steps 1000000 --max-flops {bridge_flops}"),
    "replay": ("opd.py", "{teacher_rl} {bridge}", "prompts", "{opd_flags} --max-steps {stage3_updates}"),
    # without a teacher's say; that its responses do not end is what it is to show
    "reward_free": ("variants/opd_sampled.py", "{teacher} {student}", "prompts",
                    "{opd_flags} --loss reward_free --stop-truncated-frac 0 --max-steps {bridge_updates}"),
}  # fmt: skip
SCRIPTS = {  # what each flag that holds flags is for
    "teacher_grpo_flags": "grpo.py",
    "student_grpo_flags": "grpo.py",
    "stage3_flags": "grpo.py",
    "warmup_flags": "fkl_warmup.py",
    "opd_flags": "opd.py",
    "eval_flags": "eval_math.py",
    "toy_flags": "toy.py",
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
    """prompts of every fkl_warmup.py and opd.py, whose answers are never read; none: the labeled problems, with --labels
    on an embedded world its unlabeled ones"""
    labels: tuple[int, ...] = ()
    """label budgets: arms without held-out labels once with each, on the first so many labeled problems; none: all, once"""
    benchmarks: tuple[str, ...] = ("math500", "aime24", "aime25")
    """what eval_math.py measures; the first is the one compared and plotted"""
    pilot: bool = False
    """train nothing yet: ask on a few labels whether they should go to the teacher or to the student, into OUT/pilot/"""
    pilot_problems: int = 64
    """labeled problems that are probed, and as many held out; at most half the budget"""
    pilot_samples: int = 16
    """responses to each of them, of either model"""
    pilot_steps: int = 10
    """grpo.py's steps on the teacher; the student gets as many FLOPs"""
    arms: tuple[str, ...] = ("base", "direct_grpo", "raw_teacher", "bridge", "bridge_grpo")
    """all, or some of base direct_grpo raw_teacher bridge no_warmup no_opd sft long_grpo bridge_grpo cold_grpo replay
    reward_free; with prompts that are not the labeled problems bridge_own_prompts too"""
    train_flags: str = ""
    """more flags for every stage that trains, in one string"""
    teacher_grpo_flags: str = ""
    """more flags for grpo.py on the teacher"""
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


def lines_of(path: str) -> int:
    return sum(1 for _ in open(path, encoding="utf-8"))


def total(key: str) -> Callable:
    return lambda data, *runs: sum(run[key] for run in runs)


def seen_as_often(data: dict[str, str], warmup: dict, opd: dict) -> int:
    """Rollouts a prompt, so that as many updates as the two have together see each as often as the warmup did."""
    return warmup["args"]["rollouts_per_prompt"] * -(-(warmup["updates"] + opd["updates"]) // warmup["updates"])


def as_many_in_all(data: dict[str, str], warmup: dict) -> int:
    """Rollouts a labeled problem, as many in all as the warmup has from more prompts."""
    return -(-lines_of(data["prompts"]) * warmup["args"]["rollouts_per_prompt"] // lines_of(data["labeled"]))


FIGURES = {  # what a control's flags take from finished stages: (these, a function of the problem files and their run.json)
    "bridge_updates": (["bridge_warmup", "bridge"], total("updates")),
    "bridge_rollouts": (["bridge_warmup", "bridge"], seen_as_often),
    "own_rollouts": (["bridge_warmup"], as_many_in_all),
    "bridge_flops": (["teacher_rl", "bridge_warmup", "bridge"], total("flops")),
    "stage3_updates": (["bridge_grpo"], total("updates")),
}


def before(stage: str, figures: bool = True) -> list[str]:
    """The stages that a stage starts from, and with `figures` those that its flags take some from."""
    _, models, _, flags = STAGES[stage]
    names = [name for _, name, _, _ in Formatter().parse(models + (flags if figures else "")) if name]
    return [one for name in names for one in FIGURES.get(name, ([name],))[0] if one in STAGES]


def stages_of(arms: list[str], figures: bool = True) -> list[str]:
    """The stages of the arms and those before them, in the order of STAGES."""
    wanted = set(arms)
    for stage in reversed(STAGES):
        wanted |= set(before(stage, figures)) if stage in wanted else set()
    return [stage for stage in STAGES if stage in wanted]


def is_within(arm: str) -> bool:
    """Whether an arm has no more labels than a budget, and runs with each."""
    return all(STAGES[stage][2] != "heldout" for stage in stages_of([arm]))


def command_of(stage: str, args: Args, data: dict[str, str], at: Callable[[str], Path], seed: int) -> str:
    """The command of a stage, once the stages before it are finished; at(stage) is a stage's folder."""
    q = shlex.quote
    script, models, problems, flags = STAGES[stage]
    values = vars(args) | {"teacher": q(args.teacher), "student": q(args.student)} | {one: q(str(at(one))) for one in STAGES}
    for name, (finished, figure) in FIGURES.items():
        if f"{{{name}}}" in flags:
            values[name] = figure(data, *(run_folder.finished(at(one)) for one in finished))
    names = ["--model"] if script == "grpo.py" else ["--teacher", "--student"]
    models = " ".join(f"{name} {model.format_map(values)}" for name, model in zip(names, models.split(), strict=True))
    force = " --force" if args.force and script != "grpo.py" else ""
    where = f"--train-data {q(data[problems])} --out {q(str(at(stage)))} --seed {seed} --resume"
    bound = q(data["heldout" if problems == "heldout" else "labeled"])  # of the label ledger: last, whatever the flags say
    return f"{script} {models} {where} {flags.format_map(values)}{force} --label-split {bound}"


def depends_on_budget(stage: str, unlabeled: bool) -> bool:
    """Whether a stage, or one before it, reads the labeled problems; else one run of it serves all label budgets."""
    return any(STAGES[one][2] in (("labeled",) if unlabeled else ("labeled", "prompts")) for one in stages_of([stage]))


def checked_arms(args: Args, unlabeled: bool) -> list[str]:
    """The arms, all of them spelled out. Raises UsageError for what was typed, before the first stage."""
    require(set(args.arms) <= {*ARMS, "all"}, f"--arms {' '.join(args.arms)}: choose all, or some of {' '.join(ARMS)}")
    arms = [arm for arm in ARMS if unlabeled or arm != "bridge_own_prompts"] if "all" in args.arms else list(args.arms)
    require(unlabeled or "bridge_own_prompts" not in arms, "--arms bridge_own_prompts: needs --unlabeled-data")
    require(bool(args.teacher) == bool(args.student), "--teacher and --student go together; give both or neither")
    typed = (args.train_data, args.benchmarks) != (Args.train_data, Args.benchmarks)
    require(args.teacher or not typed,
            "--train-data and --benchmarks need --teacher and --student; the embedded world has its own")  # fmt: skip
    require(not args.teacher or (args.world == Args.world and not args.toy_flags),
            "--world and --toy-flags are for the embedded worlds: leave out --teacher and --student")  # fmt: skip
    require(all(n > 0 for n in args.labels) and sorted(set(args.labels)) == list(args.labels),
            f"--labels {' '.join(map(str, args.labels))}: give numbers above 0, the smallest first")  # fmt: skip
    require(len(args.labels) < 2 or any(map(is_within, arms)),
            f"--labels: {' '.join(arms)} use held-out labels besides and run with one budget; give one")  # fmt: skip
    require(parallel.world_size() == 1, "--nproc: bridge.py starts the ranks itself; give it and leave out torchrun")
    cli.require_positive(args, "seeds jobs nproc pilot_problems pilot_steps")
    pilot.check(args)
    return arms


def parsed_flags(args: Args, arms: list[str]) -> dict:
    """{flag that holds flags: the Args that its script makes of them}. Raises UsageError for one that a script lacks."""
    for script in {STAGES[stage][0] for stage in stages_of(arms)} - {*SCRIPTS.values()}:
        stages.parsed("opd_flags", script, args.opd_flags)  # a variant has not all of opd.py's
    return {name: stages.parsed(name, script, getattr(args, name)) for name, script in SCRIPTS.items()}


def main(args: Args) -> None:
    args.out = str(Path(args.out))
    out, q, embedded = Path(args.out), shlex.quote, not args.teacher
    unlabeled = bool(args.unlabeled_data or (args.labels and embedded))
    arms = checked_arms(args, unlabeled)
    for name in SCRIPTS.keys() - {"eval_flags", "toy_flags"}:
        setattr(args, name, f"{args.train_flags} {getattr(args, name)}".strip())
    if embedded:
        worlds.fill_in(args)
    typed, names = parsed_flags(args, arms), dataset.benchmark_names(args.benchmarks)

    # ---- problems
    if embedded:
        world = f"toy.py --world {args.world} --out {q(args.out)}/world --seed {args.seed} {args.toy_flags}"
        stages.execute(out / "world", "toy.json", lambda: world, 1, None)
        train, heldout = f"{out}/world/train.jsonl", f"{out}/world/heldout.jsonl"
    else:
        train, heldout = dataset.split_labels(args.train_data, "--train-data", out / "data")
    prompts = args.unlabeled_data or (f"{out}/world/unlabeled.jsonl" if unlabeled else None)
    graded = make_grader(typed["eval_flags"].grader).uses_labels
    data, labeled = budgets.write(args, train, heldout, prompts, graded)
    asked = args.labels or (None,)
    if args.pilot:
        pilot.run(args, labeled[: asked[0]], out / "pilot", args.seed)
        return
    seeds, jobs = range(args.seed, args.seed + args.seeds), args.jobs or 1

    def its_own(stage, budget):  # None where one run serves all budgets
        return budget if depends_on_budget(stage, unlabeled) else None

    def at(stage, seed, budget):
        n = its_own(stage, budget)
        return (out / f"labels{n}" if n else out) / f"seed{seed}" / stage

    # ---- the stages that the arms need; those with held-out labels besides are no part of a budget: once, with the largest
    within = [arm for arm in arms if is_within(arm)]
    wanted, at_each = stages_of(arms), stages_of(within)
    runs = [(s, n, seed) for s in wanted for n in asked for seed in seeds if s in at_each or n == asked[-1]]
    runs = dict.fromkeys((at(s, seed, n), s, seed, its_own(s, n)) for s, n, seed in runs)

    # ---- are there rollouts enough, do teacher and student fit? Asked now, not after days of teacher RL
    dense, warmup = any(STAGES[stage][0] != "grpo.py" for stage in wanted), typed["warmup_flags"]
    count = warmup.rollouts_per_prompt * lines_of(data[asked[0]]["prompts"])
    require(not dense or warmup.rollouts or count >= warmup.rollouts_per_step,
            f"{data[asked[0]]['prompts']}: {count} rollouts for the warmup, and a step takes {warmup.rollouts_per_step}: "
            f"give --unlabeled-data, or --rollouts-per-prompt or --rollouts-per-step in --warmup-flags")  # fmt: skip
    if dense and not any(run_folder.finished(folder) for folder, *_ in runs):
        models = f"--teacher {q(args.teacher)} --student {q(args.student)}"
        flags = f"--train-data {q(train)} --seed {args.seed} {args.opd_flags}{' --force' if args.force else ''}"
        stages.call(f"opd.py --preflight-only {models} {flags}", args.nproc)

    # ---- train, then measure the base models and what every stage made
    tasks = {}
    for folder, stage, seed, budget in runs:
        here = partial(at, seed=seed, budget=budget)
        command = partial(command_of, stage, args, data[budget], here, seed)
        inputs = [here(one) for one in before(stage)]
        log = folder.with_suffix(".log") if jobs > 1 else None
        tasks[folder] = inputs, partial(stages.execute, folder, "run.json", command, args.nproc, log)
    bases = {"base": args.student, "teacher_base": args.teacher}
    measured = [(out / f"seed{seed}" / name, Path(model), seed) for name, model in bases.items() for seed in seeds]
    for folder, model, seed in [*measured, *((folder, folder, seed) for folder, _, seed, _ in runs)]:
        results = folder.parent / "eval" / folder.name
        command = f"eval_math.py --model {q(str(model))} --benchmarks {shlex.join(args.benchmarks)} "
        command += f"--out {q(str(results))} --seed {seed} {args.eval_flags}"
        log = folder.parent / f"eval_{folder.name}.log" if jobs > 1 else None
        run = partial(stages.execute, results, f"{names[-1]}/summary.json", lambda c=command: c, args.nproc, log)
        tasks[results] = [folder] if folder in tasks else [], run
    stages.run_all(tasks, jobs)
    rests_on = {arm: stages_of([arm], figures=False) for arm in arms}
    report.write(out, at, list(asked), names, list(seeds), rests_on, wanted, within)


if __name__ == "__main__":
    cli.run(main, Args)
