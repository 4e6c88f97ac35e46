# docs/flags.md
"""What the training loops of grpo.py, fkl_warmup.py and opd.py share: the flags of the plumbing, said once, and the few
functions that all three call. Everything further down is in infra/; the algorithms are in the scripts."""

import importlib.util
import math
import os
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from transformers import AutoConfig

from infra import dataset, parallel
from infra.cli import require, require_positive
from infra.prompts import INSTRUCTION, policy_flag, render_all
from infra.reward import references
from infra.sampler_hf import HFSampler


@dataclass(kw_only=True)
class RunArgs:
    """the run: its folder, what it computes in, what it writes, when it stops"""

    out: str = "ckpt/run"
    """output folder: Hugging Face checkpoint, metrics.jsonl, run.json"""
    seed: int = 1
    """seed of data order and sampling; on one CPU the same command gives bit-identical weights"""
    dtype: Literal["auto", "bfloat16", "float32", "float64"] = "auto"
    """compute dtype; auto is bfloat16 over float32 master weights on CUDA, float32 on a CPU"""
    lora_rank: int = 0
    """train adapters of this rank in all linear layers of the decoder, the weights frozen; 0: train all weights"""
    lora_alpha: float = 32
    """adapters count alpha / rank times, so that one learning rate suits every rank"""
    micro_batch_tokens: int = 16384
    """padded tokens per forward-backward pass; changes memory and speed, not the gradient"""
    gradient_checkpointing: bool = False
    """recompute activations in backward: less memory, about a third more time"""
    hybrid_shard: bool = False
    """with several nodes: shard within each node and replicate across them, not over all ranks"""
    save_every: int = 20
    """write a checkpoint to resume from every so many steps; 0: never"""
    keep_last: int = 1
    """how many of them to keep; all go when the run finishes"""
    resume: bool = False
    """go on from the newest checkpoint in --out, or start if there is none"""
    plan: bool = False
    """print memory per GPU, tokens and FLOPs a step, and whether this command fits; then exit"""
    plan_gpu: str | None = None
    """plan for such GPUs (80GB, 8x80GB) instead of the hardware found"""
    eval_data: str | None = None
    """labeled problems for the learning curve: one response each, sampled as in training"""
    eval_every: int = 0
    """evaluate before training, every so many steps, and at the end; 0: never"""
    grader: str = "math"
    """what marks them, and the samples: math, boxed, or FILE.py:FUNCTION, a reward of your own (infra/reward.py)"""
    sample_every: int = 20
    """write sample responses to samples.jsonl and samples.html every so many steps; 0: never"""
    label_split: str | None = None
    """labeled problems; the run stops before it consults an answer of any other (none: no such bound)"""
    stop_truncated_frac: float = 0.95
    """save and stop once more than this share of the responses is truncated for stop_patience steps; 0: never"""
    stop_patience: int = 10
    """steps in a row that stop_truncated_frac waits for"""
    tensorboard: bool = False
    """also log to TensorBoard (pip install tensorboard)"""
    wandb: bool = False
    """also log to Weights & Biases (pip install wandb)"""


