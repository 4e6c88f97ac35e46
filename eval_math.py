# docs/eval_math.md
"""Measure a checkpoint on math benchmarks: avg@k and pass@k with a bootstrap interval, every generation kept.

Prompt and grader are those of training. Sampling defaults are the paper's: temperature 0.7, top-p 0.8, top-k 20, 16
samples a problem. Killed, the same line goes on where it was. `--compare A B` gives the paired difference of two result
folders instead, `--regrade FOLDER` grades one again.

    python eval_math.py --model ckpt/bridge --benchmarks math500 aime24 aime25 --out results/bridge
    python eval_math.py --model ckpt/bridge --benchmarks problems.jsonl --samples 4
    python eval_math.py --compare results/bridge results/direct_grpo
    python eval_math.py --regrade results/bridge --grader boxed
"""

import math
import time
from dataclasses import dataclass
from math import comb
from pathlib import Path
from typing import Literal

import numpy as np

import common
from infra import cli, dataset, evaluation, models, parallel, preflight, run_folder
from infra.bootstrap import bootstrap_ci95
from infra.cli import require
from infra.prompts import INSTRUCTION, render_all
from infra.reward import make_grader, references, report_ungradable
from infra.samples_page import token_texts


@dataclass
class Args:
    model: str | None = None
    """checkpoint to measure: hub id or local folder of a causal LM with a chat template"""
    benchmarks: tuple[str, ...] = ("math500", "aime24", "aime25")
    """math500, aime24, aime25, gsm8k (from the hub), any hub dataset name:config:split, local .jsonl/.json/.parquet/.csv"""
    out: str | None = None
    """results go to OUT/BENCHMARK/; default: results/ and the last two parts of the model's path"""
    overwrite: bool = False
    """measure again what is there, finished or not; else a finished benchmark is skipped, a killed one continued"""
    compare: tuple[str, str] | None = None
    """two result folders A B: print the paired difference A - B instead of measuring a model"""
    regrade: str | None = None
    """a result folder: grade its saved responses again, with today's grader and --grader, instead of measuring a model"""
    limit: int | None = None
    """only the first so many problems of each benchmark"""
    samples: int = 16
    """responses per problem"""
    temperature: float = 0.7
    """sampling temperature; 0 is greedy"""
    top_p: float = 0.8
    """nucleus sampling; 1: off"""
    top_k: int = 20
    """sample among the k likeliest tokens; 0: off"""
    max_response_tokens: int = 16384
    """longer responses are truncated"""
    rollout_batch_tokens: int = 131072
    """hf sampler's cache: prompt + response tokens summed over the rows of a batch"""
    sampler: Literal["auto", "vllm", "hf"] = "auto"
    """auto is vllm on CUDA where it is installed, else hf"""
    vllm_gpu_memory_utilization: float = 0.9
    """share of the GPU's memory for vLLM's weights and cache"""
    vllm_tp: int = 1
    """GPUs that share vLLM's copy of the weights"""
    instruction: str = INSTRUCTION
    """line added after each problem; "" adds none"""
    thinking: bool = False
    """let the chat template open a thinking block (Qwen3's enable_thinking)"""
    grader: str = "math"
    """math: math-verify on the last box; boxed: string equality of the box's contents, as the authors do; FILE.py:FUNCTION:
    a reward of your own (infra/reward.py)"""
    dtype: Literal["auto", "bfloat16", "float32", "float64"] = "auto"
    """compute dtype; auto is bfloat16 on CUDA, float32 on a CPU"""
    seed: int = 1
    """seed of sampling"""


def pass_at_k(rewards: np.ndarray, k: int) -> float:
    """Unbiased estimate of P(at least one of k samples is right) from n >= k samples: 1 - C(n - c, k) / C(n, k), averaged
    over problems (Chen et al. 2021, arXiv 2107.03374). rewards (P, n) of 0/1."""
    n = rewards.shape[1]
    return float(np.mean([1 - comb(n - int(c), k) / comb(n, k) for c in rewards.sum(1)]))


def figures(rewards: np.ndarray) -> dict:
    """Of rewards (P, samples); pass@k where they are 0 or 1."""
    samples = rewards.shape[1]
    powers = [k for k in (1, 2, 4, 8, 16, 32, 64, 128, 256) if k < samples] + [samples]
    return {
        "accuracy": float(rewards.mean()),  # avg@samples
        "ci95": bootstrap_ci95(rewards.mean(1)),
        "pass_at_k": {str(k): pass_at_k(rewards, k) for k in powers} if np.isin(rewards, (0, 1)).all() else None,
    }


def grade(args: Args, texts: list[str], problems) -> tuple[list[float], dict]:
    """Rewards of the responses, an entry of `problems` for each, and what the grader has counted."""
    with make_grader(args.grader) as grader:
        rewards = grader.grade(texts, references(grader, problems))
        return rewards, {"unparsable": grader.unparsable, "grader_timeouts": grader.timeouts}


def compare(folder_a: str, folder_b: str) -> dict[str, dict]:
    """Paired difference A - B of mean accuracy per benchmark, problems resampled in pairs."""
    a, b = evaluation.find_results(folder_a, "--compare"), evaluation.find_results(folder_b, "--compare")
    if len(a) == len(b) == 1:  # two single benchmarks are compared whatever their folders are called
        b = dict(zip(a, b.values(), strict=True))
    require(a.keys() & b.keys(), f"--compare: {folder_a} and {folder_b} share no benchmark")
    alone = sorted(a.keys() ^ b.keys())
    if alone:
        print(f"--compare: {' '.join(alone)} left out, which only one of them has")
    report = {}
    for name in [name for name in a if name in b]:
        by_a, by_b = [dataset.mean_rewards(str(f / "generations.jsonl"), "--compare") for f in (a[name], b[name])]
        require(
            by_a.keys() == by_b.keys(),
            f"--compare: {name} was measured on different problems; run both with the same --benchmarks and --limit",
        )
        difference = np.array([by_a[problem] - by_b[problem] for problem in by_a])  # (P,)
        report[name] = {
            "difference": float(difference.mean()),
            "ci95": bootstrap_ci95(difference),
            "problems": len(difference),
            "warnings": evaluation.incomparable(a[name], b[name]),
        }
    return report


