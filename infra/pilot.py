# docs/pilot.md
"""The pilot of bridge.py: for this teacher and this student, where should the labels go? Asked on a few of them, before
any training, by commands that a user would type.

    kl            one step of opd.py: how far the student's own answers are from the teacher
    eval/*_base   k answers to each of the problems: what a group of answers would teach sparse reward
    *_probe       grpo.py on each model, on the same n labels and with the same FLOPs
    eval/*_probe  what was learned, on n other labeled problems
"""

import json
import shlex
from functools import partial
from math import comb
from pathlib import Path

import numpy as np

from infra import dataset, plan, run_folder, stages
from infra.bootstrap import bootstrap_ci95, problem_weights
from infra.cli import require
from infra.files import write_aside
from infra.models import load_tokenizer
from infra.preflight import KL_WARNING
from infra.prompts import render_all

TEACHER, STUDENT, CLOSE = "teacher first", "student directly", "the two are close"
GROUP = 8  # answers in a group: grpo.py's --group-size
FEWEST = 16  # problems: of fewer an interval says "more" too often, of 8 in one case of ten where there is no difference
ON = " --train-data {probe} --out {out} --seed {seed} --resume "
LAST = " --eval-every 0 --label-split {probe}"  # no other label, whatever the flags say
GRPO = " --learning-rate-decay none" + LAST  # the beginning of a long run, not a whole short one
PLAIN = " --temperature 1 --top-p 1 --top-k 0"  # as GRPO samples unless its flags say otherwise
MEASURE = " --out {out} --seed {seed} {eval_flags} --samples {samples} --limit {problems}" + PLAIN
COMMANDS = {  # each behind those it needs
    "kl": "opd.py --teacher {teacher} --student {student}" + ON + "{opd_flags} --prompts-per-step {problems} --max-steps 1"
          + LAST + "{force}",
    "eval/teacher_base": "eval_math.py --model {teacher} --benchmarks {probe} {heldout}" + MEASURE,
    "eval/student_base": "eval_math.py --model {student} --benchmarks {probe} {heldout}" + MEASURE,
    "teacher_probe": "grpo.py --model {teacher}" + ON + "{teacher_grpo_flags} --max-steps {steps}" + GRPO,
    "student_probe": "grpo.py --model {student}" + ON + "{student_grpo_flags} --max-steps 1000000 --max-flops {flops}"
                     + GRPO,
    "eval/teacher_probe": "eval_math.py --model {teacher_probe} --benchmarks {heldout}" + MEASURE,
    "eval/student_probe": "eval_math.py --model {student_probe} --benchmarks {heldout}" + MEASURE,
}  # fmt: skip
NEEDS = {"kl": [], "eval/teacher_probe": ["teacher_probe"], "eval/student_probe": ["student_probe"]}
NEEDS["student_probe"] = ["teacher_probe"]  # whose FLOPs it gets; the others wait for kl, which checks that the two fit


def check(args) -> None:
    """Raises UsageError for flags of bridge.py that no pilot can go by."""
    require(args.pilot_samples >= GROUP, f"--pilot-samples {args.pilot_samples}: give {GROUP}, a group, or more")
    require(not args.pilot or (len(args.labels) < 2 and args.seeds == 1), "--pilot: one budget and one seed at a time")


