# docs/grpo.md
"""Group relative policy optimisation (GRPO) with a sparse verifiable reward: stage 1 of the recipe, on the teacher, and
the optional stage 3, on the bridged student.

Each step samples a group of responses per problem, rewards each with 1 if its last \\boxed{} holds the reference
answer and 0 otherwise, normalises rewards within the group to advantages, and takes clipped policy-gradient steps with
one global token mean. Deviations from the paper: math-verify grades by default (`--grader boxed` is the authors' string
equality), and the optional KL term is the full-vocabulary one, not a sampled estimate.

    torchrun --nproc_per_node 8 grpo.py --model Qwen/Qwen3-8B --gradient-checkpointing --out ckpt/8b_rl
    python grpo.py --model Qwen/Qwen3-1.7B --gradient-checkpointing --train-data openai/gsm8k:main
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch

import common
from infra import batches, cli, dataset, lora, models, parallel, plan, preflight, run_folder, telemetry
from infra.cli import require
from infra.meter import Meter
from infra.prompts import render_prompts
from infra.reward import make_grader, report_ungradable
from infra.sampler import Response
from infra.samples_page import Samples
from kernels import TeacherHead, fused_linear_divergence, fused_linear_logprob


@dataclass(kw_only=True)
class Args(common.RunArgs, common.RolloutArgs):
    model: str
    """policy to train: hub id or local folder of a causal LM with a chat template"""
    out: str = "ckpt/grpo"
    """output folder: Hugging Face checkpoint, metrics.jsonl, run.json"""
    grader: str = "math"
    """math: math-verify on the last box; boxed: string equality of the box's contents, as the authors do; FILE.py:FUNCTION:
    a reward of your own (infra/reward.py)"""

    # algorithm
    prompts_per_step: int = 512
    """problems sampled per step"""
    group_size: int = 8
    """responses per problem"""
    dynamic_sampling: int = 0
    """DAPO: up to so many further draws to replace groups whose rewards are all equal; 0: off"""
    epochs: int = 15
    """passes over the problems"""
    max_steps: int | None = None
    """stop after so many steps instead"""
    max_flops: float | None = None
    """stop behind the step that brings the FLOPs to this, as run.json counts them; the learning rate falls with them, too"""
    minibatch_prompts: int = 128
    """problems per optimizer step; divides prompts_per_step"""
    learning_rate: float | None = None
    """AdamW's; none: 1e-6, with --lora-rank 1e-5"""
    learning_rate_warmup_steps: int = 0
    """steps over which the learning rate rises to that"""
    learning_rate_decay: Literal["none", "linear", "cosine"] = "none"
    """how it falls from there towards 0 at the last step"""
    weight_decay: float = 0.1
    """AdamW's decoupled weight decay"""
    max_grad_norm: float = 1.0
    """gradient clipping"""
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


class Group(NamedTuple):
    problem: int  # its index
    responses: list[Response]
    rewards: list[float]


