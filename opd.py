# docs/opd.md
"""On-policy distillation (OPD) with dense token-level supervision: stage 2b of the recipe.

Each step the student answers a batch of problems itself, the teacher reads those answers, and the student takes one
optimizer step on the full-vocabulary KL(student || teacher) at every token it sampled. Nothing flows back through the
sampling. No reward and no label is used; variants/opd_weighted.py has token weights that may. The teacher's final hidden
states are cached, not its logits: 8 KB a token for an 8B teacher instead of 304 KB. Deviation from the authors' code: the
loss is a mean over all tokens of the batch, not a mean of micro-batch means.

    python opd.py --teacher ckpt/8b_rl --student Qwen/Qwen3-1.7B --gradient-checkpointing
    python opd.py --teacher ckpt/8b_rl --student ckpt/warmup --gradient-checkpointing --out ckpt/bridge
"""

from dataclasses import dataclass
from typing import Literal

import torch

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
    out: str = "ckpt/opd"
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


def main(args: Args) -> None:
    # ---- what was typed, and whether it fits this machine
    common.check(args, positive="prompts_per_step")
    require(0 <= args.jsd_beta <= 1, f"--jsd-beta {args.jsd_beta}: must lie between 0 and 1")
    student, teacher = plan.Sizes.read(args.student, "--student"), plan.Sizes.read(args.teacher, "--teacher")
    work = {"trained": student, "frozen": {"teacher": teacher}, "sampled": student, "responses": args.prompts_per_step}
    plan.check(args, plan.Workload(**work, cached=True))

    # ---- problems and prompts
    grader = make_grader(args.grader)  # for --eval-data and the samples
    problems = dataset.load_problems(args.train_data, "--train-data", need_answers=False, **dataset.columns(args))
    tokenizer = models.load_tokenizer(args.student, "--student")
    teacher_tokenizer = models.load_tokenizer(args.teacher, "--teacher")
    checks = preflight.check_tokenizers(args, teacher_tokenizer, tokenizer, problems)
    both, thinking = [tokenizer, teacher_tokenizer], [args.thinking, args.teacher_thinking]
    problems, [prompts, teacher_prompts] = render_prompts(args, problems, both, thinking)
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
        cached = []  # per micro-batch (N, Ht) hidden states, on the CPU
        host_cache.clear()
        with models.on_device(teacher, device, args.offload_teacher):
            for rows in micro_batches:
                chosen_ids = [response_ids[k] for k in rows]
                with torch.no_grad(), models.autocast(device, dtype):
                    hidden, teacher_head, _ = batches.response_hidden(
                        teacher, [teacher_prompts[batch[k]] for k in rows], chosen_ids
                    )  # (N, Ht), (V, Ht)
                cached.append(host_cache.keep(hidden, dtype))
            teacher_head = teacher_head.detach()  # stays here when the teacher leaves
        meter.lap("score")

        # ---- train: one optimizer step, gradients accumulated over micro-batches
        for rows, teacher_hidden in zip(micro_batches, cached, strict=True):
            chosen_ids = [response_ids[k] for k in rows]
            with models.autocast(device, dtype):
                hidden, head, ids = batches.response_hidden(model, [prompts[batch[k]] for k in rows], chosen_ids)
                target = TeacherHead(teacher_hidden.to(device, non_blocking=True), teacher_head)  # (N, Ht), (V, Ht)
                loss, stats = fused_linear_divergence(  # sum_n w_n D_n
                    hidden,  # (N, H)
                    head,  # (V, H)
                    target,
                    kind=args.loss,
                    jsd_beta=args.jsd_beta,
                    weight=torch.full(ids.shape, 1 / tokens, dtype=torch.float64, device=device),  # a mean over all tokens
                    temperature=args.temperature,
                    target_ids=ids,
                )
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
        optimizer.step()
        optimizer.zero_grad()
        meter.lap("train")
        sampler.update_weights(model)
        meter.lap("sync")

        # ---- log
        read = tokens + sum(len(prompts[i]) for i in batch)  # by the student when it samples and trains, and by the teacher
        flops = read * (2 * params + models.train_flops(model) + 2 * teacher_params)
        run.spend(updates=1, sampled_tokens=tokens, flops=flops)
        metrics = meter.metrics() | telemetry.of_responses(responses)
        metrics |= {
            "charts/learning_rate": optimizer.param_groups[0]["lr"],
            "charts/tokens_per_sec": tokens / meter.laps["time/step"],
            "losses/grad_norm": grad_norm,
            "debug/canary_logprob_diff": sampler.canary_logprob_diff,
            "debug/out_of_vocab": out_of_vocab,
        }
        metrics |= common.evaluate(args, step, step == total_steps, sampler, tokenizer, grader, eval_set)
        run.log(step, metrics, "losses/reverse_kl")
        samples.write(step, [problems[i] for i in batch], responses, grader)
        stop.if_truncated(step, metrics["charts/truncated_frac"])
        run.checkpoint(step, model, optimizer, stream)

    grader.close()
    run.finish(model, tokenizer, dtype)


if __name__ == "__main__":
    cli.run(main, Args)