@dataclass(kw_only=True)
class RolloutArgs:
    """from problems to responses: the data, the prompt, the sampler"""

    train_data: str = "open-r1/DAPO-Math-17k-Processed"
    """problems: hub id (name, name:config, name:config:split) or local .jsonl/.json/.parquet/.csv; grpo.py needs answers"""
    prompt_column: str | None = None
    """column of the problem's text or chat; none: problem, question or prompt, the first there is"""
    answer_column: str | None = None
    """column of the reference answer; none: of answer, solution, reward_model.ground_truth the first that a row has"""
    instruction: str = INSTRUCTION
    """line added after each problem; "" adds none"""
    thinking: bool = False
    """let the chat template open a thinking block (Qwen3's enable_thinking); with a teacher, the student's"""
    max_prompt_tokens: int = 2048
    """longer prompts are dropped and counted"""
    max_response_tokens: int = 8192
    """longer responses are truncated"""
    temperature: float = 1.0
    """sampling temperature; the losses see logits scaled by the same"""
    top_p: float = 1.0
    """must stay 1 in training: a cut support biases ratios and divergences"""
    sampler: Literal["auto", "vllm", "hf"] = "auto"
    """auto is vllm on CUDA where it is installed, else hf"""
    rollout_batch_tokens: int = 131072
    """hf sampler's cache: prompt + response tokens summed over the rows of a batch"""
    vllm_gpu_memory_utilization: float | None = None
    """share of the GPU's memory for vLLM's weights and cache; none: what the models leave, as --plan counts it"""
    vllm_tp: int = 1
    """ranks of torchrun on one node that share vLLM's copy of the weights"""
    vllm_sleep: bool = True
    """drop vLLM's weights and cache while the model trains"""
    canary_tolerance: float | None = None
    """stop if a sync leaves vLLM's log-probabilities further from the trainer's; none: 1e-4, in bfloat16 0.12; 0: off"""


def check(args, positive: str) -> None:
    """Raise UsageError for a flag that cannot work: the shared ones, and those named in `positive` if not above 0.
    Replaces `--sampler auto` by what it means here, unless the plan is for other hardware."""
    require(args.top_p == 1, f"--top-p {args.top_p}: training needs the full support; use --top-p 1 (and --temperature)")
    shared = "epochs max_steps learning_rate max_prompt_tokens max_response_tokens temperature rollout_batch_tokens "
    require_positive(args, f"{positive} {shared} micro_batch_tokens keep_last stop_patience")
    require_positive(args, "lora_alpha")
    require(args.lora_rank >= 0, f"--lora-rank {args.lora_rank}: must be 0 (train all weights) or more")
    if args.learning_rate is None:  # ten times as high for LoRA: Schulman et al., "LoRA Without Regret", 2025
        args.learning_rate = 1e-5 if args.lora_rank else 1e-6
    require(0 <= args.stop_truncated_frac <= 1, f"--stop-truncated-frac {args.stop_truncated_frac}: must lie in 0 to 1")
    warmup = args.learning_rate_warmup_steps
    require(warmup >= 0, f"--learning-rate-warmup-steps {warmup}: must be 0 (none) or more")
    require(not args.eval_every or args.eval_data, "--eval-every needs --eval-data")
    if not args.plan and not args.plan_gpu:
        choose_sampler(args)


def choose_sampler(args, training: bool = True) -> None:
    """Replace `--sampler auto` by what it means here. Raises UsageError if the vllm sampler cannot work."""
    installed = importlib.util.find_spec("vllm") is not None
    if args.sampler == "auto":
        args.sampler = "vllm" if torch.cuda.is_available() and installed else "hf"
        if torch.cuda.is_available() and not installed:
            print("--sampler auto: vllm is not installed, so the slower hf samples; pip install -r requirements.txt")
    if args.sampler == "vllm":
        require(installed, "--sampler vllm: vllm is not installed; pip install -r requirements.txt, or use --sampler hf")
        require(args.dtype != "float64", "--dtype float64: vllm does not compute in it; use --sampler hf")
        share = args.vllm_gpu_memory_utilization
        require(share is None or 0 < share < 1, f"--vllm-gpu-memory-utilization {share}: must lie between 0 and 1")
        world = int(os.environ.get("WORLD_SIZE", 1 if training else args.vllm_tp))  # vllm starts what torchrun did not
        require(
            args.vllm_tp >= 1 and world % args.vllm_tp == 0,
            f"--vllm-tp {args.vllm_tp}: must divide the number of ranks, here {world} (torchrun --nproc-per-node)",
        )


