# docs/benchmarks.md
"""Seconds per step of grpo.py and opd.py beside TRL's GRPOTrainer and DistillationTrainer, measured alternately.

The two sides are two processes that take turns of a few seconds; while one runs, the other is stopped, and the step
that a stop cuts in two does not count. Ours is the command a user would type, timed by its own metrics (time/step,
time/rollout); TRL's is a short script below (--side), timed by a callback from step begin to step end. A GRPO step is
one rollout phase, its rewards and all of its optimizer steps.

Equal on both sides: checkpoints, the problems of every step in their order, prompts per step, group size, optimizer
steps per rollout, temperature 1 over the full support, response limit, float32, the attention implementation (sdpa),
threads, fused AdamW with a constant learning rate and weight decay 0.1, clipping of the gradient and of the ratio, the
advantages, the loss (token mean; reverse KL over the full vocabulary), and a reward by string equality of the last
box. On TRL's side logging, saving and evaluation are off, so are gradient checkpointing and bfloat16 (both on by
default there), and its data loader has no workers. The learning rate is so small that neither policy moves: lengths
stay those of the checkpoint.
Not equal: the random draws, so lengths agree on average only (see tokens a step, and seconds per 1,000 response
tokens). TRL leaves the norms out of weight decay, renders and tokenizes its prompts every step, decodes every
completion, sizes its loss tiles for a real vocabulary, and in GRPO computes old log-probabilities of all minibatches
(ours: from the second on). Ours also records sampler log-probabilities, entropies and sampler drift every step. Ours
sorts rows by length into micro-batches under --micro-batch-tokens; TRL takes a minibatch in one pass
(--trl-micro-batch splits it). Ours drops finished rows from the sampling batch, and groups of equal rewards from the
training passes, which is exact, their gradient being 0: a policy that is mostly right or mostly wrong trains on fewer
rows (zero_std_frac). So GRPO is timed with an early and with a late policy.

    python bridge.py && python benchmarks/throughput.py --world runs/demo/world
    python benchmarks/throughput.py --world runs/demo/world --threads 1 --record benchmarks/results/throughput_cpu.md

On a real language model, whose answers to problems of school mathematics are next to never right: a reward that differs
within every group (--grader parity) has both sides train on every response.

    T=runs/real_model/teacher S=runs/real_model/pruned   # made by benchmarks/real_model.py
    python benchmarks/throughput.py --train-data gsm8k_train.jsonl --grader parity --grpo-model $T --teacher $T --student $S
"""

import json
import os
import platform
import re
import shlex
import signal
import statistics
import subprocess
import sys
import tempfile
import textwrap
import time
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Literal

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from infra import cli, dataset, run_folder  # noqa: E402
from infra.cli import require  # noqa: E402


@dataclass
class Args:
    world: str = "runs/demo/world"
    """folder with train.jsonl (problem, answer) and teacher_base/: what bridge.py or toy.py makes"""
    train_data: str | None = None
    """problems with answers; default: WORLD/train.jsonl"""
    grpo_model: tuple[str, ...] = ()
    """policies of the GRPO steps; default: WORLD/teacher_base (early) and the teacher (late)"""
    teacher: str | None = None
    """teacher of the OPD step; default: WORLD/../teacher_rl"""
    student: str | None = None
    """student of the OPD step, one whose answers have a stable length; default: WORLD/../bridge"""
    parts: tuple[Literal["grpo", "opd"], ...] = ("grpo", "opd")
    """what to time"""
    threads: tuple[int, ...] = (1, 2)
    """CPU threads of both sides; everything is timed once for each"""
    rounds: int = 8
    """turns of each side"""
    warmup_steps: int = 2
    """steps of each side before the first turn"""
    grpo_steps: int = 2
    """counted GRPO steps in a turn"""
    opd_steps: int = 8
    """counted OPD steps in a turn"""
    grpo_prompts: int = 32
    """problems per GRPO step"""
    group_size: int = 8
    """responses per problem"""
    minibatch_prompts: int = 16
    """problems per optimizer step of GRPO"""
    opd_prompts: int = 64
    """problems per OPD step"""
    max_response_tokens: int = 64
    """longer responses are truncated"""
    micro_batch_tokens: int = 2048
    """ours: padded tokens per forward-backward pass, rows sorted by length"""
    trl_micro_batch: int = 0
    """TRL's: rows per forward-backward pass, the rest by gradient accumulation; 0: the whole minibatch in one pass"""
    learning_rate: float = 1e-6
    """small, so that both sides keep sampling from the same policy"""
    grader: Literal["boxed", "math", "parity"] = "boxed"
    """our grader; TRL's reward is string equality of the last box, as "boxed" is, or the parity of the response's length"""
    seed: int = 1
    """order of the problems"""
    record: str | None = None
    """Markdown file to write the table to, with the command and the versions"""

    # filled in by this script, for TRL's side
    side: Literal["all", "trl-grpo", "trl-opd"] = "all"
    """all: the whole comparison; the others: one TRL trainer alone"""
    side_out: str = ""
    """file that it writes its steps to, with the metric names of metrics.jsonl"""


