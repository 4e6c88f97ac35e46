# docs/opd.md
"""On-policy distillation (OPD) with dense token-level supervision: stage 2b of the recipe.

Each step the student answers a batch of problems itself, the teacher reads those answers, and the student takes one
optimizer step on the full-vocabulary KL(student || teacher) at every token it sampled. Nothing flows back through the
sampling. No reward and no label is used; docs/options.md has token weights that may. The teacher's final hidden states
are cached, not its logits: 8 KB a token for an 8B teacher instead of 304 KB. Deviation from the authors' code: the loss
is a mean over all tokens of the batch, not a mean of micro-batch means.

    python opd.py --teacher ckpt/8b_rl --student Qwen/Qwen3-1.7B
    python opd.py --teacher ckpt/8b_rl --student ckpt/warmup --train-data problems.jsonl --out ckpt/bridge
"""

import time
from dataclasses import dataclass
from typing import Literal

import torch

import common
import dataset
import parallel
import plan
import preflight
import run_folder
import telemetry
from common import require
from kernels import TeacherHead, TeacherLogits, fused_linear_divergence, fused_linear_logprob
from samples_page import Samples


@dataclass
class Args:
    # experiment
    teacher: str
    """frozen target: hub id or local folder of a causal LM"""
    student: str
    """policy to train: hub id or local folder; same tokenizer as the teacher"""
    out: str = "ckpt/opd"
    """output folder: Hugging Face checkpoint, metrics.jsonl, run.json"""
    train_data: str = "open-r1/DAPO-Math-17k-Processed"
    """problems, answers not needed: hub id (name, name:config, name:config:split) or local .jsonl/.parquet"""
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
    """write sample responses with per-token KL to samples.jsonl and samples.html every so many steps; 0: never"""
    preflight_only: bool = False
    """check that teacher and student fit, print what was found and end without training"""
    force: bool = False
    """go on where the preflight finds an error, recording it in run.json"""
    tensorboard: bool = False
    """also log to TensorBoard (pip install tensorboard)"""
    wandb: bool = False
    """also log to Weights & Biases (pip install wandb)"""

    # prompt
    instruction: str = dataset.INSTRUCTION
    """line added after each problem; "" adds none"""
    thinking: bool = False
    """let the student's chat template open a thinking block (Qwen3's enable_thinking)"""
    teacher_thinking: bool = False
    """the same for the teacher's chat template"""
    max_prompt_tokens: int = 2048
    """longer prompts are dropped and counted"""

    # rollout
    prompts_per_step: int = 256
    """problems sampled per step, one response each"""
    max_response_tokens: int = 8192
    """longer responses are truncated"""
    temperature: float = 1.0
    """sampling temperature; the loss sees both models' logits scaled by the same"""
    top_p: float = 1.0
    """must stay 1 in training: the loss is an expectation under the student's whole distribution"""
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
    offload_teacher: bool = False
    """keep the teacher in the CPU's memory except while it scores; its head stays on the GPU"""
    stop_truncated_frac: float = 0.95
    """save and stop once more than this share of the responses is truncated for stop_patience steps; 0: never"""
    stop_patience: int = 10
    """steps in a row that stop_truncated_frac waits for"""

    # loss
    loss: Literal["reverse_kl", "forward_kl", "jsd", "sampled", "reward_free"] = "reverse_kl"
    """reverse_kl: KL(student || teacher); sampled: policy gradient on the sampled token's log-ratio alone; reward_free:
    the same with an advantage of -1 for every token, a control without a teacher"""
    jsd_beta: float = 0.5
    """jsd's weight of the teacher in the mixture: 0 is forward_kl, 1 is reverse_kl"""
    tis_cap: float = 2.0
    """with vllm and `sampled`: truncated importance sampling, as in grpo.py, at most this; 0: off"""
    tip_fraction: float = 1.0
    """TIP: train on this fraction of a step's tokens, those of the highest entropy or divergence; 1: on all"""
    paced: str | None = None
    """PACED: weight a problem by p(1 - p), p its pass rate in this generations.jsonl of eval_math.py; uses labels"""
    reward_weight: float = 0.0
    """W: weight a response by 1 - W + W * reward; needs answers, uses labels; 0: off"""


