# docs/variants.md
"""OPD with weights of tokens and problems: opd.py with the mean over tokens replaced by a weighted one.

--tip-fraction   TIP (arXiv 2604.14084): only the tokens where the student is unsure or disagrees with the teacher
--paced          PACED (arXiv 2603.11178): problems that the student sometimes passes count more
--reward-weight  right responses count more

The weights multiply, and their sum over the whole batch is the one denominator. With none of the flags it is opd.py, bit for
bit.

    python variants/opd_weighted.py --teacher ckpt/8b_rl --student ckpt/warmup --tip-fraction 0.5
    python variants/opd_weighted.py --teacher ckpt/8b_rl --student ckpt/warmup --paced results/generations.jsonl
    python variants/opd_weighted.py --teacher ckpt/8b_rl --student ckpt/warmup --reward-weight 1
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))  # the repository's root

import common
from infra import batches, cli, dataset, models, parallel, plan, preflight, run_folder, telemetry
from infra.cli import require
from infra.meter import Meter
from infra.prompts import render_prompts
from infra.reward import make_grader
from infra.samples_page import Samples
from kernels import TeacherHead, fused_linear_divergence


@dataclass(kw_only=True)
class Args(common.RunArgs, common.RolloutArgs):
    teacher: str
    """frozen target: hub id or local folder of a causal LM"""
    student: str
    """policy to train: hub id or local folder; same tokenizer as the teacher"""
    out: str = "ckpt/opd_weighted"
    """output folder: Hugging Face checkpoint, metrics.jsonl, run.json"""
    teacher_thinking: bool = False
    """let the teacher's chat template open a thinking block"""
    offload_teacher: bool = False
    """keep the teacher in the CPU's memory except while it scores; its head stays on the GPU"""
    preflight_only: bool = False
    """check that teacher and student fit, print what was found and end without training"""
    force: bool = False
    """go on where the preflight finds an error, recording it in run.json"""

    # algorithm
    prompts_per_step: int = 256
    """problems sampled per step, one response each"""
    epochs: int = 15
    """passes over the problems"""
    max_steps: int | None = None
    """stop after so many steps instead"""
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
    loss: Literal["reverse_kl", "forward_kl", "jsd"] = "reverse_kl"
    """reverse_kl: KL(student || teacher); forward_kl: KL(teacher || student); jsd: between the two"""
    jsd_beta: float = 0.5
    """jsd's weight of the teacher in the mixture: 0 is forward_kl, 1 is reverse_kl"""
    tip_fraction: float = 1.0
    """TIP: train on this fraction of a step's tokens, those of the highest entropy or divergence; 1: on all"""
    paced: str | None = None
    """PACED: weight a problem by p(1 - p), p its pass rate in this generations.jsonl of eval_math.py; uses labels"""
    reward_weight: float = 0.0
    """W: weight a response by 1 - W + W * reward; needs answers, uses labels; 0: off"""