# ---------------------------------------------------------------------------------------------- TRL's side
def boxed_reward(completions, answer, **_) -> list[float]:
    """1 if the last box of a completion holds exactly the answer."""
    boxes = [re.findall(r"\\boxed\{([^{}]*)\}", completion[0]["content"]) for completion in completions]
    return [float(bool(box) and box[-1] == a) for box, a in zip(boxes, answer, strict=True)]


def parity(response: str) -> float:
    """1 for a response of an even number of characters: about half of any group."""
    return float(len(response) % 2 == 0)


def parity_reward(completions, **_) -> list[float]:
    return [parity(completion[0]["content"]) for completion in completions]


def trl_side(args: Args) -> None:
    """Run one TRL trainer for warmup + counted steps, and write what each step took."""
    import trl
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

    grpo = args.side == "trl-grpo"
    path = args.grpo_model[0] if grpo else args.student
    prompts_per_step = args.grpo_prompts if grpo else args.opd_prompts
    updates = args.grpo_prompts // args.minibatch_prompts if grpo else 1
    steps = total_steps(args, "grpo" if grpo else "opd")
    rows_per_update = args.minibatch_prompts * args.group_size if grpo else args.opd_prompts
    rows_per_pass = args.trl_micro_batch or rows_per_update
    require(
        rows_per_update % rows_per_pass == 0,
        f"--trl-micro-batch {rows_per_pass} does not divide the {rows_per_update} rows of an optimizer step",
    )

    problems = dataset.load_problems(args.train_data, "--train-data", need_answers=True)
    order = dataset.ProblemStream(len(problems), args.seed).take(steps * prompts_per_step)  # the very order of our scripts
    chosen = [problems[i] for i in order]
    trl_dataset = Dataset.from_list([{"prompt": [{"role": "user", "content": p.text}], "answer": p.answer} for p in chosen])
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)

    scratch = tempfile.TemporaryDirectory()
    shared = dict(
        output_dir=scratch.name, max_steps=steps * updates, max_completion_length=args.max_response_tokens,
        temperature=1.0, top_p=1.0, top_k=0, learning_rate=args.learning_rate, lr_scheduler_type="constant",
        optim="adamw_torch_fused",
        weight_decay=0.1, max_grad_norm=1.0, gradient_accumulation_steps=rows_per_update // rows_per_pass,
        per_device_train_batch_size=rows_per_pass, gradient_checkpointing=False, bf16=False, fp16=False,
        shuffle_dataset=False, chat_template_kwargs={"enable_thinking": False}, dataloader_num_workers=0,
        logging_strategy="no", save_strategy="no", eval_strategy="no", report_to="none", disable_tqdm=True,
        dataloader_pin_memory=False, seed=args.seed,
    )  # fmt: skip
    if grpo:
        config = trl.GRPOConfig(
            generation_batch_size=args.grpo_prompts * args.group_size, num_generations=args.group_size, beta=0.0,
            epsilon=0.2, epsilon_high=0.28, delta=10.0, loss_type="dapo", scale_rewards="group", **shared,
        )  # fmt: skip
        trainer = trl.GRPOTrainer(
            model=model, reward_funcs=parity_reward if args.grader == "parity" else boxed_reward, args=config,
            train_dataset=trl_dataset, processing_class=tokenizer,
        )  # fmt: skip
    else:
        teacher = AutoModelForCausalLM.from_pretrained(args.teacher, dtype=torch.float32)
        config = trl.DistillationConfig(beta=1.0, **shared)  # 1: reverse KL
        trainer = trl.DistillationTrainer(
            model=model, teacher_model=teacher, args=config, train_dataset=trl_dataset, processing_class=tokenizer
        )
        assert {p.dtype for p in trainer.teacher_model.parameters()} == {torch.float32}
    assert {p.dtype for p in trainer.model.parameters()} == {torch.float32}
    assert trainer.model.config._attn_implementation == "sdpa"  # what our scripts load, see `ours_turn`
    assert not trainer.model.is_gradient_checkpointing

    metrics = open(args.side_out, "w")
    row = {}  # of the step that runs, with the names of metrics.jsonl
    keys = {"charts/response_length": "completions/mean_length"}
    keys |= {"charts/zero_std_frac": "frac_reward_zero_std", "charts/reward": "reward"} if grpo else {}

    def timed(function):
        def wrapper(*positional, **named):
            start = time.perf_counter()
            result = function(*positional, **named)
            row["time/rollout"] += time.perf_counter() - start
            return result

        return wrapper

    trainer._generate = timed(trainer._generate)
    if grpo:
        trainer._calculate_rewards = timed(trainer._calculate_rewards)  # our time/rollout holds the grading too

    class Stopwatch(TrainerCallback):
        def on_step_begin(self, config, state, control, **_):
            if state.global_step % updates == 0:
                row.update({"step": state.global_step // updates + 1, "time/step": 0.0, "time/rollout": 0.0})
            self.start = time.perf_counter()

        def on_step_end(self, config, state, control, **_):
            row["time/step"] += time.perf_counter() - self.start
            if state.global_step % updates == 0:
                assert row["time/rollout"] > 0
                row.update({ours: trainer._metrics["train"][theirs][-1] for ours, theirs in keys.items()})
                metrics.write(json.dumps(row) + "\n")
                metrics.flush()

    trainer.add_callback(Stopwatch())
    trainer.train()
    metrics.close()
    scratch.cleanup()


# ---------------------------------------------------------------------------------------------- turns
SIDES = ("ours", "trl")


def total_steps(args: Args, part: str) -> int:
    """Steps of one process: the warm-up, then in every turn one that is cut by the pause and those that count."""
    return args.warmup_steps + args.rounds * (1 + (args.grpo_steps if part == "grpo" else args.opd_steps))


def command_of(args: Args, part: str, policy: str, side: str, out: Path) -> tuple[list[str], Path]:
    """(arguments of python, file that the steps end up in) of one side."""
    if side == "trl":
        fields = ["train_data", "grader", "rounds", "warmup_steps", "grpo_steps", "opd_steps", "grpo_prompts", "group_size",
                  "minibatch_prompts", "opd_prompts", "max_response_tokens", "seed", "trl_micro_batch", "learning_rate",
                  "teacher", "student"]  # fmt: skip
        flags = [text for name in fields for text in (f"--{name.replace('_', '-')}", str(getattr(args, name)))]
        own = ["--side", f"trl-{part}", "--side-out", str(out / "metrics.jsonl"), "--grpo-model", policy]
        return [str(Path(__file__).resolve()), *own, *flags], out / "metrics.jsonl"
    flags = ["--train-data", args.train_data, "--instruction", "", "--max-response-tokens",
             str(args.max_response_tokens), "--learning-rate", str(args.learning_rate), "--max-steps",
             str(total_steps(args, part)), "--micro-batch-tokens", str(args.micro_batch_tokens), "--dtype", "float32",
             "--seed", str(args.seed), "--out", str(out)]  # fmt: skip
    if part == "grpo":
        grader = f"{Path(__file__).resolve()}:parity" if args.grader == "parity" else args.grader
        own = ["--model", policy, "--prompts-per-step", str(args.grpo_prompts), "--group-size", str(args.group_size),
               "--minibatch-prompts", str(args.minibatch_prompts), "--grader", grader]  # fmt: skip
        return [str(ROOT / "grpo.py"), *own, *flags], out / "metrics.jsonl"
    own = ["--teacher", args.teacher, "--student", args.student, "--prompts-per-step", str(args.opd_prompts)]
    return [str(ROOT / "opd.py"), *own, *flags], out / "metrics.jsonl"


def alternate(args: Args, part: str, policy: str, threads: int) -> dict[str, list[list[dict]]]:
    """Both sides live side by side, one of them stopped: {side: a list of counted steps for every turn}."""
    per_turn = 1 + (args.grpo_steps if part == "grpo" else args.opd_steps)
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    processes, files, logs, commands = {}, {}, {}, {}
    turns = {side: [] for side in SIDES}
    with tempfile.TemporaryDirectory() as scratch:

        def run_until(side: str, count: int) -> list[dict]:
            """Let one side run until it has logged `count` steps, then stop it; the steps so far."""
            process, file = processes[side], files[side]
            process.send_signal(signal.SIGCONT)
            while not file.exists() or file.read_bytes().count(b"\n") < count:
                if process.poll():
                    sys.exit(f"error: failed: python {shlex.join(commands[side])}\n{logs[side].read_text()[-3000:]}")
                time.sleep(0.005)
            process.send_signal(signal.SIGSTOP)
            return [json.loads(line) for line in file.read_text().splitlines()]

        try:
            for side in SIDES:
                out, logs[side] = Path(scratch, side), Path(scratch, f"{side}.log")
                out.mkdir()
                commands[side], files[side] = command_of(args, part, policy, side, out)
                with logs[side].open("w") as log:
                    processes[side] = subprocess.Popen(
                        [sys.executable, *commands[side]], env=environment, stdout=log, stderr=log
                    )
                run_until(side, args.warmup_steps)
            for turn in range(args.rounds):
                for side in SIDES:
                    start = args.warmup_steps + turn * per_turn
                    rows = run_until(side, start + per_turn)
                    turns[side].append(rows[start + 1 : start + per_turn])
                seconds = {side: statistics.median(row["time/step"] for row in turns[side][-1]) for side in SIDES}
                print(f"# {threads} threads, {part} {Path(policy).name}, round {turn + 1}: "
                      f"ours {seconds['ours']:.3f} s, TRL {seconds['trl']:.3f} s", flush=True)  # fmt: skip
        finally:
            for process in processes.values():
                process.kill()  # a stopped process too
                process.wait()
    return turns


def measure(args: Args, part: str, policy: str, threads: int) -> dict:
    """Medians over all counted steps, and the spread of the rounds' ratios."""
    turns = alternate(args, part, policy, threads)

    def median(side, key):
        return statistics.median(row[key] for turn in turns[side] for row in turn)

    def mean(side, key):
        return statistics.fmean(row[key] for turn in turns[side] for row in turn if key in row)

    responses = args.grpo_prompts * args.group_size if part == "grpo" else args.opd_prompts
    by_round = [statistics.median(r["time/step"] for r in ours) / statistics.median(r["time/step"] for r in trl)
                for ours, trl in zip(turns["ours"], turns["trl"], strict=True)]  # fmt: skip
    row = {"part": part, "policy": Path(policy).name, "threads": threads, "steps": sum(map(len, turns["ours"]))}
    for side in turns:
        tokens = mean(side, "charts/response_length") * responses
        row[side] = {
            "step": median(side, "time/step"),
            "rollout": median(side, "time/rollout"),
            "tokens_per_step": tokens,
            "per_1000_tokens": mean(side, "time/step") / tokens * 1000,
        }
        if part == "grpo":
            row[side] |= {"zero_std_frac": mean(side, "charts/zero_std_frac"), "reward": mean(side, "charts/reward")}
    for key in ("step", "rollout", "per_1000_tokens"):
        row[f"ratio_{key}"] = row["ours"][key] / row["trl"][key]
    return row | {"ratio_step_rounds": [min(by_round), max(by_round)]}


# ---------------------------------------------------------------------------------------------- report
def table(rows: list[dict]) -> list[str]:
    lines = ["| step | threads | ours, s | TRL, s | ratio (rounds) | rollout: ours, s | TRL, s | ratio "
             "| tokens a step: ours | TRL | s per 1,000 tokens: ours | TRL | ratio | zero_std_frac: ours | TRL |",
             "|---" * 15 + "|"]  # fmt: skip
    for row in rows:
        ours, trl, (low, high) = row["ours"], row["trl"], row["ratio_step_rounds"]
        name = f"GRPO, {row['policy']}" if row["part"] == "grpo" else f"OPD, {row['policy']}"
        zero = [f"{side['zero_std_frac']:.2f}" if "zero_std_frac" in side else "" for side in (ours, trl)]
        cells = [name, row["threads"], f"{ours['step']:.3f}", f"{trl['step']:.3f}",
                 f"**{row['ratio_step']:.2f}** ({low:.2f} to {high:.2f})", f"{ours['rollout']:.3f}",
                 f"{trl['rollout']:.3f}", f"{row['ratio_rollout']:.2f}", f"{ours['tokens_per_step']:.0f}",
                 f"{trl['tokens_per_step']:.0f}", f"{ours['per_1000_tokens']:.4f}", f"{trl['per_1000_tokens']:.4f}",
                 f"{row['ratio_per_1000_tokens']:.2f}", *zero]  # fmt: skip
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return lines


def cpu_name() -> str:
    try:
        lines = subprocess.run(["lscpu"], capture_output=True, text=True).stdout.splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("Model name")]
    return f"{names[0] if names else platform.machine()}, {os.cpu_count()} CPUs"


def write_record(args: Args, rows: list[dict], versions: dict) -> None:
    summary = f"""Medians over {args.rounds} alternating turns of {args.grpo_steps} GRPO or {args.opd_steps} OPD steps,
        after {args.warmup_steps} steps of warm-up. GRPO: {args.grpo_prompts} prompts x {args.group_size} responses,
        {args.grpo_prompts // args.minibatch_prompts} optimizer steps. OPD: {args.opd_prompts} prompts. At most
        {args.max_response_tokens} response tokens; ours in micro-batches of {args.micro_batch_tokens} tokens. A ratio
        below 1 means that ours is faster; in brackets the least and the greatest ratio of one round. Rollout is
        sampling, decoding and, in GRPO, grading."""
    lines = [
        f"# Seconds per step, ours and TRL {versions['trl']}",
        "",
        f"{date.today()}; {cpu_name()}; {', '.join(f'{name} {version}' for name, version in versions.items())}.",
        "",
        "```",
        "python benchmarks/throughput.py " + shlex.join(sys.argv[1:]),
        "```",
        "",
        *textwrap.wrap(" ".join(summary.split()), 120),
        "",
        *table(rows),
        "",
        "What is equal on both sides and what is not:",
        "",
        *["> " + line for line in __doc__.split("\n\n")[2].splitlines()],
    ]
    Path(args.record).parent.mkdir(parents=True, exist_ok=True)
    Path(args.record).write_text("\n".join(lines) + "\n")


def main(args: Args) -> None:
    if args.side != "all":
        trl_side(args)
        return
    runs = Path(args.world).parent
    args.teacher, args.student = args.teacher or str(runs / "teacher_rl"), args.student or str(runs / "bridge")
    own_data, args.train_data = args.train_data, args.train_data or f"{args.world}/train.jsonl"
    policies = args.grpo_model or (f"{args.world}/teacher_base", args.teacher)
    require(run_folder.version("trl"), "this comparison needs TRL: pip install trl==1.16.0")
    require(
        own_data or Path(args.train_data).exists(),
        f"--world {args.world}: has no train.jsonl; run python bridge.py, or python toy.py --out {args.world}",
    )
    require(
        args.grpo_prompts % args.minibatch_prompts == 0,
        f"--minibatch-prompts {args.minibatch_prompts} does not divide --grpo-prompts {args.grpo_prompts}; choose a divisor",
    )
    jobs = [("grpo", policy) for policy in policies] if "grpo" in args.parts else []
    jobs += [("opd", args.student)] if "opd" in args.parts else []
    needed = {policy: "--grpo-model" for part, policy in jobs if part == "grpo"}
    needed |= {args.teacher: "--teacher", args.student: "--student"} if "opd" in args.parts else {}
    for path, flag in needed.items():
        require(Path(path, "config.json").exists(), f"{flag} {path}: no checkpoint there; run python bridge.py, or name one")

    for part, policy in jobs:
        command = command_of(args, part, policy, "ours", Path("OUT"))[0]
        print("$ python " + shlex.join(command).replace(f"{ROOT}/", ""))
    versions = {name: run_folder.version(name) for name in ("torch", "transformers", "trl", "accelerate")}
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that `alternate` ends its two processes
    rows = []
    for threads in args.threads:
        for part, policy in jobs:
            rows.append(measure(args, part, policy, threads))
            if args.record:  # after every row, so that an interrupted run leaves what it measured
                write_record(args, rows, versions)
    print("\n" + "\n".join(table(rows)) + "\n")
    print(json.dumps({"cpu": cpu_name(), "versions": versions, "rows": rows}))


if __name__ == "__main__":
    cli.run(main, Args)