def make_sampler(args, model, path, tokenizer, dtype, longest_prompt, **sampling):
    """The sampler that --sampler names, behind choose_sampler. With `model` None the vllm sampler reads the checkpoint
    `path` itself. `longest_prompt`: tokens of the longest one it will get."""
    if args.sampler == "auto":  # left open for --plan-gpu
        choose_sampler(args)
    sampling = {"max_response_tokens": args.max_response_tokens, "temperature": args.temperature} | sampling
    if args.sampler == "hf":
        return HFSampler(model, tokenizer, dtype, batch_tokens=args.rollout_batch_tokens, **sampling)
    limit = AutoConfig.from_pretrained(path).max_position_embeddings
    require(
        longest_prompt + args.max_response_tokens <= limit,
        f"--max-response-tokens {args.max_response_tokens}: with the longest prompt ({longest_prompt} tokens) it exceeds "
        f"the {limit} positions of {path}; lower it, or use --sampler hf",
    )
    from infra.sampler_vllm import VLLMSampler

    return VLLMSampler(
        path,
        tokenizer,
        dtype,
        model,
        longest_prompt=longest_prompt,
        gpu_memory_utilization=args.vllm_gpu_memory_utilization,
        tp=args.vllm_tp,
        sleep=getattr(args, "vllm_sleep", False),
        canary_tolerance=getattr(args, "canary_tolerance", None),
        **sampling,
    )


def count_steps(args, count: int, per_step: int, flag: str) -> int:
    """Steps of a run over `count` problems, `per_step` of them a step, as `flag` says; the last step wraps around. A step
    may be larger than the data, as with few labels: it then passes over the problems again, with fresh samples."""
    if per_step > count:
        print(f"{flag} {per_step}: a step passes over the {count} problems {per_step / count:.1f} times, sampling anew")
    steps, warmup = args.max_steps or -(-args.epochs * count // per_step), args.learning_rate_warmup_steps
    if warmup >= steps:
        print(f"--learning-rate-warmup-steps {warmup}: the run ends with its {steps} steps before the warmup does")
    return steps


def learning_rate(args, step: int, total_steps: int, spent: float = 0.0) -> float:
    """Of a step, counted from 1: a straight line up over --learning-rate-warmup-steps, then --learning-rate, or down from
    it towards 0 with --learning-rate-decay, by steps or by the share `spent` of --max-flops. A resumed run goes on by it."""
    rising = args.learning_rate_warmup_steps
    if step <= rising:
        return args.learning_rate * step / rising
    left = min((total_steps - step + 1) / (total_steps - rising), 1 - spent)  # from 1 to just above 0
    share = {"none": 1, "linear": left, "cosine": (1 - math.cos(math.pi * left)) / 2}
    return args.learning_rate * share[args.learning_rate_decay]


def grade(grader, tokenizer, response_ids: list[list[int]], problems) -> list[float]:
    """Rewards of the responses, an entry of `problems` for each, from the grader of rank 0."""
    texts = tokenizer.batch_decode(response_ids, skip_special_tokens=True)
    return parallel.on_rank_zero(grader.grade, texts, references(grader, problems))


def load_eval(args, tokenizer, trained: list, need_answers: bool):
    """(problems of --eval-data, their prompts); two empty lists without --eval-every. None should be among the `trained`."""
    columns = dataset.columns(args)
    problems = dataset.load_problems(args.eval_data, "--eval-data", need_answers, **columns) if args.eval_every else []
    dataset.warn_of_overlap(trained, problems)
    return problems, render_all(tokenizer, problems, args.instruction, args.thinking, policy_flag(args))


def evaluate(args, step: int, last: bool, sampler, tokenizer, grader, eval_set) -> dict[str, float]:
    """One response to each problem of load_eval's `eval_set`, with the training sampler, if one is due behind this step: a
    learning curve, not a benchmark (that is eval_math.py)."""
    if not args.eval_every or (step % args.eval_every and not last):
        return {}
    problems, prompts = eval_set
    responses = sampler.sample(prompts, 1, seed=(args.seed, step, 1))
    rewards = grade(grader, tokenizer, [r.ids for r in responses], problems)
    lengths = [len(r.ids) for r in responses]
    return {"eval/accuracy": float(np.mean(rewards)), "eval/response_length": float(np.mean(lengths))}
