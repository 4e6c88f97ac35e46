# docs/fkl_warmup.md
"""Forward-KL warmup on teacher rollouts: stage 2a of the recipe.

The teacher answers every problem once or more; the student then learns to cover those answers with the full-vocabulary
KL(teacher || student) at every response token. It brings the student near enough to the teacher for on-policy
distillation (opd.py) to be informative. No reward and no label is used; variants/fkl_weighted.py has token weights that
do. `--loss ce` is plain cross-entropy on the same rollouts, the SFT control. The authors released no warmup code: batch,
learning rate and epochs here are this project's.

    python fkl_warmup.py --teacher ckpt/8b_rl --student Qwen/Qwen3-1.7B --gradient-checkpointing --out ckpt/warmup
    python fkl_warmup.py --teacher ckpt/8b_rl --student Qwen/Qwen3-1.7B --gradient-checkpointing --loss ce --out ckpt/sft
"""

import json
import time
from dataclasses import dataclass
from typing import Literal

import torch

import common
from infra import batches, cli, dataset, models, parallel, plan, preflight, run_folder, telemetry
from infra.cli import require
from infra.meter import Meter
from infra.prompts import render_prompts
from infra.reward import make_grader
from infra.sampler import Response, vocabulary_size
from infra.sampler_hf import HFSampler
from infra.samples_page import Samples
from kernels import TeacherHead, fused_linear_divergence, fused_linear_logprob

PROBLEMS_PER_PART = 1024  # sampled between two writes to rollouts.jsonl


@dataclass(kw_only=True)
class Args(common.RunArgs, common.RolloutArgs):
    teacher: str
    """frozen target: hub id or local folder of a causal LM"""
    student: str
    """policy to train: hub id or local folder; same tokenizer as the teacher"""
    out: str = "ckpt/warmup"
    """output folder: Hugging Face checkpoint, rollouts.jsonl, metrics.jsonl, run.json"""
    rollouts: str | None = None
    """reuse the rollouts.jsonl of an earlier run with this teacher and data instead of sampling"""
    teacher_thinking: bool = False
    """let the teacher's chat template open a thinking block"""
    preflight_only: bool = False
    """check that teacher and student fit, print what was found and end without training"""
    force: bool = False
    """go on where the preflight finds an error, recording it in run.json"""

    # algorithm
    rollouts_per_prompt: int = 1
    """teacher's responses per problem"""
    rollouts_per_step: int = 256
    """teacher's responses per optimizer step"""
    epochs: int = 1
    """passes over the rollouts"""
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
    loss: Literal["forward_kl", "ce"] = "forward_kl"
    """forward_kl: KL(teacher || student) over the vocabulary; ce: cross-entropy on the sampled tokens (SFT)"""


