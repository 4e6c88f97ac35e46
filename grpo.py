# docs/grpo.md
"""Group relative policy optimisation (GRPO) with a sparse verifiable reward: stage 1 of the recipe, on the teacher, and
the optional stage 3, on the bridged student.

Each step samples a group of responses per problem, rewards each with 1 if its last \\boxed{} holds the reference
answer and 0 otherwise, normalises rewards within the group to advantages, and takes clipped policy-gradient steps with
one global token mean. Deviations from the paper: math-verify grades by default (`--grader boxed` is the authors' string
equality), and the optional KL term is the full-vocabulary one, not a sampled estimate.

    python grpo.py --model Qwen/Qwen3-8B --out ckpt/8b_rl
    python grpo.py --model Qwen/Qwen3-1.7B --train-data openai/gsm8k:main --eval-data openai/gsm8k:main:test --eval-every 20
"""

import time
from dataclasses import dataclass
from typing import Literal

import torch

import common
import dataset
import parallel
import plan
import run_folder
import telemetry
from common import require
from kernels import TeacherHead, fused_linear_divergence, fused_linear_logprob
from samples_page import RESPONSES, Samples


@dataclass
class Args:
    # experiment
    model: str
    """policy to train: hub id or local folder of a causal LM with a chat template"""
    out: str = "ckpt/grpo"
    """output folder: Hugging Face checkpoint, metrics.jsonl, run.json"""
    train_data: str = "open-r1/DAPO-Math-17k-Processed"
    """labeled problems: hub id (name, name:config, name:config:split) or local .jsonl/.parquet"""
    label_split: str | None = None
    """labeled problems; the run stops before it consults an answer of any other (none: no such bound)"""
    eval_data: str | None = None
    """labeled problems for the learning curve: one response each, sampled as in training"""
    eval_every: int = 0
    """evaluate before training, every so many steps, and at the end; 0: never"""
    seed: int = 1
    """seed of data order and sampling; on one CPU the same command gives bit-identical weights"""
    dtype: Literal["auto", "bfloat16", "float32", "float64"] = "auto"
    """compute dtype; auto is bfloat16 over float32 master weights on CUDA, float32 on a CPU"""
    save_every: int = 20
    """write a checkpoint to resume from every so many steps; 0: never"""
    keep_last: int = 1
    """how many of them to keep; all go when the run finishes"""
    resume: bool = False
    """go on from the newest checkpoint in --out, or start if there is none"""
    hybrid_shard: bool = False
    """with several nodes: shard within each node and replicate across them, not over all ranks"""
    plan: bool = False
    """print memory per GPU, tokens and FLOPs a step, and whether this command fits; then exit"""
    plan_gpu: str | None = None
    """plan for such GPUs (80GB, 8x80GB) instead of the hardware found"""
    sample_every: int = 20
    """write sample responses with reward and logprobs to samples.jsonl and samples.html every so many steps; 0: never"""
    tensorboard: bool = False
    """also log to TensorBoard (pip install tensorboard)"""
    wandb: bool = False
    """also log to Weights & Biases (pip install wandb)"""

    # prompt and reward
    instruction: str = dataset.INSTRUCTION
    """line added after each problem; "" adds none"""
    thinking: bool = False
    """let the chat template open a thinking block (Qwen3's enable_thinking)"""
    max_prompt_tokens: int = 2048
    """longer prompts are dropped and counted"""
    grader: Literal["math", "boxed"] = "math"
    """math: math-verify on the last box; boxed: string equality of the box's contents, as the authors do"""

    # rollout
    prompts_per_step: int = 512
    """problems sampled per step"""
    group_size: int = 8
    """responses per problem"""
    max_response_tokens: int = 8192
    """longer responses are truncated"""
    temperature: float = 1.0
    """sampling temperature; the loss sees logits scaled by the same"""
    top_p: float = 1.0
    """must stay 1 in training: a cut support biases the ratio"""
    dynamic_sampling: int = 0
    """DAPO: up to so many further draws to replace groups whose rewards are all equal; 0: off"""
    rollout_batch_tokens: int = 131072
    """hf sampler's cache: prompt + response tokens summed over the rows of a batch"""
    sampler: Literal["auto", "vllm", "hf"] = "auto"
    """auto is vllm on CUDA where it is installed, else hf"""
    vllm_gpu_memory_utilization: float = 0.3
    """share of the GPU's memory for vLLM's weights and cache"""
    vllm_tp: int = 1
    """ranks of torchrun on one node that share vLLM's copy of the weights"""
    vllm_sleep: bool = False
    """drop vLLM's weights and cache while the model trains"""
    canary_tolerance: float | None = None
    """stop if a sync leaves vLLM's log-probabilities further from the trainer's; none: 1e-4, in bfloat16 0.2; 0: off"""

    # optimisation
    epochs: int = 15
    """passes over the problems"""
    max_steps: int | None = None
    """stop after so many steps instead"""
    max_flops: float | None = None
    """stop behind the step that brings the FLOPs to this, as run.json counts them"""
    minibatch_prompts: int = 128
    """problems per optimizer step; divides prompts_per_step"""
    micro_batch_tokens: int = 16384
    """padded tokens per forward-backward pass; changes memory and speed, not the gradient"""
    learning_rate: float = 1e-6
    """AdamW, constant"""
    weight_decay: float = 0.1
    """AdamW's decoupled weight decay"""
    max_grad_norm: float = 1.0
    """gradient clipping"""
    gradient_checkpointing: bool = False
    """recompute activations in backward: less memory, about a third more time"""
    stop_truncated_frac: float = 0.95
    """save and stop once more than this share of the responses is truncated for stop_patience steps; 0: never"""
    stop_patience: int = 10
    """steps in a row that stop_truncated_frac waits for"""

    # loss
    clip_low: float = 0.2
    """ratio is clipped at 1 - clip_low"""
    clip_high: float = 0.28
    """ratio is clipped at 1 + clip_high (DAPO's clip-higher)"""
    dual_clip: float = 10.0
    """bound on the loss of a negative advantage, in units of |advantage|"""
    std_normalization: bool = True
    """divide advantages by the group's standard deviation (off: Dr. GRPO)"""
    overlong_filtering: bool = False
    """DAPO: leave truncated responses out of the loss"""
    tis_cap: float = 2.0
    """with vllm: truncated importance sampling, a token's loss times old / sampler probability, at most this; 0: off"""
    kl_coef: float = 0.0
    """weight of the full-vocabulary KL(policy || ref), ref being the initial model; 0: no reference is loaded"""


