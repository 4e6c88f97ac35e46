# docs/eval_math.md
"""Measure a checkpoint on math benchmarks: avg@k and pass@k with a bootstrap interval, every generation kept.

Prompt and grader are those of training. Sampling defaults are the paper's: temperature 0.7, top-p 0.8, top-k 20, 16
samples a problem. `--compare A B` gives the paired difference of two result folders instead.

    python eval_math.py --model ckpt/bridge --benchmarks math500 aime24 aime25 --out results/bridge
    python eval_math.py --model ckpt/bridge --benchmarks problems.jsonl --samples 4
    python eval_math.py --compare results/bridge results/direct_grpo
"""

import json
import time
from dataclasses import asdict, dataclass
from math import comb
from pathlib import Path
from typing import Literal

import numpy as np

import common
from infra import cli, dataset, models, parallel, preflight, run_folder
from infra.bootstrap import bootstrap_ci95
from infra.cli import require
from infra.grader import Grader

HUB = {
    "math500": "HuggingFaceH4/MATH-500:default:test",
    "aime24": "HuggingFaceH4/aime_2024:default:train",
    "aime25": "math-ai/aime25:default:test",
    "gsm8k": "openai/gsm8k:main:test",
}


@dataclass
class Args:
    model: str | None = None
    """checkpoint to measure: hub id or local folder of a causal LM with a chat template"""
    benchmarks: tuple[str, ...] = ("math500", "aime24", "aime25")
    """math500, aime24, aime25, gsm8k (from the hub), any hub dataset name:config:split, or local .jsonl/.parquet files"""
    out: str | None = None
    """results go to OUT/BENCHMARK/; default: results/ and the model's name"""
    compare: tuple[str, str] | None = None
    """two result folders A B: print the paired difference A - B instead of measuring a model"""
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
    instruction: str = dataset.INSTRUCTION
    """line added after each problem; "" adds none"""
    thinking: bool = False
    """let the chat template open a thinking block (Qwen3's enable_thinking)"""
    grader: Literal["math", "boxed"] = "math"
    """math: math-verify on the last box; boxed: string equality of the box's contents, as the authors do"""
    dtype: Literal["auto", "bfloat16", "float32", "float64"] = "auto"
    """compute dtype; auto is bfloat16 on CUDA, float32 on a CPU"""
    seed: int = 1
    """seed of sampling"""


def pass_at_k(rewards: np.ndarray, k: int) -> float:
    """Unbiased estimate of P(at least one of k samples is right) from n >= k samples: 1 - C(n - c, k) / C(n, k), averaged
    over problems (Chen et al. 2021, arXiv 2107.03374). rewards (P, n) of 0/1."""
    n = rewards.shape[1]
    return float(np.mean([1 - comb(n - int(c), k) / comb(n, k) for c in rewards.sum(1)]))


def read_results(folder: str) -> dict[str, dict[str, float]]:
    """{benchmark: {problem: mean reward}} of a result folder, which is one benchmark's or holds several."""
    paths = sorted([*Path(folder).glob("generations.jsonl"), *Path(folder).glob("*/generations.jsonl")])
    results = {path.parent.name: dataset.mean_rewards(str(path), "--compare") for path in paths}
    require(results, f"--compare {folder}: no generations.jsonl there; give a folder that eval_math.py wrote")
    return results


def compare(folder_a: str, folder_b: str) -> dict[str, dict]:
    """Paired difference A - B of mean accuracy per benchmark, problems resampled in pairs."""
    a, b = read_results(folder_a), read_results(folder_b)
    if len(a) == len(b) == 1:  # two single benchmarks are compared whatever their folders are called
        b = dict(zip(a, b.values(), strict=True))
    shared = [name for name in a if name in b]
    require(shared, f"--compare: {folder_a} and {folder_b} share no benchmark")
    report = {}
    for name in shared:
        require(
            a[name].keys() == b[name].keys(),
            f"--compare: {name} was measured on different problems; run both with the same --benchmarks and --limit",
        )
        difference = np.array([a[name][problem] - b[name][problem] for problem in a[name]])  # (P,)
        report[name] = {
            "difference": float(difference.mean()),
            "ci95": bootstrap_ci95(difference),
            "problems": len(difference),
        }
    return report