def main(args: Args) -> None:
    # ---- what was typed, and whether it fits this machine
    common.check(args, positive="prompts_per_step")
    require(0 <= args.jsd_beta <= 1, f"--jsd-beta {args.jsd_beta}: must lie between 0 and 1")
    require(0 < args.tip_fraction <= 1, f"--tip-fraction {args.tip_fraction}: must be above 0 and at most 1")
    require(0 <= args.reward_weight <= 1, f"--reward-weight {args.reward_weight}: must lie between 0 (off) and 1")
    student, teacher = plan.Sizes.read(args.student, "--student"), plan.Sizes.read(args.teacher, "--teacher")
    work = {"trained": student, "frozen": {"teacher": teacher}, "sampled": student, "responses": args.prompts_per_step}
    plan.check(args, plan.Workload(**work, cached=True))

    # ---- problems and prompts
    grader = make_grader(args.grader)  # for --eval-data, --reward-weight and the samples
    answers = args.reward_weight > 0  # are needed
    problems = dataset.load_problems(args.train_data, "--train-data", answers, args.prompt_column, args.answer_column)
    tokenizer = models.load_tokenizer(args.student, "--student")
    teacher_tokenizer = models.load_tokenizer(args.teacher, "--teacher")
    checks = preflight.check_tokenizers(args, teacher_tokenizer, tokenizer, problems)
    both, thinking = [tokenizer, teacher_tokenizer], [args.thinking, args.teacher_thinking]
    problems, [prompts, teacher_prompts] = render_prompts(args, problems, both, thinking)
    problem_weights = dataset.paced_weights(args.paced, problems) if args.paced else [1.0] * len(problems)
    eval_set = common.load_eval(args, tokenizer, problems, grader.uses_labels)
    total_steps = common.count_steps(args, len(problems), args.prompts_per_step, "--prompts-per-step")

    # ---- models, sampler, optimizer
    run = None if args.preflight_only else run_folder.Run(args, total_steps, problems)  # else check_models ends the process
    cli.seed_everything(args.seed)
    device, dtype = models.device_and_dtype(args.dtype)
    model = models.load_policy(args, args.student, "--student", device, dtype)
    teacher = models.load_frozen(args, args.teacher, "--teacher", device, dtype)
    with models.on_device(teacher, device, args.offload_teacher):
        preflight.check_models(args, checks, run, model, teacher, tokenizer, teacher_tokenizer, prompts, teacher_prompts)
    if args.gradient_checkpointing:
        models.enable_gradient_checkpointing(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate, weight_decay=args.weight_decay, fused=True)
    stream = dataset.ProblemStream(len(problems), args.seed)
    start = run.resume(model, optimizer, stream)
    if args.paced:
        run.consult(problems)  # eval_math.py did, for their pass rates
    sampler = common.make_sampler(args, model, args.student, tokenizer, dtype, max(map(len, prompts + eval_set[1])))
    samples = Samples(run.out, tokenizer, args.sample_every, colour_by="reverse_kl")
    stop = run_folder.StopRules(args, run, model, tokenizer, dtype)
    stop.watch(sampler)
    host_cache = models.HostCache()
    params, teacher_params = models.count_params(model, teacher)

    if start == 0 and args.eval_every:
        run.log(0, common.evaluate(args, 0, False, sampler, tokenizer, grader, eval_set))
    for step in range(start + 1, total_steps + 1):
        optimizer.param_groups[0]["lr"] = common.learning_rate(args, step, total_steps)
        meter = Meter()

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
        meter.lap("rollout")

        # ---- this rank's rows; teacher and student pass over the same micro-batches
        longest = [max(len(prompts[i]), len(teacher_prompts[i])) + len(r) for i, r in zip(batch, response_ids, strict=True)]
        micro_batches = parallel.share(batches.micro_batches(longest, args.micro_batch_tokens))

        # ---- score: the teacher reads the answers behind its own rendering of the prompts
        token_stats = {}  # for TIP: of each response the student's entropy and the reverse KL, (2, R)
        cached = []  # per micro-batch (N, Ht) hidden states, on the CPU
        host_cache.clear()
        with models.on_device(teacher, device, args.offload_teacher):
            for rows in micro_batches:
                chosen_ids = [response_ids[k] for k in rows]
                with torch.no_grad(), models.autocast(device, dtype):
                    hidden, teacher_head, _ = batches.response_hidden(
                        teacher, [teacher_prompts[batch[k]] for k in rows], chosen_ids
                    )
                    if args.tip_fraction < 1:  # the student reads them too
                        target = TeacherHead(hidden.to(dtype), teacher_head)
                        states, head, _ = batches.response_hidden(model, [prompts[batch[k]] for k in rows], chosen_ids)
                        _, stats = fused_linear_divergence(states, head, target, temperature=args.temperature)
                        both = torch.stack([stats.student_entropy, stats.reverse_kl]).double().cpu()  # (2, N)
                        token_stats |= zip(rows, both.split([len(r) for r in chosen_ids], dim=1), strict=True)
                cached.append(host_cache.keep(hidden, dtype))
            teacher_head = teacher_head.detach()  # stays here when the teacher leaves
        meter.lap("score")

        # ---- weights of the tokens, which this variant is about
        weights = torch.tensor([problem_weights[i] for i in batch], dtype=torch.float64)  # (B,)
        if args.reward_weight:
            run.consult(problems[i] for i in batch)
            rewards = common.grade(grader, tokenizer, response_ids, [problems[i] for i in batch])
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

        # ---- train: one optimizer step, gradients accumulated over micro-batches
        for rows, teacher_hidden in zip(micro_batches, cached, strict=True):
            chosen_ids = [response_ids[k] for k in rows]
            with models.autocast(device, dtype):
                hidden, head, ids = batches.response_hidden(model, [prompts[batch[k]] for k in rows], chosen_ids)
                target = TeacherHead(teacher_hidden.to(device, non_blocking=True), teacher_head)  # (N, Ht), (V, Ht)
                options = {"temperature": args.temperature, "target_ids": ids}
                loss, stats = fused_linear_divergence(  # sum_n w_n D_n
                    hidden,  # (N, H)
                    head,  # (V, H)
                    target,
                    kind=args.loss,
                    jsd_beta=args.jsd_beta,
                    weight=torch.cat([torch.zeros(0), *(weights[k] for k in rows)]).to(device),  # a mean by weight
                    **options,
                )
                if trained < tokens:  # there the tokens of weight 0 are left out; the metrics are means over all
                    _, stats = fused_linear_divergence(hidden.detach(), head.detach(), target, **options)
            meter.sum("losses/policy_loss", loss)
            telemetry.add_divergences(meter, stats, "reverse_kl", [len(r) for r in chosen_ids])
            telemetry.add_overlap(meter, hidden, head, target, args.temperature, tokens)
            reported = torch.tensor([lp for k in rows for lp in responses[k].sampler_logprobs], device=device)  # (N,)
            telemetry.add_sampler_difference(meter, stats.student_logprob, reported)
            samples.keep(step, rows, chosen_ids, **stats._asdict())
            # last: FSDP2's backward frees the head that was gathered. It averages over the ranks, hence the factor
            (loss * parallel.world_size()).backward()
        grad_norm = models.clip_gradients(model, args.max_grad_norm)
        stop.unless_finite(step, policy_loss=meter.total("losses/policy_loss"), grad_norm=grad_norm)
        if weight_sum:  # else nothing is to be learned, and AdamW's momentum would move the weights nevertheless
            optimizer.step()
        optimizer.zero_grad()
        meter.lap("train")
        sampler.update_weights(model)
        meter.lap("sync")

        # ---- log
        read = tokens + sum(len(prompts[i]) for i in batch)  # by the student when it samples and trains, and by the teacher
        flops = read * (2 * params + models.train_flops(model) + 2 * teacher_params)
        run.spend(updates=int(weight_sum > 0), sampled_tokens=tokens, flops=flops)
        metrics = meter.metrics() | telemetry.of_responses(responses)
        metrics |= {
            "charts/learning_rate": optimizer.param_groups[0]["lr"],
            "charts/tokens_per_sec": tokens / meter.laps["time/step"],
            "losses/grad_norm": grad_norm,
            "debug/canary_logprob_diff": sampler.canary_logprob_diff,
            "debug/out_of_vocab": out_of_vocab,
        }
        metrics |= {"charts/trained_frac": trained / tokens}
        if run.labels:
            metrics |= {"charts/labels_used": len(run.labels)}
        if args.reward_weight:
            metrics |= {"charts/reward": sum(rewards) / len(rewards)}
        metrics |= common.evaluate(args, step, step == total_steps, sampler, tokenizer, grader, eval_set)
        run.log(step, metrics, "losses/reverse_kl")
        samples.write(step, [problems[i] for i in batch], responses, grader)
        stop.if_truncated(step, metrics["charts/truncated_frac"])
        run.checkpoint(step, model, optimizer, stream)

    grader.close()
    run.finish(model, tokenizer, dtype)


if __name__ == "__main__":
    cli.run(main, Args)