def main(args: Args) -> None:
    # ---- what was typed, and whether it fits this machine
    common.check(args, positive="prompts_per_step minibatch_prompts max_flops")
    require(args.group_size >= 2, f"--group-size {args.group_size}: a group of one has no baseline; use 2 or more")
    require(
        args.prompts_per_step % args.minibatch_prompts == 0,
        f"--prompts-per-step {args.prompts_per_step} is not divisible by --minibatch-prompts "
        f"{args.minibatch_prompts}; choose a divisor",
    )
    require(args.kl_coef >= 0, f"--kl-coef {args.kl_coef}: must be 0 (no reference) or more")
    require(args.tis_cap == 0 or args.tis_cap >= 1, f"--tis-cap {args.tis_cap}: must be at least 1, or 0 for none")
    G, policy = args.group_size, plan.Sizes.read(args.model, "--model")
    work = {"trained": policy, "frozen": {"reference": policy} if args.kl_coef else {}, "sampled": policy}
    work |= {"responses": args.prompts_per_step * G, "updates": args.prompts_per_step // args.minibatch_prompts}
    plan.check(args, plan.Workload(**work))

    # ---- problems and prompts
    grader = make_grader(args.grader)
    labeled = grader.uses_labels
    problems = dataset.load_problems(args.train_data, "--train-data", need_answers=labeled, **dataset.columns(args))
    report_ungradable(grader, problems)
    tokenizer = models.load_tokenizer(args.model, "--model")
    problems, [prompts] = render_prompts(args, problems, [tokenizer], [args.thinking])
    preflight.warn_of_base("--model", args.model, tokenizer, args.thinking, prompts)
    eval_set = common.load_eval(args, tokenizer, problems, labeled)
    total_steps = common.count_steps(args, len(problems), args.prompts_per_step, "--prompts-per-step")

    # ---- models, sampler, optimizer
    run = run_folder.Run(args, total_steps, problems)
    cli.seed_everything(args.seed)
    device, dtype = models.device_and_dtype(args.dtype)
    model = models.load_policy(args, args.model, "--model", device, dtype)
    ref = model if args.kl_coef else None  # with --lora-rank it is the policy, its adapters off
    if args.kl_coef and not args.lora_rank:
        ref = models.load_frozen(args, args.model, "--model", device, dtype)
    if args.gradient_checkpointing:
        models.enable_gradient_checkpointing(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate, weight_decay=args.weight_decay, fused=True)
    stream = dataset.ProblemStream(len(problems), args.seed)
    step = run.resume(model, optimizer, stream)
    sampler = common.make_sampler(args, model, args.model, tokenizer, dtype, max(map(len, prompts + eval_set[1])))
    samples = Samples(run.out, tokenizer, args.sample_every, colour_by="surprisal")
    stop = run_folder.StopRules(args, run, model, tokenizer, dtype)
    stop.watch(sampler)
    [params] = models.count_params(model)

    if step == 0 and args.eval_every:
        run.log(0, common.evaluate(args, 0, False, sampler, tokenizer, grader, eval_set))
    while step < total_steps and run.used(args.max_flops) < 1:
        step += 1
        optimizer.param_groups[0]["lr"] = common.learning_rate(args, step, total_steps, run.used(args.max_flops))
        meter = Meter()

        # ---- rollout: a group of responses per problem, and their rewards
        drawn, groups = [], []  # all of the step, and those that train
        for draw in range(1 + args.dynamic_sampling):
            batch = stream.take(args.prompts_per_step)
            sampled = sampler.sample([prompts[i] for i in batch], G, seed=(args.seed, step, 0, draw))
            run.consult(problems[i] for i in batch if labeled)
            asked = [problems[i] for i in batch for _ in range(G)]
            rewards = common.grade(grader, tokenizer, [r.ids for r in sampled], asked)
            drawn += [Group(i, sampled[k * G : k * G + G], rewards[k * G : k * G + G]) for k, i in enumerate(batch)]
            groups = [g for g in drawn if not args.dynamic_sampling or len(set(g.rewards)) > 1][: args.prompts_per_step]
            if len(groups) == args.prompts_per_step:
                break
        batch = [group.problem for group in groups for _ in group.responses]  # one entry per response from here on
        responses = [response for group in groups for response in group.responses]
        sampler.sleep()
        meter.lap("rollout")

        # ---- advantages: a reward against the rest of its group; equal rewards, of any value, give exactly 0
        rewards = torch.tensor([group.rewards for group in groups], dtype=torch.float64).view(-1, G)  # (P, G)
        gaps = rewards - rewards[:, :1]  # 0 where all are equal, however they are rounded
        advantages = (gaps - gaps.mean(dim=1, keepdim=True)).float()  # (P, G)
        if args.std_normalization:
            advantages = advantages / (gaps.std(dim=1, keepdim=True).float() + 1e-6)
        advantages = advantages.flatten().to(device)  # (B,)

        # ---- which rows train: an advantage of 0 is exactly no gradient; leaving such rows out saves their passes and
        # changes nothing, as the denominator still counts their tokens
        trains = [bool(advantage) or args.kl_coef > 0 for advantage in advantages.tolist()]
        lengths = [len(prompts[i]) + len(r.ids) for i, r in zip(batch, responses, strict=True)]
        minibatches, passed = split_minibatches(args, responses, lengths, trains)

        # ---- score: the trainer's own log-probabilities under the policy that sampled. The first update yields its own
        old_logprobs = {}  # (minibatch, micro-batch): (N,)
        for b, (micro_batches, _) in enumerate(minibatches[1:], 1):
            for m, rows in enumerate(micro_batches):
                with torch.no_grad():
                    prompt_ids, response_ids = [prompts[batch[k]] for k in rows], [responses[k].ids for k in rows]
                    old_logprobs[b, m] = logprobs_of(args, model, device, dtype, prompt_ids, response_ids)[2]
        meter.lap("score")

        # ---- train: an optimizer step per minibatch, gradients accumulated over its micro-batches
        grad_norms = []
        for b, (micro_batches, tokens) in enumerate(minibatches):
            for m, rows in enumerate(micro_batches):
                prompt_ids, response_ids = [prompts[batch[k]] for k in rows], [responses[k].ids for k in rows]
                target = reference_of(ref, device, dtype, prompt_ids, response_ids) if ref is not None else None
                hidden, head, new_logprobs, entropy = logprobs_of(args, model, device, dtype, prompt_ids, response_ids)
                old = old_logprobs.get((b, m), new_logprobs.detach())  # (N,)
                sizes = torch.tensor([len(r) for r in response_ids], dtype=torch.long, device=device)
                advantage = advantages[rows].repeat_interleave(sizes).to(old.dtype)  # (N,)

                # -min(ratio A, clip(ratio) A), and at most dual_clip |A| where A < 0; mean over all tokens
                gap = new_logprobs - old  # (N,)
                logratio = gap.clamp(-20, 20)  # as verl does: beyond 88 exp overflows, and the gradient is nan
                ratio = logratio.exp()
                pg_loss1 = -advantage * ratio
                pg_loss2 = -advantage * ratio.clamp(1 - args.clip_low, 1 + args.clip_high)
                pg_loss = torch.max(pg_loss1, pg_loss2)
                pg_loss = torch.where(advantage < 0, torch.min(pg_loss, -advantage * args.dual_clip), pg_loss)
                # truncated importance sampling: vLLM drew the tokens, and its rounding makes it another policy
                reported = torch.tensor([lp for k in rows for lp in responses[k].sampler_logprobs], device=device)
                sampler_ratio = (old - reported).exp()  # (N,)
                if args.tis_cap and args.sampler == "vllm":
                    pg_loss = pg_loss * sampler_ratio.clamp(max=args.tis_cap).to(pg_loss.dtype)
                policy_loss = loss = pg_loss.sum() / tokens
                if ref is not None:
                    options = {"weight": torch.full_like(old, 1 / tokens), "temperature": args.temperature}
                    with models.autocast(device, dtype):
                        ref_kl, _ = fused_linear_divergence(hidden, head, target, kind="reverse_kl", **options)
                    loss = policy_loss + args.kl_coef * ref_kl
                    meter.sum("losses/ref_kl", ref_kl / len(minibatches))
                (loss * parallel.world_size()).backward()  # FSDP2 averages over the ranks
                meter.sum("losses/policy_loss", policy_loss / len(minibatches))
                meter.add("losses/approx_kl", ratio - 1 - logratio)
                meter.add("losses/clipfrac", pg_loss2 > pg_loss1)
                meter.add("debug/logratio_clampfrac", gap.abs() > 20)
                meter.max("debug/logratio_max", gap.abs())
                meter.add("losses/entropy", entropy)
                meter.add("debug/sampler_ratio_clipfrac", sampler_ratio > (args.tis_cap or float("inf")))
                telemetry.add_sampler_difference(meter, old, reported)
            grad_norms.append(models.clip_gradients(model, args.max_grad_norm))
            policy_loss, logratio = meter.total("losses/policy_loss"), meter.largest("debug/logratio_max")
            stop.unless_finite(step, policy_loss=policy_loss, logratio=logratio, grad_norm=grad_norms[-1])
            optimizer.step()
            optimizer.zero_grad()
        meter.lap("train")
        sampler.update_weights(model)
        meter.lap("sync")

        # ---- log
        sampled = [response for group in drawn for response in group.responses]
        by_group = torch.tensor([group.rewards for group in drawn])  # (groups drawn, G)
        response_tokens = sum(len(r.ids) for r in sampled)
        forward = response_tokens + sum(G * len(prompts[group.problem]) for group in drawn)  # when sampling
        forward += sum(passed[1:]) + (sum(passed) if ref is not None else 0)  # when scoring
        run.spend(len(minibatches), response_tokens, flops=2 * params * forward + models.train_flops(model) * sum(passed))
        metrics = meter.metrics() | telemetry.of_responses(sampled)
        metrics |= {
            "charts/reward": float(by_group.mean()),
            "charts/zero_std_frac": float((by_group == by_group[:, :1]).all(dim=1).float().mean()),
            "charts/learning_rate": optimizer.param_groups[0]["lr"],
            "charts/tokens_per_sec": response_tokens / meter.laps["time/step"],
            "charts/labels_used": len(run.labels),
            "losses/grad_norm": sum(grad_norms) / max(len(grad_norms), 1),
            "debug/canary_logprob_diff": sampler.canary_logprob_diff,
            "debug/out_of_vocab": sum(r.out_of_vocab for r in sampled),
            "debug/grader_timeouts": grader.timeouts,
            "debug/unparsable": grader.unparsable,
        }
        last = step == total_steps or run.used(args.max_flops) >= 1
        metrics |= common.evaluate(args, step, last, sampler, tokenizer, grader, eval_set)
        run.log(step, metrics, "charts/reward")
        samples.write(step, [problems[i] for i in batch], responses, rewards=rewards.flatten(), advantages=advantages)
        stop.if_truncated(step, metrics["charts/truncated_frac"])
        run.checkpoint(step, model, optimizer, stream)

    grader.close()
    run.finish(model, tokenizer, dtype)


def logprobs_of(args, model, device, dtype, prompt_ids, response_ids):
    """-> hidden states (N, H), head (V, H), log-probabilities (N,) of the response tokens, entropies (N,)."""
    with models.autocast(device, dtype):
        hidden, head, ids = batches.response_hidden(model, prompt_ids, response_ids)
        return hidden, head, *fused_linear_logprob(hidden, head, ids, temperature=args.temperature)


def reference_of(ref, device, dtype, prompt_ids, response_ids) -> TeacherHead:
    """The reference's hidden states (N, H) and head (V, H). With --lora-rank it is the policy itself, its adapters off, so
    this comes before the policy's own pass."""
    with torch.no_grad(), models.autocast(device, dtype), lora.adapters_off(ref):
        return TeacherHead(*batches.response_hidden(ref, prompt_ids, response_ids)[:2])


def split_minibatches(args, responses, lengths: list[int], trains: list[bool]):
    """[(this rank's micro-batches of the rows that train, tokens of all rows: the denominator of the loss)] for each
    minibatch in which a row trains, and the tokens that each passes through the model, on all ranks."""
    minibatches, passed = [], []
    size = args.minibatch_prompts * args.group_size
    for first in range(0, len(responses), size):
        rows = range(first, min(first + size, len(responses)))
        rows = [k for k in rows if responses[k].ids and not (args.overlong_filtering and responses[k].truncated)]
        tokens = sum(len(responses[k].ids) for k in rows)
        rows = [k for k in rows if trains[k]]
        if rows:
            micro_batches = batches.micro_batches([lengths[k] for k in rows], args.micro_batch_tokens)
            minibatches.append((parallel.share([[rows[j] for j in one] for one in micro_batches]), tokens))
            passed.append(sum(lengths[k] for k in rows))
    return minibatches, passed


if __name__ == "__main__":
    cli.run(main, Args)