def run(args, labeled: list[dataset.Problem], folder: Path, seed: int) -> dict:
    """The pilot for a budget of the `labeled` problems; what stands in FOLDER/pilot.json.

    args: bridge.py's. The first n problems, --pilot-problems of them or half the budget, are probed, the next n are held
    out. Raises UsageError for a budget of one label, and where `folder` holds another pilot."""
    n = min(args.pilot_problems, len(labeled) // 2)
    require(n > 0, f"--pilot: a budget of {len(labeled)} label has none to hold out; give two or more")
    files = {"probe": labeled[:n], "heldout": labeled[n : 2 * n]}
    files = {name: dataset.write_problems(folder / f"{name}.jsonl", some, f"{n} problems") for name, some in files.items()}
    print(f"pilot: {n} labeled problems to probe, the next {n} held out, of a budget of {len(labeled)}", flush=True)
    tasks, jobs = {}, args.jobs or 1
    for name in COMMANDS:
        out, done = folder / name, "heldout/summary.json" if name.startswith("eval/") else "run.json"
        log = out.with_suffix(".log") if jobs > 1 else None
        command = partial(command_of, name, args, files, folder, n, seed)
        tasks[name] = NEEDS.get(name, ["kl"]), partial(stages.execute, out, done, command, args.nproc, log)
    stages.run_all(tasks, jobs)
    for weights in (folder / "kl").glob("*.safetensors"):
        weights.unlink()  # of the one step; its first row of metrics.jsonl was all that was asked

    record = read(args, folder, len(labeled))
    text = markdown(record)
    write_aside(folder / "pilot.json", json.dumps(record, indent=2))
    (folder / "pilot.md").write_text(f"# Pilot\n\n{text}\n", encoding="utf-8")
    print(f"\n{text}\n\nwrote {folder}/pilot.json and pilot.md", flush=True)
    return record


def command_of(name: str, args, files: dict[str, str], folder: Path, problems: int, seed: int) -> str:
    """One of the COMMANDS, once those it needs are finished."""
    q = shlex.quote
    values = vars(args) | {key: q(path) for key, path in files.items()} | {"out": q(str(folder / name))}
    values |= {key: q(str(folder / key)) for key in ("teacher_probe", "student_probe")}
    values |= {"teacher": q(args.teacher), "student": q(args.student), "force": " --force" if args.force else ""}
    values |= {"problems": problems, "samples": args.pilot_samples, "steps": args.pilot_steps, "seed": seed}
    if name == "student_probe":
        values["flops"] = run_folder.finished(folder / "teacher_probe")["flops"]
    return COMMANDS[name].format_map(values)


def read(args, folder: Path, budget: int) -> dict:
    """pilot.json, from the folders of the COMMANDS."""
    distance = json.loads((folder / "kl/metrics.jsonl").read_text(encoding="utf-8").splitlines()[0])
    flops = run_folder.finished(folder / "kl")["flops"]
    labels, models, probe, signals, after = set(), {}, {}, {}, {}
    for role in ("teacher", "student"):
        base, trained = folder / f"eval/{role}_base", folder / f"{role}_probe"
        run, ledger = run_folder.finished(trained), json.loads((trained / "labels.json").read_text(encoding="utf-8"))
        results = {"probe": base / "probe", "before": base / "heldout", "after": folder / f"eval/{role}_probe/heldout"}
        rewards = {name: rewards_of(one) for name, one in results.items()}
        costs = {name: flops_of_response(getattr(args, role), f"--{role}", folder, one) for name, one in results.items()}
        labels |= {*ledger, *(problem for one in rewards.values() for problem in one)}
        right, before, after[role] = (np.array(list(one.values())) for one in rewards.values())  # (n, k) each, in one order
        flops += run["flops"] + sum(costs.values()) * right.size

        mixed = mixed_share(right)  # (n,)
        signals[role] = signals_per_pflop(problem_weights(len(mixed), 10_000) @ mixed, costs["probe"])  # (draws,)
        models[role] = {
            "pass_at_1": float(right.mean()),
            "pass_at_k": float(right.any(1).mean()),
            "mixed_groups": float(mixed.mean()),
            "signals_per_1000_samples": float(1000 / GROUP * mixed.mean()),
            "signals_per_pflop": float(signals_per_pflop(mixed.mean(), costs["probe"])),
        }
        probe[role] = {"updates": run["updates"], "flops": run["flops"], "labels_used": len(ledger)}
        for name, values in (("before", before), ("after", after[role]), ("gain", after[role] - before)):
            probe[role] |= {name: float(values.mean()), f"{name}_ci95": bootstrap_ci95(values.mean(1))}

    difference = (after["teacher"] - after["student"]).mean(1)  # (n,)
    ci95 = bootstrap_ci95(difference)
    cheap = np.percentile(signals["teacher"] - signals["student"], [2.5, 97.5])
    rules = {"probe": recommend(ci95, distance["losses/reverse_kl"]), "cheap": recommend(cheap)}
    if len(right) < FEWEST:
        rules = dict.fromkeys(rules, CLOSE)
    record = {
        "recommendation": rules["probe"],
        "rules": rules,
        "budget": budget,
        "problems": len(right),
        "samples": right.shape[1],
        "group_size": GROUP,
        "labels_used": len(labels),
        "flops": round(flops),
        "models": models,
        "reverse_kl": distance["losses/reverse_kl"],
        "topk_overlap": distance["debug/topk_overlap"],
        "probe": probe,
        "difference": float(difference.mean()),
        "ci95": ci95,
    }
    return record | {"doubts": doubts(record)}


def rewards_of(folder: Path) -> dict[str, list[float]]:
    """{problem: rewards of its k responses} of a benchmark that eval_math.py has measured."""
    found = {}
    for row in dataset.load_rows(str(folder / "generations.jsonl"), "--pilot"):
        found.setdefault(row["problem"], []).append(float(row["reward"]))
    return found


def mixed_share(right: np.ndarray) -> np.ndarray:
    """By problem the probability that a group of GROUP of its k responses, drawn without replacement, has more than one
    reward: 1 - sum of C(c, G) / C(k, G) over the rewards that c of them have; only such a group has a gradient.
    right (n, k) of rewards -> (n,)"""
    counts = [np.unique(row, return_counts=True)[1] for row in right]
    return np.array([1 - sum(comb(int(c), GROUP) for c in row) / comb(right.shape[1], GROUP) for row in counts])


def flops_of_response(model: str, flag: str, folder: Path, results: Path) -> float:
    """To sample one of the responses in `results`: 2 a parameter and token of prompt and response, as run.json counts."""
    summary = json.loads((results / "summary.json").read_text(encoding="utf-8"))
    problems = dataset.load_problems(str(folder / f"{results.name}.jsonl"), "--pilot", need_answers=True)
    prompting = summary["args"]["instruction"], summary["args"]["thinking"], flag
    prompts = render_all(load_tokenizer(model, flag), problems, *prompting)
    return 2 * plan.Sizes.read(model, flag).params * float(np.mean([len(p) for p in prompts]) + summary["response_length"])


def signals_per_pflop(mixed, response: float):
    """Mixed groups in 1e15 FLOPs of GRPO, of which a share `mixed` of the groups are: responses are sampled, those of a
    mixed group pass forward and backward, at three times that."""
    return mixed * 1e15 / (GROUP * response * (1 + 3 * mixed))


def recommend(ci95: list[float], reverse_kl: float = 0.0) -> str:
    """The rule: ci95 of teacher minus student, of what is to decide; reverse_kl in nats a token."""
    if ci95[1] < 0:
        return STUDENT
    return TEACHER if ci95[0] > 0 and reverse_kl <= KL_WARNING else CLOSE


def doubts(record: dict) -> list[str]:
    """What may make the recommendation wrong, as far as the pilot itself can see it."""
    found, (teacher, student), rule = [], record["probe"].values(), record["recommendation"]
    if record["ci95"][0] > 0 and record["reverse_kl"] > KL_WARNING:
        found.append(
            f"the probed teacher is ahead, but KL(student || teacher) is above {KL_WARNING:g} nats a token: whether that "
            f"can be handed down is open until fkl_warmup.py has brought the student near it"
        )
    if rule != CLOSE and record["difference"] * (teacher["gain"] - student["gain"]) < 0:
        ahead, behind = ("teacher", "student") if rule == TEACHER else ("student", "teacher")
        found.append(f"the {ahead} is ahead, but the {behind} has gained more and may pass it later; raise --pilot-steps")
    if record["problems"] < FEWEST:
        found.append(f"{record['problems']} held-out problems decide nothing; {FEWEST}, of {2 * FEWEST} labels, may")
    if record["budget"] // 2 > record["problems"]:
        found.append(
            f"the probe saw {record['problems']} labels of a budget of {record['budget']}: more labels help the one "
            f"that learns less from few; raise --pilot-problems, up to half the budget"
        )
    return found


def markdown(record: dict) -> str:
    """The table and what follows from it. record: pilot.json"""
    k, probe = record["samples"], record["probe"]

    def line(name, table, key, form, ci95=False):
        cells = [form.format(one[key]) + (" [{:.3f}, {:.3f}]".format(*one[f"{key}_ci95"]) if ci95 else "")
                 for one in table.values()]  # fmt: skip
        return f"| {name} | {' | '.join(cells)} |"

    lines = [
        "| | teacher | student |",
        "|---|---|---|",
        line("pass@1", record["models"], "pass_at_1", "{:.3f}"),
        line(f"pass@{k}", record["models"], "pass_at_k", "{:.3f}"),
        line(f"groups of {GROUP} with both outcomes", record["models"], "mixed_groups", "{:.3f}"),
        line("such groups in 1,000 samples", record["models"], "signals_per_1000_samples", "{:.1f}"),
        line("such groups in a PFLOP", record["models"], "signals_per_pflop", "{:.3g}"),
        line("probe: updates", probe, "updates", "{}"),
        line("probe: FLOPs", probe, "flops", "{:.2e}"),
        line("held-out problems, before", probe, "before", "{:.3f}", ci95=True),
        line("held-out problems, after", probe, "after", "{:.3f}", ci95=True),
        line("gain", probe, "gain", "{:+.3f}", ci95=True),
    ]
    difference = "{:+.3f} [{:+.3f}, {:+.3f}]".format(record["difference"], *record["ci95"])
    used = f"{record['labels_used']} of {record['budget']} labels, {record['flops']:.1e} FLOPs"
    lines += [
        "",
        f"Teacher minus student after the probe: {difference}, 95 % interval, paired by problem. On the student's own "
        f"answers KL(student || teacher) is {record['reverse_kl']:.3f} nats a token and the top tokens overlap by "
        f"{record['topk_overlap']:.2f}. Used: {used}.",
        "",
        f"Recommendation: **{record['recommendation']}**. By the groups in a PFLOP alone: {record['rules']['cheap']}.",
    ]
    return "\n".join([*lines, *(f"\nDoubt: {doubt}." for doubt in record["doubts"])])
