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
    eval_data: str | None = None
    """labeled problems for the learning curve: one response each, sampled as in training"""
    eval_every: int = 0
    """evaluate before training, every so many steps, and at the end; 0: never"""
    seed: int = 1
    """seed of data order and sampling; on one CPU the same command gives bit-identical weights"""
    dtype: Literal["auto", "bfloat16", "float32", "float64"] = "auto"
    """compute dtype; auto is bfloat16 over float32 master weights on CUDA, float32 on a CPU"""
    sample_every: int = 20
    """write sample responses with reward and logprobs to samples.jsonl and samples.html every so many steps; 0: never"""
    tensorboard: bool = False
    """also log to TensorBoard (pip install tensorboard)"""
    wandb: bool = False
    """also log to Weights & Biases (pip install wandb)"""

    # prompt and reward
    instruction: str = common.INSTRUCTION
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
    """sampler's cache: prompt + response tokens summed over the rows of a batch"""

    # optimisation
    epochs: int = 15
    """passes over the problems"""
    max_steps: int | None = None
    """stop after so many steps instead"""
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
    kl_coef: float = 0.0
    """weight of the full-vocabulary KL(policy || ref), ref being the initial model; 0: no reference is loaded"""


def main(args: Args) -> None:
    # ---- check what was typed, before anything expensive
    require(args.group_size >= 2, f"--group-size {args.group_size}: a group of one has no baseline; use 2 or more")
    require(args.top_p == 1, f"--top-p {args.top_p}: training needs the full support; use --top-p 1 (and --temperature)")
    sizes = "prompts_per_step minibatch_prompts max_prompt_tokens max_response_tokens temperature rollout_batch_tokens "
    sizes += "epochs max_steps micro_batch_tokens learning_rate stop_patience"
    common.require_positive(args, sizes)
    require(0 <= args.stop_truncated_frac <= 1, f"--stop-truncated-frac {args.stop_truncated_frac}: must lie in 0 to 1")
    require(
        args.prompts_per_step % args.minibatch_prompts == 0,
        f"--prompts-per-step {args.prompts_per_step} is not divisible by --minibatch-prompts "
        f"{args.minibatch_prompts}; choose a divisor",
    )
    require(not args.eval_every or args.eval_data, "--eval-every needs --eval-data")
    problems = common.load_problems(args.train_data, "--train-data", need_answers=True)
    eval_problems = common.load_problems(args.eval_data, "--eval-data", True) if args.eval_every else []
    tokenizer = common.load_tokenizer(args.model, "--model")

    problems, [prompts] = common.render_prompts(
        [tokenizer], problems, args.instruction, [args.thinking], args.max_prompt_tokens, "--train-data"
    )
    eval_prompts = [common.render_prompt(tokenizer, p, args.instruction, args.thinking) for p in eval_problems]
    require(
        args.prompts_per_step <= len(problems),
        f"--prompts-per-step {args.prompts_per_step} is more than the "
        f"{len(problems)} problems of --train-data; use at most that",
    )
    total_steps = args.max_steps or -(-args.epochs * len(problems) // args.prompts_per_step)  # the last one wraps around

    # ---- model, sampler, optimizer
    run = common.Run(args, total_steps)
    common.seed_everything(args.seed)
    device, dtype = common.device_and_dtype(args.dtype)
    model = common.load_model(args.model, "--model", device, dtype, trainable=True)
    head = model.get_output_embeddings().weight  # (V, H)
    ref = common.load_model(args.model, "--model", device, dtype, trainable=False) if args.kl_coef else None
    if args.gradient_checkpointing:
        common.enable_gradient_checkpointing(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate, weight_decay=args.weight_decay, fused=True)
    sampling = {
        "max_response_tokens": args.max_response_tokens,
        "temperature": args.temperature,
        "batch_tokens": args.rollout_batch_tokens,
        "seed": args.seed,
    }
    sampler = common.HFSampler(model, tokenizer, dtype, **sampling)
    eval_sampler = common.HFSampler(model, tokenizer, dtype, **sampling)  # its own, so that looking changes no training
    grader = common.Grader(args.grader)
    samples = Samples(run.out, tokenizer, args.sample_every, colour_by="surprisal")
    stop = common.StopRules(args, run, model, tokenizer, dtype)
    stream = common.problem_stream(len(problems), args.seed)
    G = args.group_size

    def evaluate():
        return common.evaluate(eval_sampler, tokenizer, eval_prompts, [p.answer for p in eval_problems], grader)

    if args.eval_every:
        run.log(0, evaluate())
    for step in range(1, total_steps + 1):
        step_start = time.time()

        # ---- rollout: a group of responses per problem, and their rewards
        groups, all_responses, all_rewards = [], [], []  # groups: (problem index, responses, rewards)
        for _ in range(1 + args.dynamic_sampling):
            batch = [next(stream) for _ in range(args.prompts_per_step)]
            responses = sampler.sample([prompts[i] for i in batch], G)
            texts = tokenizer.batch_decode([r.ids for r in responses], skip_special_tokens=True)
            rewards = grader.grade(texts, [problems[i].answer for i in batch for _ in range(G)])
            run.labels.update(problems[i].text for i in batch)
            drawn = [(i, responses[k * G : k * G + G], rewards[k * G : k * G + G]) for k, i in enumerate(batch)]
            groups += [group for group in drawn if not args.dynamic_sampling or len(set(group[2])) > 1]
            all_responses, all_rewards = all_responses + responses, all_rewards + rewards
            if len(groups) >= args.prompts_per_step:
                break
        groups = groups[: args.prompts_per_step]
        batch_prompts = [prompts[i] for i, group, _ in groups for _ in group]  # one entry per response from here on
        responses = [response for _, group, _ in groups for response in group]
        rewards = torch.tensor([group for _, _, group in groups]).view(-1, G)  # (P, G)
        rollout_time = time.time() - step_start

        # ---- advantages: a reward against the rest of its group; equal rewards teach nothing
        advantages = rewards - rewards.mean(dim=1, keepdim=True)  # (P, G)
        if args.std_normalization:
            advantages = advantages / (rewards.std(dim=1, keepdim=True) + 1e-6)
        advantages = advantages.flatten().to(device)  # (B,)

        # ---- which rows train: equal rewards give advantage 0 and so exactly no gradient; leaving such rows out saves
        # their passes and changes nothing, as the denominator still counts their tokens
        trains = (advantages != 0).tolist()
        minibatches = []  # (rows that train, tokens of all rows): the loss's one denominator per optimizer step
        for start in range(0, len(responses), args.minibatch_prompts * G):
            rows = range(start, min(start + args.minibatch_prompts * G, len(responses)))
            rows = [k for k in rows if not (args.overlong_filtering and responses[k].truncated)]
            tokens = sum(len(responses[k].ids) for k in rows)
            minibatches.append(([k for k in rows if trains[k] or args.kl_coef], tokens))
        lengths = [len(p) + len(r.ids) for p, r in zip(batch_prompts, responses, strict=True)]

        # ---- score: the trainer's own log-probabilities under the policy that sampled. The first update yields its own
        score_start = time.time()
        old_logprobs = {}  # row: (R,)
        rows = [k for later, _ in minibatches[1:] for k in later]
        for micro_batch in common.micro_batches([lengths[k] for k in rows], args.micro_batch_tokens):
            micro_batch = [rows[j] for j in micro_batch]
            response_ids = [responses[k].ids for k in micro_batch]
            with torch.no_grad(), common.autocast(device, dtype):
                hidden, ids = common.response_hidden(model, [batch_prompts[k] for k in micro_batch], response_ids)
                logprobs, _ = fused_linear_logprob(hidden, head, ids, temperature=args.temperature)  # (N,)
            split = logprobs.split([len(ids) for ids in response_ids])
            old_logprobs.update(zip(micro_batch, split, strict=True))
        score_time = time.time() - score_start

        # ---- train: an optimizer step per minibatch, gradients accumulated over its micro-batches
        train_start = time.time()
        sums, diff_max, grad_norm = torch.zeros(6, dtype=torch.float64), 0.0, 0.0
        updates, trained_tokens = 0, 0
        for rows, tokens in minibatches:
            for micro_batch in common.micro_batches([lengths[k] for k in rows], args.micro_batch_tokens):
                micro_batch = [rows[j] for j in micro_batch]
                prompt_ids, response_ids = [batch_prompts[k] for k in micro_batch], [responses[k].ids for k in micro_batch]
                with common.autocast(device, dtype):
                    hidden, ids = common.response_hidden(model, prompt_ids, response_ids)  # (N, H), (N,)
                    new_logprobs, entropy = fused_linear_logprob(hidden, head, ids, temperature=args.temperature)  # (N,)
                first = rows is minibatches[0][0]
                old = new_logprobs.detach() if first else torch.cat([old_logprobs[k] for k in micro_batch])  # (N,)
                sizes = torch.tensor([len(ids) for ids in response_ids], device=device)
                advantage = advantages[micro_batch].repeat_interleave(sizes).to(old.dtype)  # (N,)

                # -min(ratio A, clip(ratio) A), and at most dual_clip |A| where A < 0; mean over all tokens
                logratio = new_logprobs - old
                ratio = logratio.exp()
                pg_loss1 = -advantage * ratio
                pg_loss2 = -advantage * ratio.clamp(1 - args.clip_low, 1 + args.clip_high)
                pg_loss = torch.max(pg_loss1, pg_loss2)
                pg_loss = torch.where(advantage < 0, torch.min(pg_loss, -advantage * args.dual_clip), pg_loss)
                policy_loss = pg_loss.sum() / tokens

                ref_kl = torch.zeros(())
                if ref is not None:
                    with torch.no_grad(), common.autocast(device, dtype):
                        ref_hidden, _ = common.response_hidden(ref, prompt_ids, response_ids)
                    anchor = TeacherHead(ref_hidden, ref.get_output_embeddings().weight)
                    weight = torch.full_like(old, 1 / tokens)
                    ref_kl, _ = fused_linear_divergence(
                        hidden, head, anchor, weight=weight, kind="reverse_kl", temperature=args.temperature
                    )
                (policy_loss + args.kl_coef * ref_kl).backward()

                with torch.no_grad():
                    reported = torch.tensor([lp for k in micro_batch for lp in responses[k].sampler_logprobs], device=device)
                    diff = (old - reported).abs()  # (N,)
                    diff_max = max(diff_max, float(diff.max()))
                    values = [
                        (ratio - 1 - logratio).sum(),
                        (pg_loss2 > pg_loss1).sum(),
                        entropy.sum(),
                        diff.sum(),
                        policy_loss,
                        ref_kl,
                    ]
                    sums += torch.stack([v.double().cpu() for v in values])
                trained_tokens += len(ids)
            if rows:
                grad_norm += float(torch.nn.utils.clip_grad_norm_(model.parameters(), args.max_grad_norm))
                stop.unless_finite(step, policy_loss=sums[4], ref_kl=sums[5], grad_norm=grad_norm)
                optimizer.step()
                optimizer.zero_grad()
                updates += 1
        train_time = time.time() - train_start

        sync_start = time.time()
        sampler.update_weights(model)
        eval_sampler.update_weights(model)
        sync_time, step_time = time.time() - sync_start, time.time() - step_start

        # ---- log
        approx_kl, clipfrac, entropy, diff_mean = (sums[:4] / max(trained_tokens, 1)).tolist()  # over tokens trained on
        policy_loss, ref_kl, grad_norm = (torch.tensor([*sums[4:], grad_norm]) / max(updates, 1)).tolist()  # over updates
        response_tokens = sum(len(r.ids) for r in all_responses)
        by_group = torch.tensor(all_rewards).view(-1, G)
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
            "debug/sampler_logprob_diff_max": diff_max,
            "debug/grader_timeouts": grader.timeouts,
            "debug/unparsable": grader.unparsable,
            "time/rollout": rollout_time,
            "time/score": score_time,
            "time/train": train_time,
            "time/sync": sync_time,
            "time/step": step_time,
        }
        if args.eval_every and (step % args.eval_every == 0 or step == total_steps):
            metrics |= evaluate()
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

    grader.close()
    run.finish(model, tokenizer, dtype)


if __name__ == "__main__":
    common.run(main, Args)