def main(args: Args) -> None:
    # ---- check what was typed, before anything expensive
    require(args.group_size >= 2, f"--group-size {args.group_size}: a group of one has no baseline; use 2 or more")
    require(args.top_p == 1, f"--top-p {args.top_p}: training needs the full support; use --top-p 1 (and --temperature)")
    sizes = "prompts_per_step minibatch_prompts max_prompt_tokens max_response_tokens temperature rollout_batch_tokens "
    sizes += "epochs max_steps max_flops micro_batch_tokens learning_rate keep_last stop_patience"
    common.require_positive(args, sizes)
    require(0 <= args.stop_truncated_frac <= 1, f"--stop-truncated-frac {args.stop_truncated_frac}: must lie in 0 to 1")
    require(
        args.prompts_per_step % args.minibatch_prompts == 0,
        f"--prompts-per-step {args.prompts_per_step} is not divisible by --minibatch-prompts "
        f"{args.minibatch_prompts}; choose a divisor",
    )
    require(not args.eval_every or args.eval_data, "--eval-every needs --eval-data")
    require(args.tis_cap == 0 or args.tis_cap >= 1, f"--tis-cap {args.tis_cap}: must be at least 1, or 0 for none")
    plan.check(
        args,
        lambda: plan.Workload(
            trained=(policy := plan.Sizes.read(args.model, "--model")),
            frozen={"reference": policy} if args.kl_coef else {},
            sampled=policy,
            responses=args.prompts_per_step * args.group_size,
            updates=args.prompts_per_step // args.minibatch_prompts,
        ),
    )
    common.choose_sampler(args)
    problems = dataset.load_problems(args.train_data, "--train-data", need_answers=True)
    eval_problems = dataset.load_problems(args.eval_data, "--eval-data", True) if args.eval_every else []
    tokenizer = common.load_tokenizer(args.model, "--model")

    problems, [prompts] = dataset.render_prompts(
        [tokenizer], problems, args.instruction, [args.thinking], args.max_prompt_tokens, "--train-data"
    )
    eval_prompts = [dataset.render_prompt(tokenizer, p, args.instruction, args.thinking) for p in eval_problems]
    require(
        args.prompts_per_step <= len(problems),
        f"--prompts-per-step {args.prompts_per_step} is more than the "
        f"{len(problems)} problems of --train-data; use at most that",
    )
    total_steps = args.max_steps or -(-args.epochs * len(problems) // args.prompts_per_step)  # the last one wraps around

    # ---- model, sampler, optimizer
    run = run_folder.Run(args, total_steps)
    common.seed_everything(args.seed)
    device, dtype = common.device_and_dtype(args.dtype)
    model = common.load_model(args.model, "--model", device, dtype, trainable=True, hybrid_shard=args.hybrid_shard)
    ref = (
        common.load_model(args.model, "--model", device, dtype, trainable=False, hybrid_shard=args.hybrid_shard)
        if args.kl_coef
        else None
    )
    if args.gradient_checkpointing:
        common.enable_gradient_checkpointing(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate, weight_decay=args.weight_decay, fused=True)
    stream = dataset.ProblemStream(len(problems), args.seed)
    start = run.resume(model, optimizer, stream)
    sampling = {"max_response_tokens": args.max_response_tokens, "temperature": args.temperature}
    longest_prompt = max(map(len, prompts + eval_prompts))
    sampler = common.make_sampler(args, model, args.model, tokenizer, dtype, longest_prompt, **sampling)
    grader = common.Grader(args.grader)
    samples = Samples(run.out, tokenizer, args.sample_every, colour_by="surprisal")
    stop = run_folder.StopRules(args, run, model, tokenizer, dtype)
    stop.watch(sampler)
    G, [params] = args.group_size, common.count_params(model)

    def evaluate(step):
        answers = [p.answer for p in eval_problems]
        return common.evaluate(sampler, tokenizer, eval_prompts, answers, grader, seed=(args.seed, step, 1))

    if args.eval_every and start == 0:
        run.log(0, evaluate(0))

    def over(step):
        return step >= total_steps or (args.max_flops is not None and run.spent["flops"] >= args.max_flops)

    step = start
    while not over(step):
        step += 1
        step_start = time.time()

        # ---- rollout: a group of responses per problem, and their rewards
        groups, all_responses, all_rewards = [], [], []  # groups: (problem index, responses, rewards)
        prompt_tokens = 0
        for draw in range(1 + args.dynamic_sampling):
            batch = stream.take(args.prompts_per_step)
            responses = sampler.sample([prompts[i] for i in batch], G, seed=(args.seed, step, 0, draw))
            run.consult(problems[i] for i in batch)
            answers = [problems[i].answer for i in batch for _ in range(G)]
            rewards = common.grade(grader, tokenizer, [r.ids for r in responses], answers)
            drawn = [(i, responses[k * G : k * G + G], rewards[k * G : k * G + G]) for k, i in enumerate(batch)]
            groups += [group for group in drawn if not args.dynamic_sampling or len(set(group[2])) > 1]
            all_responses, all_rewards = all_responses + responses, all_rewards + rewards
            prompt_tokens += sum(G * len(prompts[i]) for i in batch)
            if len(groups) >= args.prompts_per_step:
                break
        groups = groups[: args.prompts_per_step]
        batch_prompts = [prompts[i] for i, group, _ in groups for _ in group]  # one entry per response from here on
        responses = [response for _, group, _ in groups for response in group]
        rewards = torch.tensor([group for _, _, group in groups]).view(-1, G)  # (P, G)
        sampler.sleep()
        rollout_time = time.time() - step_start

        # ---- advantages: a reward against the rest of its group; equal rewards teach nothing
        advantages = rewards - rewards.mean(dim=1, keepdim=True)  # (P, G)
        if args.std_normalization:
            advantages = advantages / (rewards.std(dim=1, keepdim=True) + 1e-6)
        advantages = advantages.flatten().to(device)  # (B,)

        # ---- which rows train: equal rewards give advantage 0 and so exactly no gradient; leaving such rows out saves
        # their passes and changes nothing, as the denominator still counts their tokens
        trains = (advantages != 0).tolist()
        lengths = [len(p) + len(r.ids) for p, r in zip(batch_prompts, responses, strict=True)]
        minibatches = []  # (this rank's micro-batches of the rows that train, tokens of all rows: the loss's denominator)
        passed = []  # tokens that a minibatch passes through the model, on all ranks
        for first in range(0, len(responses), args.minibatch_prompts * G):
            rows = range(first, min(first + args.minibatch_prompts * G, len(responses)))
            rows = [k for k in rows if responses[k].ids and not (args.overlong_filtering and responses[k].truncated)]
            tokens = sum(len(responses[k].ids) for k in rows)
            rows = [k for k in rows if trains[k] or args.kl_coef]
            passed.append(sum(lengths[k] for k in rows))
            micro_batches = common.micro_batches([lengths[k] for k in rows], args.micro_batch_tokens)
            micro_batches = [[rows[j] for j in micro_batch] for micro_batch in micro_batches]
            minibatches.append((parallel.share(micro_batches), tokens))

        # ---- score: the trainer's own log-probabilities under the policy that sampled. The first update yields its own
        score_start = time.time()
        old_logprobs = {}  # (minibatch, micro-batch): (N,)
        for b, (micro_batches, _) in enumerate(minibatches[1:], 1):
            for m, micro_batch in enumerate(micro_batches):
                prompt_ids, response_ids = [batch_prompts[k] for k in micro_batch], [responses[k].ids for k in micro_batch]
                with torch.no_grad(), common.autocast(device, dtype):
                    hidden, head, ids = common.response_hidden(model, prompt_ids, response_ids)  # (N, H), (V, H), (N,)
                    old_logprobs[b, m], _ = fused_linear_logprob(hidden, head, ids, temperature=args.temperature)
        score_time = time.time() - score_start

        # ---- train: an optimizer step per minibatch, gradients accumulated over its micro-batches
        train_start = time.time()
        sums, diff_max, grad_norm = torch.zeros(8, dtype=torch.float64), torch.zeros(()), 0.0
        updates = 0
        for b, (micro_batches, tokens) in enumerate(minibatches):
            for m, micro_batch in enumerate(micro_batches):
                prompt_ids, response_ids = [batch_prompts[k] for k in micro_batch], [responses[k].ids for k in micro_batch]
                with common.autocast(device, dtype):
                    hidden, head, ids = common.response_hidden(model, prompt_ids, response_ids)  # (N, H), (V, H), (N,)
                    new_logprobs, entropy = fused_linear_logprob(hidden, head, ids, temperature=args.temperature)  # (N,)
                old = old_logprobs.get((b, m), new_logprobs.detach())  # (N,)
                sizes = torch.tensor([len(ids) for ids in response_ids], dtype=torch.long, device=device)
                advantage = advantages[micro_batch].repeat_interleave(sizes).to(old.dtype)  # (N,)

                # -min(ratio A, clip(ratio) A), and at most dual_clip |A| where A < 0; mean over all tokens
                logratio = new_logprobs - old
                ratio = logratio.exp()
                pg_loss1 = -advantage * ratio
                pg_loss2 = -advantage * ratio.clamp(1 - args.clip_low, 1 + args.clip_high)
                pg_loss = torch.max(pg_loss1, pg_loss2)
                pg_loss = torch.where(advantage < 0, torch.min(pg_loss, -advantage * args.dual_clip), pg_loss)

                # truncated importance sampling: vLLM drew the tokens, and its rounding makes it another policy
                reported = torch.tensor([lp for k in micro_batch for lp in responses[k].sampler_logprobs], device=device)
                sampler_ratio = (old - reported).exp()  # (N,)
                if args.tis_cap and args.sampler == "vllm":
                    pg_loss = pg_loss * sampler_ratio.clamp(max=args.tis_cap).to(pg_loss.dtype)
                policy_loss = pg_loss.sum() / tokens

                ref_kl = torch.zeros(())
                if ref is not None:
                    with torch.no_grad(), common.autocast(device, dtype):
                        ref_hidden, ref_head, _ = common.response_hidden(ref, prompt_ids, response_ids)
                    weight = torch.full_like(old, 1 / tokens)
                    ref_kl, _ = fused_linear_divergence(
                        hidden,
                        head,
                        TeacherHead(ref_hidden, ref_head),
                        weight=weight,
                        kind="reverse_kl",
                        temperature=args.temperature,
                    )
                loss = policy_loss + args.kl_coef * ref_kl
                (loss * parallel.world_size()).backward()  # FSDP2 averages over the ranks

                with torch.no_grad():
                    diff = (old - reported).abs()  # (N,)
                    diff_max = torch.cat([diff_max[None], diff.float().cpu()]).max()
                    values = [
                        (ratio - 1 - logratio).sum(),
                        (pg_loss2 > pg_loss1).sum(),
                        entropy.sum(),
                        diff.sum(),
                        (sampler_ratio > (args.tis_cap or float("inf"))).sum(),
                        torch.tensor(len(ids)),
                        policy_loss,
                        ref_kl,
                    ]
                    sums += torch.stack([v.double().cpu() for v in values])
            if micro_batches:
                grad_norm += common.clip_gradients(model, args.max_grad_norm)
                losses = parallel.all_reduce(sums[-2:].clone())
                stop.unless_finite(step, policy_loss=losses[0], ref_kl=losses[1], grad_norm=grad_norm)
                optimizer.step()
                optimizer.zero_grad()
                updates += 1
        train_time = time.time() - train_start

        sync_start = time.time()
        sampler.update_weights(model)
        sync_time, step_time = time.time() - sync_start, time.time() - step_start

        # ---- log
        *per_token, trained_tokens, policy_loss, ref_kl = parallel.all_reduce(sums).tolist()
        per_token = [value / max(trained_tokens, 1) for value in per_token]
        approx_kl, clipfrac, entropy, diff_mean, sampler_ratio_clipfrac = per_token
        policy_loss, ref_kl, grad_norm = [value / max(updates, 1) for value in (policy_loss, ref_kl, grad_norm)]
        response_tokens = sum(len(r.ids) for r in all_responses)
        by_group = torch.tensor(all_rewards).view(-1, G)
        forward = prompt_tokens + response_tokens + sum(passed[1:]) + (sum(passed) if ref is not None else 0)
        run.spend(updates, response_tokens, flops=params * (2 * forward + 6 * sum(passed)))
        metrics = {
            "charts/reward": float(by_group.mean()),
            "charts/response_length": response_tokens / len(all_responses),
            "charts/truncated_frac": sum(r.truncated for r in all_responses) / len(all_responses),
            "charts/repetition": telemetry.repetition([r.ids for r in all_responses]),
            "charts/zero_std_frac": float((by_group.std(dim=1) == 0).float().mean()),
            "charts/learning_rate": optimizer.param_groups[0]["lr"],
            "charts/tokens_per_sec": response_tokens / step_time,
            "charts/labels_used": len(run.labels),
            "losses/policy_loss": policy_loss,
            "losses/approx_kl": approx_kl,
            "losses/clipfrac": clipfrac,
            "losses/entropy": entropy,
            "losses/ref_kl": ref_kl,
            "losses/grad_norm": grad_norm,
            "debug/sampler_logprob_diff_mean": diff_mean,
            "debug/sampler_logprob_diff_max": float(parallel.all_reduce(diff_max, largest=True)),
            "debug/sampler_ratio_clipfrac": sampler_ratio_clipfrac,
            "debug/canary_logprob_diff": sampler.canary_logprob_diff,
            "debug/out_of_vocab": sum(r.out_of_vocab for r in all_responses),
            "debug/grader_timeouts": grader.timeouts,
            "debug/unparsable": grader.unparsable,
            "time/rollout": rollout_time,
            "time/score": score_time,
            "time/train": train_time,
            "time/sync": sync_time,
            "time/step": step_time,
        }
        if args.eval_every and (step % args.eval_every == 0 or over(step)):
            metrics |= evaluate(step)
        run.log(
            step,
            metrics,
            f"reward {metrics['charts/reward']:.3f}, {metrics['charts/response_length']:.0f} tokens, "
            f"{metrics['charts/tokens_per_sec']:.0f} tok/s",
        )
        if responses and samples.due(step):
            shown, shown_ids = responses[:RESPONSES], [r.ids for r in responses[:RESPONSES]]
            surprisal = -torch.tensor([lp for r in shown for lp in r.sampler_logprobs])  # (N,)
            samples.keep(step, range(len(shown)), shown_ids, surprisal=surprisal)
            of_response = [problems[i] for i, group, _ in groups for _ in group]
            cut = [r.truncated for r in shown]
            samples.write(step, of_response, shown_ids, cut, rewards=rewards.flatten(), advantages=advantages)
        stop.if_truncated(step, metrics["charts/truncated_frac"])
        run.checkpoint(step, model, optimizer, stream)

    grader.close()
    run.finish(model, tokenizer, dtype)


if __name__ == "__main__":
    common.run(main, Args)