def main(args: Args) -> None:
    # ---- what was typed, and whether it fits this machine
    common.check(args, positive="rollouts_per_prompt rollouts_per_step")
    student, teacher = plan.Sizes.read(args.student, "--student"), plan.Sizes.read(args.teacher, "--teacher")
    work = {"trained": student, "frozen": {"teacher": teacher}, "sampled": teacher, "responses": args.rollouts_per_step}
    plan.check(args, plan.Workload(**work, all_at_once=not args.rollouts))

    # ---- problems and prompts
    grader = make_grader(args.grader)  # for --eval-data and the samples
    problems = dataset.load_problems(args.train_data, "--train-data", need_answers=False, **dataset.columns(args))
    tokenizer = models.load_tokenizer(args.student, "--student")
    teacher_tokenizer = models.load_tokenizer(args.teacher, "--teacher")
    checks = preflight.check_tokenizers(args, teacher_tokenizer, tokenizer, problems)
    both, thinking = [tokenizer, teacher_tokenizer], [args.thinking, args.teacher_thinking]
    problems, [prompts, teacher_prompts] = render_prompts(args, problems, both, thinking)
    eval_set = common.load_eval(args, tokenizer, problems, grader.uses_labels)
    rollouts = load_rollouts(args, problems, vocabulary_size(tokenizer)) if args.rollouts else None
    rollout_count = len(problems) * args.rollouts_per_prompt if rollouts is None else len(rollouts)
    require(
        args.rollouts_per_step <= rollout_count,
        f"--rollouts-per-step {args.rollouts_per_step} is more than the {rollout_count} rollouts; use at most that, or "
        f"raise --rollouts-per-prompt",
    )
    total_steps = common.count_steps(args, rollout_count, args.rollouts_per_step, "--rollouts-per-step")

    # ---- models, sampler, optimizer
    run = None if args.preflight_only else run_folder.Run(args, total_steps, problems)  # else check_models ends the process
    cli.seed_everything(args.seed)
    device, dtype = models.device_and_dtype(args.dtype)
    model = models.load_policy(args, args.student, "--student", device, dtype)
    teacher = models.load_frozen(args, args.teacher, "--teacher", device, dtype)
    preflight.check_models(args, checks, run, model, teacher, tokenizer, teacher_tokenizer, prompts, teacher_prompts, True)
    if args.gradient_checkpointing:
        models.enable_gradient_checkpointing(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate, weight_decay=args.weight_decay, fused=True)
    # for --eval-data alone, and always hf: the teacher has the process's one vLLM engine
    limits = {"max_response_tokens": args.max_response_tokens, "batch_tokens": args.rollout_batch_tokens}
    eval_sampler = HFSampler(model, tokenizer, dtype, temperature=args.temperature, **limits)
    samples = Samples(run.out, tokenizer, args.sample_every, colour_by="forward_kl")
    stop = run_folder.StopRules(args, run, model, tokenizer, dtype)
    params, teacher_params = models.count_params(model, teacher)

    # ---- rollout: the teacher answers every problem, once and for all steps
    rollout_start = time.time()
    if rollouts is None:
        longest = max(map(len, teacher_prompts))
        sampler = common.make_sampler(args, teacher, args.teacher, teacher_tokenizer, dtype, longest)
        stop.watch(sampler)
        rollouts = sample_rollouts(args, run, sampler, teacher_tokenizer, problems, teacher_prompts)
        sampler.sleep()
    rollouts = answered(rollouts)
    sampled = sum(len(r.ids) for _, r in rollouts)
    read = sampled + sum(len(teacher_prompts[i]) for i, _ in rollouts)
    run.spend(sampled_tokens=sampled, flops=2 * read * teacher_params)  # also where --rollouts saves doing it again
    rollout_time = time.time() - rollout_start
    stream = dataset.ProblemStream(len(rollouts), args.seed)
    start = run.resume(model, optimizer, stream)

    if start == 0 and args.eval_every:
        run.log(0, common.evaluate(args, 0, False, eval_sampler, tokenizer, grader, eval_set))
    for step in range(start + 1, total_steps + 1):
        optimizer.param_groups[0]["lr"] = common.learning_rate(args, step, total_steps)
        meter = Meter()
        batch, responses = zip(*[rollouts[i] for i in stream.take(args.rollouts_per_step)], strict=True)
        response_ids = [r.ids for r in responses]
        tokens = sum(map(len, response_ids))

        # ---- score and train: one optimizer step, gradients accumulated over micro-batches
        longest = [max(len(prompts[i]), len(teacher_prompts[i])) + len(r) for i, r in zip(batch, response_ids, strict=True)]
        for rows in parallel.share(batches.micro_batches(longest, args.micro_batch_tokens)):
            chosen_ids = [response_ids[k] for k in rows]
            with torch.no_grad(), models.autocast(device, dtype):
                teacher_hidden, teacher_head, _ = batches.response_hidden(
                    teacher, [teacher_prompts[batch[k]] for k in rows], chosen_ids
                )  # (N, Ht), (V, Ht)
            meter.lap("score")
            with models.autocast(device, dtype):
                hidden, head, ids = batches.response_hidden(model, [prompts[batch[k]] for k in rows], chosen_ids)
                target = TeacherHead(teacher_hidden, teacher_head)
                weight = torch.full(ids.shape, 1 / tokens, dtype=torch.float64, device=device)  # a mean over all tokens
                options = {"kind": "forward_kl", "weight": weight, "temperature": args.temperature, "target_ids": ids}
                if args.loss == "ce":
                    _, stats = fused_linear_divergence(hidden.detach(), head.detach(), target, **options)  # to log
                    logprobs, _ = fused_linear_logprob(hidden, head, ids)  # (N,): SFT has no temperature
                    loss = -(weight.to(logprobs.dtype) * logprobs).sum()
                else:
                    loss, stats = fused_linear_divergence(hidden, head, target, **options)  # sum_n w_n D_n
            meter.sum("losses/policy_loss", loss)
            telemetry.add_divergences(meter, stats, "forward_kl", [len(r) for r in chosen_ids])
            telemetry.add_overlap(meter, hidden, head, target, args.temperature, tokens)
            samples.keep(step, rows, chosen_ids, **stats._asdict())
            # last: FSDP2's backward frees the head that was gathered. It averages over the ranks, hence the factor
            (loss * parallel.world_size()).backward()
            meter.lap("train")
        grad_norm = models.clip_gradients(model, args.max_grad_norm)
        stop.unless_finite(step, policy_loss=meter.total("losses/policy_loss"), grad_norm=grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        meter.lap("train")

        # ---- log
        read = tokens + sum(len(prompts[i]) for i in batch)  # by either model
        run.spend(updates=1, flops=read * (models.train_flops(model) + 2 * teacher_params))
        metrics = meter.metrics() | telemetry.of_responses(responses)
        metrics |= {
            "charts/learning_rate": optimizer.param_groups[0]["lr"],
            "charts/tokens_per_sec": tokens / meter.laps["time/step"],
            "losses/grad_norm": grad_norm,
            "time/rollout": rollout_time if step == 1 else 0.0,
        }
        metrics |= common.evaluate(args, step, step == total_steps, eval_sampler, tokenizer, grader, eval_set)
        run.log(step, metrics, "losses/forward_kl")
        samples.write(step, [problems[i] for i in batch], responses, grader)
        stop.if_truncated(step, metrics["charts/truncated_frac"])
        run.checkpoint(step, model, optimizer, stream)

    grader.close()
    run.finish(model, tokenizer, dtype)


def load_rollouts(args, problems, vocabulary: int) -> list[tuple[int, Response]]:
    """(index of the problem, response) of each row of --rollouts. Raises UsageError for a row that does not fit."""
    rows, index = dataset.load_rows(args.rollouts, "--rollouts"), {problem.key: i for i, problem in enumerate(problems)}
    require(
        rows
        and all(row.get("problem") in index and row.get("response_ids") and "truncated" in row for row in rows)
        and max(max(row["response_ids"]) for row in rows) < vocabulary,
        f"--rollouts {args.rollouts}: needs response_ids of this tokenizer for problems of --train-data; give the "
        f"rollouts.jsonl and the --train-data of one run",
    )
    return [(index[row["problem"]], Response(row["response_ids"], [], row["truncated"])) for row in rows]


def answered(rollouts: list[tuple[int, Response]]) -> list[tuple[int, Response]]:
    """Those of which something is left: a response is cut before an id that no token has. Raises UsageError if none is."""
    kept = [(i, response) for i, response in rollouts if response.ids]
    require(kept, "every rollout begins with an id that no token has; look at the head of --teacher")
    if len(kept) < len(rollouts):
        print(f"{len(rollouts) - len(kept)} of {len(rollouts)} rollouts left out, which begin with an id that no token has")
    return kept


def sample_rollouts(args, run, sampler, tokenizer, problems, prompts) -> list[tuple[int, Response]]:
    """(index of the problem, the teacher's response) of all rollouts, and rollouts.jsonl. A part at a time goes to a file
    aside, where a killed run finds what it had sampled."""
    path, aside, n = run.out / "rollouts.jsonl", run.out / "rollouts.partial.jsonl", args.rollouts_per_prompt
    if path.exists():
        rows = dataset.load_rows(str(path), "--resume")
    else:
        lines = aside.read_text(encoding="utf-8").splitlines(keepends=True) if aside.exists() else []
        lines = [line for line in lines if line.endswith("\n")]  # the last may be torn
        lines = lines[: len(lines) // (PROBLEMS_PER_PART * n) * PROBLEMS_PER_PART * n]  # whole parts only
        parallel.barrier()  # every rank has read what rank 0 now writes to
        with (
            run_folder.rank_zero_file(aside, lines) as file,
            cli.progress_bar(len(problems) * n, "teacher rollouts", "response") as bar,
        ):
            bar.update(len(lines))
            for start in range(len(lines) // n, len(problems), PROBLEMS_PER_PART):
                part = range(start, min(start + PROBLEMS_PER_PART, len(problems)))
                responses = sampler.sample([prompts[i] for i in part], n, seed=(args.seed, start), progress=bar)
                for k, r in enumerate(responses):
                    row = {"problem": problems[start + k // n].key, "response_ids": r.ids, "truncated": r.truncated}
                    lines.append(json.dumps(row | {"response": tokenizer.decode(r.ids)}) + "\n")
                file.writelines(lines[-len(responses) :])
                file.flush()
        if parallel.rank() == 0:
            aside.rename(path)
        rows = map(json.loads, lines)
    return [(k // n, Response(row["response_ids"], [], row["truncated"])) for k, row in enumerate(rows)]


if __name__ == "__main__":
    cli.run(main, Args)