def print_comparison(folder_a: str, folder_b: str) -> None:
    for name, row in compare(folder_a, folder_b).items():
        for warning in row["warnings"]:
            print(f"warning: {name}: {warning}")
        (low, high), problems = row["ci95"], row["problems"]
        print(f"{name}: {row['difference']:+.4f}  95 % interval [{low:+.4f}, {high:+.4f}]  ({problems} problems, paired)")


def measure(args: Args, sampler, tokenizer, problems, prompts: list[list[int]], result: evaluation.Result) -> None:
    """Sample what a killed process has not sampled yet, grade all, and write the result."""
    name, start, number = result.folder.name, time.time(), {p.key: i for i, p in enumerate(problems)}
    known = {number[key]: responses for key, responses in result.known.items() if key in number}
    with cli.progress_bar(len(prompts) * args.samples, name, "response") as bar:
        bar.update(len(known) * args.samples)
        responses = sampler.sample(
            prompts,
            args.samples,
            seed=(args.seed,),
            progress=bar,
            known=known,
            keep=lambda some: result.keep({problems[i].key: responses for i, responses in some.items()}),
        )
    if parallel.rank():
        return
    texts = tokenizer.batch_decode([r.ids for r in responses], skip_special_tokens=True)
    of_response = [p for p in problems for _ in range(args.samples)]
    rewards, counted = grade(args, texts, of_response)
    rows = evaluation.rows_of(of_response, args.samples, responses, texts, rewards)
    summary = {
        **figures(np.array(rewards).reshape(-1, args.samples)),
        "truncated_frac": float(np.mean([r.truncated for r in responses])),
        "response_length": float(np.mean([len(r.ids) for r in responses])),
        "problems": len(problems),
        "samples": args.samples,
        "out_of_vocab": sum(r.out_of_vocab for r in responses),
        **counted,
        "kept_problems": len(known),
        "seconds": round(time.time() - start, 1),
        "command": run_folder.command_line(),
        "regraded": None,
    }

    def tokens_of(k: int):
        return token_texts(tokenizer, responses[k].ids), [round(-x, 4) for x in responses[k].sampler_logprobs]

    result.finish(rows, summary, tokens_of)
    evaluation.show(result.folder, summary)


def main(args: Args) -> None:
    if args.compare or args.regrade:
        require(not (args.compare and args.regrade), "--compare and --regrade: give one of them")
        if not parallel.rank():
            print_comparison(*args.compare) if args.compare else evaluation.regrade(args, grade, figures)
        return

    # ---- check what was typed, before anything expensive
    require(args.model, "--model: give a checkpoint to measure, or --compare A B, or --regrade FOLDER")
    cli.require_positive(args, "samples limit max_response_tokens rollout_batch_tokens")
    common.choose_sampler(args, training=False)
    names = dataset.benchmark_names(args.benchmarks)
    require(
        0 <= args.temperature < math.inf and 0 < args.top_p <= 1 and args.top_k >= 0,
        "--temperature must be >= 0 and finite, --top-p in (0, 1], --top-k >= 0",
    )
    specs = dict(zip(names, map(dataset.benchmark_spec, args.benchmarks), strict=True))
    labeled = make_grader(args.grader).uses_labels
    whole = {name: dataset.load_problems(spec, "--benchmarks", need_answers=labeled) for name, spec in specs.items()}
    problems = {name: some[: args.limit] for name, some in whole.items()}
    tokenizer = models.load_tokenizer(args.model, "--model")
    device, dtype = models.device_and_dtype(args.dtype)
    args.dtype = str(dtype).removeprefix("torch.")
    prompts = {name: render_all(tokenizer, some, args.instruction, args.thinking) for name, some in problems.items()}
    flat = [ids for some in prompts.values() for ids in some]
    preflight.warn_of_base("--model", args.model, tokenizer, args.thinking, flat)

    # ---- what is measured already is left alone
    out = Path(args.out or evaluation.default_out(args.model))
    results = {name: evaluation.Result(out / name, args, specs[name], whole[name]) for name in names}
    for result in results.values():
        if result.summary:
            evaluation.show(result.folder, result.summary, " finished before; --overwrite measures it again")
    names = [name for name in names if not results[name].summary]
    if not names:
        return
    with make_grader(args.grader) as grader:
        for name in names:
            report_ungradable(grader, problems[name])

    model = None  # vllm reads the checkpoint itself
    if args.sampler == "hf":
        model = models.load_model(args.model, "--model", device, dtype, trainable=False)
    else:
        models.check_checkpoint(args.model, "--model", dtype)
    longest_prompt = max(len(prompt) for name in names for prompt in prompts[name])
    sampling = {"longest_prompt": longest_prompt, "top_p": args.top_p, "top_k": args.top_k}
    sampler = common.make_sampler(args, model, args.model, tokenizer, dtype, **sampling)
    for name in names:
        measure(args, sampler, tokenizer, problems[name], prompts[name], results[name])


if __name__ == "__main__":
    cli.run(main, Args)