def main(args: Args) -> None:
    if args.compare:
        for name, row in compare(*args.compare).items():
            print(
                f"{name}: {row['difference']:+.4f}  95 % interval [{row['ci95'][0]:+.4f}, {row['ci95'][1]:+.4f}]  "
                f"({row['problems']} problems, paired)"
            )
        return

    # ---- check what was typed, before anything expensive
    require(args.model, "--model: give a checkpoint to measure, or --compare A B")
    cli.require_positive(args, "samples limit max_response_tokens rollout_batch_tokens")
    common.choose_sampler(args, training=False)
    names = [dataset.benchmark_name(benchmark) for benchmark in args.benchmarks]
    require(len(set(names)) == len(names), f"--benchmarks: {' '.join(names)} would share a result folder; rename a file")
    require(
        args.temperature >= 0 and 0 < args.top_p <= 1 and args.top_k >= 0,
        "--temperature must be >= 0, --top-p in (0, 1], --top-k >= 0",
    )
    benchmarks = {}
    for name in args.benchmarks:
        benchmarks[dataset.benchmark_name(name)] = dataset.load_problems(
            HUB.get(name, name), "--benchmarks", need_answers=True
        )[: args.limit]
    out = run_folder.make_out(args.out or Path("results") / Path(args.model).name)
    tokenizer = models.load_tokenizer(args.model, "--model")
    preflight.warn_of_base("--model", args.model, tokenizer, args.thinking)
    device, dtype = models.device_and_dtype(args.dtype)
    model = None  # vllm reads the checkpoint itself
    if args.sampler == "hf":
        model = models.load_model(args.model, "--model", device, dtype, trainable=False)
    else:
        models.check_checkpoint(args.model, "--model", dtype)
    rendered = {
        name: [dataset.render_prompt(tokenizer, p, args.instruction, args.thinking) for p in problems]
        for name, problems in benchmarks.items()
    }
    sampler = common.make_sampler(
        args,
        model,
        args.model,
        tokenizer,
        dtype,
        longest_prompt=max(len(prompt) for prompts in rendered.values() for prompt in prompts),
        top_p=args.top_p,
        top_k=args.top_k,
    )

    for name, problems in benchmarks.items():
        start = time.time()
        prompts = rendered[name]
        with cli.progress_bar(len(prompts) * args.samples, name, "response") as bar:
            responses = sampler.sample(prompts, args.samples, seed=(args.seed,), progress=bar)
        with Grader(args.grader) as grader:
            of_response = [p for p in problems for _ in range(args.samples)]
            rewards = common.grade(grader, tokenizer, [r.ids for r in responses], of_response)
        if parallel.rank():
            continue
        by_problem = np.array(rewards).reshape(-1, args.samples)  # (P, samples)
        powers = [k for k in (1, 2, 4, 8, 16, 32, 64, 128, 256) if k < args.samples] + [args.samples]
        summary = {
            "accuracy": float(by_problem.mean()),  # avg@samples
            "ci95": bootstrap_ci95(by_problem.mean(1)),
            "pass_at_k": {k: pass_at_k(by_problem, k) for k in powers},
            "truncated_frac": float(np.mean([r.truncated for r in responses])),
            "response_length": float(np.mean([len(r.ids) for r in responses])),
            "problems": len(problems),
            "samples": args.samples,
            "out_of_vocab": sum(r.out_of_vocab for r in responses),
            "unparsable": grader.unparsable,
            "grader_timeouts": grader.timeouts,
            "seconds": round(time.time() - start, 1),
            "command": run_folder.command_line(),
            "args": asdict(args),
        }
        (out / name).mkdir(parents=True, exist_ok=True)
        with (out / name / "generations.jsonl").open("w") as file:
            for k, (response, reward) in enumerate(zip(responses, rewards, strict=True)):
                problem = problems[k // args.samples]
                file.write(
                    json.dumps(
                        {
                            "problem": problem.text,
                            "answer": problem.answer,
                            "sample": k % args.samples,
                            "reward": reward,
                            "length": len(response.ids),
                            "truncated": response.truncated,
                            "response": tokenizer.decode(response.ids, skip_special_tokens=True),
                        }
                    )
                    + "\n"
                )
        (out / name / "summary.json").write_text(json.dumps(summary, indent=2))
        low, high = summary["ci95"]
        print(
            f"{name}: accuracy {summary['accuracy']:.4f}  95 % interval [{low:.4f}, {high:.4f}]  "
            f"pass@{args.samples} {summary['pass_at_k'][args.samples]:.4f}  {len(problems)} problems x {args.samples}  "
            f"length {summary['response_length']:.0f}  truncated {summary['truncated_frac']:.3f}  -> {out / name}/"
        )


if __name__ == "__main__":
    cli.run(main, Args)