def to_host(cache):
    """On CUDA into pinned memory, which the GPU copies from and to on its own. The copy may still be under way."""
    return torch.empty(cache.shape, dtype=cache.dtype, pin_memory=cache.is_cuda).copy_(cache, non_blocking=True)


def main(args: Args) -> None:
    # ---- check what was typed, before anything expensive
    require(args.top_p == 1, f"--top-p {args.top_p}: training needs the full support; use --top-p 1 (and --temperature)")
    sizes = "prompts_per_step max_prompt_tokens max_response_tokens temperature rollout_batch_tokens "
    sizes += "epochs max_steps micro_batch_tokens learning_rate keep_last stop_patience"
    common.require_positive(args, sizes)
    require(0 <= args.stop_truncated_frac <= 1, f"--stop-truncated-frac {args.stop_truncated_frac}: must lie in 0 to 1")
    require(0 <= args.jsd_beta <= 1, f"--jsd-beta {args.jsd_beta}: must lie between 0 and 1")
    require(not args.eval_every or args.eval_data, "--eval-every needs --eval-data")
    require(args.tis_cap == 0 or args.tis_cap >= 1, f"--tis-cap {args.tis_cap}: must be at least 1, or 0 for none")
    require(0 < args.tip_fraction <= 1, f"--tip-fraction {args.tip_fraction}: must be above 0 and at most 1")
    require(0 <= args.reward_weight <= 1, f"--reward-weight {args.reward_weight}: must lie between 0 (off) and 1")
    plan.check(
        args,
        lambda: plan.Workload(
            trained=(student := plan.Sizes.read(args.student, "--student")),
            frozen={"teacher": plan.Sizes.read(args.teacher, "--teacher")},
            sampled=student,
            responses=args.prompts_per_step,
            cached=True,
        ),
    )
    common.choose_sampler(args)
    problems = dataset.load_problems(args.train_data, "--train-data", need_answers=args.reward_weight > 0)
    eval_problems = dataset.load_problems(args.eval_data, "--eval-data", True) if args.eval_every else []
    tokenizer = common.load_tokenizer(args.student, "--student")
    teacher_tokenizer = common.load_tokenizer(args.teacher, "--teacher")
    checks = preflight.check_tokenizers(args, teacher_tokenizer, tokenizer, problems)

    problems, [prompts, teacher_prompts] = dataset.render_prompts(
        [tokenizer, teacher_tokenizer],
        problems,
        args.instruction,
        [args.thinking, args.teacher_thinking],
        args.max_prompt_tokens,
        "--train-data",
    )
    eval_prompts = [dataset.render_prompt(tokenizer, p, args.instruction, args.thinking) for p in eval_problems]
    problem_weights = dataset.paced_weights(args.paced, problems) if args.paced else [1.0] * len(problems)
    require(
        args.prompts_per_step <= len(problems),
        f"--prompts-per-step {args.prompts_per_step} is more than the "
        f"{len(problems)} problems of --train-data; use at most that",
    )
    total_steps = args.max_steps or -(-args.epochs * len(problems) // args.prompts_per_step)  # the last one wraps around

    # ---- models, sampler, optimizer
    run = None if args.preflight_only else run_folder.Run(args, total_steps)
    common.seed_everything(args.seed)
    device, dtype = common.device_and_dtype(args.dtype)
    model = common.load_model(args.student, "--student", device, dtype, trainable=True, hybrid_shard=args.hybrid_shard)
    teacher = common.load_model(
        args.teacher,
        "--teacher",
        device,
        dtype,
        trainable=False,
        hybrid_shard=args.hybrid_shard,
        offload=args.offload_teacher,
    )
    cache_logits = teacher.config.vocab_size <= teacher.config.hidden_size  # whichever is smaller per token
    common.move(teacher, device)
    preflight.check_models(args, checks, model, teacher, tokenizer, teacher_tokenizer, prompts, teacher_prompts)
    common.move(teacher, "cpu" if args.offload_teacher else device)
    if args.preflight_only:
        print("preflight: nothing stands in the way" if not checks.forced else "preflight: goes on by --force alone")
        return
    run.note(preflight=preflight.record(checks))
    if args.gradient_checkpointing:
        common.enable_gradient_checkpointing(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate, weight_decay=args.weight_decay, fused=True)
    stream = dataset.ProblemStream(len(problems), args.seed)
    start = run.resume(model, optimizer, stream)
    if args.paced:
        run.consult(problems)  # eval_math.py did, for their pass rates
    sampling = {"max_response_tokens": args.max_response_tokens, "temperature": args.temperature}
    longest_prompt = max(map(len, prompts + eval_prompts))
    sampler = common.make_sampler(args, model, args.student, tokenizer, dtype, longest_prompt, **sampling)
    grader = common.Grader()  # for --eval-data, --reward-weight and the samples
    samples = Samples(run.out, tokenizer, args.sample_every, colour_by="reverse_kl")
    stop = run_folder.StopRules(args, run, model, tokenizer, dtype)
    stop.watch(sampler)
    params, teacher_params = common.count_params(model, teacher)

    def evaluate(step):
        answers = [p.answer for p in eval_problems]
        return common.evaluate(sampler, tokenizer, eval_prompts, answers, grader, seed=(args.seed, step, 1))

    if args.eval_every and start == 0:
        run.log(0, evaluate(0))
    for step in range(start + 1, total_steps + 1):
        step_start = time.time()

        # ---- rollout: the student answers
        batch = stream.take(args.prompts_per_step)
        responses = sampler.sample([prompts[i] for i in batch], 1, seed=(args.seed, step))
        sampler.sleep()
        out_of_vocab = sum(r.out_of_vocab for r in responses)
        answered = [(i, r) for i, r in zip(batch, responses, strict=True) if r.ids]
        if not answered:
            stop.stop(f"step {step}: every response begins with an id that no token has; look at --student's head")
        batch, responses = zip(*answered, strict=True)
        response_ids = [r.ids for r in responses]
        tokens = sum(map(len, response_ids))
        rollout_time = time.time() - step_start

        # ---- this rank's rows; teacher and student pass over the same micro-batches
        longest = [max(len(prompts[i]), len(teacher_prompts[i])) + len(r) for i, r in zip(batch, response_ids, strict=True)]
        micro_batches = parallel.share(common.micro_batches(longest, args.micro_batch_tokens))

        # ---- score: the teacher reads the answers behind its own rendering of the prompts
        score_start = time.time()
        cached = []  # per micro-batch (N, Ht) hidden states or (N, V) logits, on the CPU
        token_stats = {}  # for TIP: of each response the student's entropy and the reverse KL, (2, R)
        common.move(teacher, device)
        for micro_batch in micro_batches:
            prompt_ids, chosen_ids = [teacher_prompts[batch[k]] for k in micro_batch], [response_ids[k] for k in micro_batch]
            with torch.no_grad(), common.autocast(device, dtype):
                hidden, teacher_head, _ = common.response_hidden(teacher, prompt_ids, chosen_ids)
                target = hidden @ teacher_head.T if cache_logits else hidden.to(dtype)  # (N, V) or (N, Ht)
                cached.append(to_host(target))
                if args.tip_fraction < 1:  # the student reads them too
                    target = TeacherLogits(target) if cache_logits else TeacherHead(target, teacher_head)
                    hidden, head, _ = common.response_hidden(model, [prompts[batch[k]] for k in micro_batch], chosen_ids)
                    _, stats = fused_linear_divergence(hidden, head, target, temperature=args.temperature)
                    both = torch.stack([stats.student_entropy, stats.reverse_kl]).double().cpu()  # (2, N)
                    token_stats |= zip(micro_batch, both.split([len(r) for r in chosen_ids], dim=1), strict=True)
            teacher_head = teacher_head.detach()  # stays here when the teacher leaves
        if device.type == "cuda":
            torch.cuda.synchronize()  # the copies into pinned memory
        common.move(teacher, "cpu" if args.offload_teacher else device)

        # ---- weights of the tokens: all the same unless an option says otherwise (docs/options.md)
        weights = torch.tensor([problem_weights[i] for i in batch], dtype=torch.float64)  # (B,)
        if args.reward_weight:
            run.consult(problems[i] for i in batch)
            rewards = common.grade(grader, tokenizer, response_ids, [problems[i].answer for i in batch])
            weights *= 1 - args.reward_weight + args.reward_weight * torch.tensor(rewards, dtype=torch.float64)
        sizes = torch.tensor([len(r) for r in response_ids])
        weights = weights.repeat_interleave(sizes)  # (tokens,)
        if args.tip_fraction < 1:
            # TIP's soft-OR: a token matters where either figure is high, each scaled to 0..1 over the whole batch
            token_stats = parallel.merge(token_stats)
            both = torch.cat([token_stats[k] for k in range(len(batch))], dim=1)  # (2, tokens)
            low, high = both.amin(dim=1, keepdim=True), both.amax(dim=1, keepdim=True)
            entropy, divergence = (both - low) / (high - low).clamp(min=1e-12)
            soft_or = 1 - (1 - entropy) * (1 - divergence)
            weights[soft_or.argsort(descending=True, stable=True)[max(round(args.tip_fraction * tokens), 1) :]] = 0
        trained, weight_sum = int((weights > 0).sum()), float(weights.sum())  # the sum is the loss's one denominator
        weights = (weights / (weight_sum or 1)).split(sizes.tolist())  # of each response (R,)
        score_time = time.time() - score_start

        # ---- train: one optimizer step, gradients accumulated over micro-batches
        train_start = time.time()
        sums, diff_max = torch.zeros(16, dtype=torch.float64), torch.zeros(())
        for micro_batch, target in zip(micro_batches, cached, strict=True):
            prompt_ids, chosen_ids = [prompts[batch[k]] for k in micro_batch], [response_ids[k] for k in micro_batch]
            reported = torch.tensor([lp for k in micro_batch for lp in responses[k].sampler_logprobs], device=device)  # (N,)
            with common.autocast(device, dtype):
                hidden, head, ids = common.response_hidden(model, prompt_ids, chosen_ids)  # (N, H), (V, H), (N,)
                target = target.to(device, non_blocking=True)  # (N, V) or (N, Ht)
                target = TeacherLogits(target) if cache_logits else TeacherHead(target, teacher_head)
                weight = torch.cat([torch.zeros(0), *(weights[k] for k in micro_batch)])  # (N,)
                weight = weight.to(device, torch.promote_types(dtype, torch.float32))
                options = {"jsd_beta": args.jsd_beta, "temperature": args.temperature, "target_ids": ids}
                if args.loss in ("sampled", "reward_free"):
                    # d/dtheta E_student[log p_student - log p_teacher] by the score function: the log-ratio is a
                    # constant per-token advantage; differentiating through it instead would carry no teacher signal
                    _, stats = fused_linear_divergence(hidden.detach(), head.detach(), target, **options)
                    new_logprobs, _ = fused_linear_logprob(hidden, head, ids, temperature=args.temperature)  # (N,)
                    advantage = stats.teacher_logprob - stats.student_logprob  # (N,)
                    if args.loss == "reward_free":
                        advantage = torch.full_like(advantage, -1)  # the control: the teacher is measured, and has no say
                    if args.tis_cap and args.sampler == "vllm":
                        # truncated importance sampling: vLLM drew the tokens, and its rounding makes it another policy
                        advantage = advantage * (stats.student_logprob - reported).exp().clamp(max=args.tis_cap)
                    loss = -(weight * advantage * new_logprobs).sum()
                else:
                    # sum_n w_n D_n
                    loss, stats = fused_linear_divergence(hidden, head, target, kind=args.loss, weight=weight, **options)
                    if trained < tokens:  # there the tokens of weight 0 are left out; the metrics are means over all
                        _, stats = fused_linear_divergence(hidden.detach(), head.detach(), target, **options)
            diff = (stats.student_logprob - reported).abs()  # (N,)
            diff_max = torch.cat([diff_max[None], diff.float().cpu()]).max()
            values = [
                loss.detach() * tokens,
                stats.reverse_kl.sum(),
                stats.forward_kl.sum(),
                stats.student_entropy.sum(),
                stats.teacher_entropy.sum(),
                diff.sum(),
            ]
            sums[:6] += torch.stack([v.double().cpu() for v in values])
            sums[6:12] += telemetry.sums_by_third(stats.reverse_kl, [len(r) for r in chosen_ids])
            sums[12:] += telemetry.top_k_sums(hidden, head, target, args.temperature, tokens)
            samples.keep(step, micro_batch, chosen_ids, **stats._asdict())
            # last, as FSDP2 then takes the head back, and times the ranks over which it averages
            (loss * parallel.world_size()).backward()
        sums, grad_norm = parallel.all_reduce(sums), common.clip_gradients(model, args.max_grad_norm)
        stop.unless_finite(step, policy_loss=sums[0], grad_norm=grad_norm)
        if weight_sum:  # else nothing is to be learned, and AdamW's momentum would move the weights nevertheless
            optimizer.step()
        optimizer.zero_grad()
        train_time = time.time() - train_start

        sync_start = time.time()
        sampler.update_weights(model)
        sync_time, step_time = time.time() - sync_start, time.time() - step_start

        # ---- log
        policy_loss, reverse_kl, forward_kl, entropy, teacher_entropy, diff_mean = (sums[:6] / tokens).tolist()
        early, middle, late = (sums[6:9] / sums[9:12].clamp(min=1)).tolist()
        overlap, student_mass, teacher_mass = (sums[12:15] / sums[15]).tolist()
        read = tokens + sum(len(prompts[i]) for i in batch)  # by the student when it samples and trains, and by the teacher
        run.spend(updates=int(weight_sum > 0), sampled_tokens=tokens, flops=read * ((2 + 6) * params + 2 * teacher_params))
        metrics = {
            "charts/response_length": tokens / len(batch),
            "charts/truncated_frac": sum(r.truncated for r in responses) / len(batch),
            "charts/repetition": telemetry.repetition(response_ids),
            "charts/learning_rate": optimizer.param_groups[0]["lr"],
            "charts/tokens_per_sec": tokens / step_time,
            "charts/trained_frac": trained / tokens,
            "losses/policy_loss": policy_loss,
            "losses/reverse_kl": reverse_kl,
            "losses/reverse_kl_early": early,
            "losses/reverse_kl_middle": middle,
            "losses/reverse_kl_late": late,
            "losses/forward_kl": forward_kl,
            "losses/entropy": entropy,
            "losses/teacher_entropy": teacher_entropy,
            "losses/grad_norm": grad_norm,
            "debug/sampler_logprob_diff_mean": diff_mean,
            "debug/sampler_logprob_diff_max": float(parallel.all_reduce(diff_max, largest=True)),
            "debug/canary_logprob_diff": sampler.canary_logprob_diff,
            "debug/out_of_vocab": out_of_vocab,
            "debug/topk_overlap": overlap,
            "debug/topk_overlap_mass": student_mass,
            "debug/topk_overlap_teacher_mass": teacher_mass,
            "time/rollout": rollout_time,
            "time/score": score_time,
            "time/train": train_time,
            "time/sync": sync_time,
            "time/step": step_time,
        }
        if run.labels:
            metrics |= {"charts/labels_used": len(run.labels)}
        if args.reward_weight:
            metrics |= {"charts/reward": sum(rewards) / len(rewards)}
        if args.eval_every and (step % args.eval_every == 0 or step == total_steps):
            metrics |= evaluate(step)
        run.log(
            step, metrics, f"reverse_kl {reverse_kl:.4f}, {tokens / len(batch):.0f} tokens, {tokens / step_time:.0f} tok/s"
        )
        samples.write(step, [problems[i] for i in batch], response_ids, [r.truncated for r in responses], grader)
        stop.if_truncated(step, metrics["charts/truncated_frac"])
        run.checkpoint(step, model, optimizer, stream)

    grader.close()
    run.finish(model, tokenizer, dtype)


if __name__ == "__main__":
    common.run(main, Args)
