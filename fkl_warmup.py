# docs/fkl_warmup.md
"""Forward-KL warmup on teacher rollouts: stage 2a of the recipe.

The teacher answers every problem once or more; the student then learns to cover those answers with the full-vocabulary
KL(teacher || student) at every response token. It brings the student near enough to the teacher for on-policy
distillation (opd.py) to be informative. No reward and no label is used; docs/options.md has token weights that do.
`--loss ce` is plain cross-entropy on the same rollouts, the SFT control. The authors released no warmup code: batch,
learning rate and epochs here are this project's.

    python fkl_warmup.py --teacher ckpt/8b_rl --student Qwen/Qwen3-1.7B --out ckpt/warmup
    python fkl_warmup.py --teacher ckpt/8b_rl --student Qwen/Qwen3-1.7B --rollouts rollouts.jsonl --loss ce --out ckpt/sft
"""

import json
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
from kernels import TeacherHead, fused_linear_divergence, fused_linear_logprob
from samples_page import Samples

PROBLEMS_PER_PART = 1024  # sampled between two writes to rollouts.jsonl


@dataclass
class Args:
    # experiment
    teacher: str
    """frozen target: hub id or local folder of a causal LM"""
    student: str
    """policy to train: hub id or local folder; same tokenizer as the teacher"""
    out: str = "ckpt/warmup"
    """output folder: Hugging Face checkpoint, rollouts.jsonl, metrics.jsonl, run.json"""
    train_data: str = "open-r1/DAPO-Math-17k-Processed"
    """problems, answers not needed: hub id (name, name:config, name:config:split) or local .jsonl/.parquet"""
    label_split: str | None = None
    """labeled problems; the run stops before it consults an answer of any other (none: no such bound)"""
    rollouts: str | None = None
    """reuse the rollouts.jsonl of an earlier run with this teacher and data instead of sampling"""
    eval_data: str | None = None
    """labeled problems for the learning curve: one response each, sampled from the student"""
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
    rollouts_per_prompt: int = 1
    """teacher's responses per problem"""
    max_response_tokens: int = 8192
    """longer responses are truncated"""
    temperature: float = 1.0
    """sampling temperature; the KL sees both models' logits scaled by the same"""
    top_p: float = 1.0
    """must stay 1: the KL is an expectation under the teacher's whole distribution"""
    rollout_batch_tokens: int = 131072
    """hf sampler's cache: prompt + response tokens summed over the rows of a batch"""
    sampler: Literal["auto", "vllm", "hf"] = "auto"
    """auto is vllm on CUDA where it is installed, else hf"""
    vllm_gpu_memory_utilization: float = 0.5
    """share of the GPU's memory for vLLM's weights and cache"""
    vllm_tp: int = 1
    """ranks of torchrun on one node that share vLLM's copy of the weights"""
    vllm_sleep: bool = True
    """drop vLLM's weights and cache behind the rollouts"""
    canary_tolerance: float | None = None
    """stop if a sync leaves vLLM's log-probabilities further from the trainer's; none: 1e-4, in bfloat16 0.2; 0: off"""

    # optimisation
    rollouts_per_step: int = 256
    """teacher's responses per optimizer step"""
    epochs: int = 1
    """passes over the rollouts"""
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
    stop_truncated_frac: float = 0.95
    """save and stop once more than this share of the responses is truncated for stop_patience steps; 0: never"""
    stop_patience: int = 10
    """steps in a row that stop_truncated_frac waits for"""

    # loss
    loss: Literal["forward_kl", "ce"] = "forward_kl"
    """forward_kl: KL(teacher || student) over the vocabulary; ce: cross-entropy on the sampled tokens (SFT)"""
    paced: str | None = None
    """PACED: weight a problem by p(1 - p), p its pass rate in this generations.jsonl of eval_math.py; uses labels"""
    reward_weight: float = 0.0
    """W: weight a response by 1 - W + W * reward; needs answers, uses labels; 0: off"""


def main(args: Args) -> None:
    # ---- check what was typed, before anything expensive
    require(args.top_p == 1, f"--top-p {args.top_p}: training needs the full support; use --top-p 1 (and --temperature)")
    sizes = "rollouts_per_prompt rollouts_per_step max_prompt_tokens max_response_tokens temperature rollout_batch_tokens "
    sizes += "epochs max_steps micro_batch_tokens learning_rate keep_last stop_patience"
    common.require_positive(args, sizes)
    require(0 <= args.stop_truncated_frac <= 1, f"--stop-truncated-frac {args.stop_truncated_frac}: must lie in 0 to 1")
    require(not args.eval_every or args.eval_data, "--eval-every needs --eval-data")
    require(0 <= args.reward_weight <= 1, f"--reward-weight {args.reward_weight}: must lie between 0 (off) and 1")
    plan.check(
        args,
        lambda: plan.Workload(
            trained=plan.Sizes.read(args.student, "--student"),
            frozen={"teacher": (teacher := plan.Sizes.read(args.teacher, "--teacher"))},
            sampled=teacher,
            responses=args.rollouts_per_step,
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
    index = {problem.text: i for i, problem in enumerate(problems)}
    saved = dataset.load_rows(args.rollouts, "--rollouts") if args.rollouts else None
    if saved is not None:
        require(
            saved
            and all(row.get("problem") in index and row.get("response_ids") and "truncated" in row for row in saved)
            and max(max(row["response_ids"]) for row in saved) < len(tokenizer),
            f"--rollouts {args.rollouts}: needs response_ids of this tokenizer for problems of --train-data; give the "
            f"rollouts.jsonl and the --train-data of one run",
        )
    rollout_count = len(saved) if saved is not None else len(problems) * args.rollouts_per_prompt
    require(
        args.rollouts_per_step <= rollout_count,
        f"--rollouts-per-step {args.rollouts_per_step} is more than the "
        f"{rollout_count} rollouts; use at most that, or raise --rollouts-per-prompt",
    )
    total_steps = args.max_steps or -(-args.epochs * rollout_count // args.rollouts_per_step)  # the last wraps around

    # ---- models, optimizer
    run = None if args.preflight_only else run_folder.Run(args, total_steps)
    common.seed_everything(args.seed)
    device, dtype = common.device_and_dtype(args.dtype)
    model = common.load_model(args.student, "--student", device, dtype, trainable=True, hybrid_shard=args.hybrid_shard)
    teacher = common.load_model(args.teacher, "--teacher", device, dtype, trainable=False, hybrid_shard=args.hybrid_shard)
    preflight.check_models(args, checks, model, teacher, tokenizer, teacher_tokenizer, prompts, teacher_prompts, warmup=True)
    if args.preflight_only:
        print("preflight: nothing stands in the way" if not checks.forced else "preflight: goes on by --force alone")
        return
    run.note(preflight=preflight.record(checks))
    if args.gradient_checkpointing:
        common.enable_gradient_checkpointing(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate, weight_decay=args.weight_decay, fused=True)
    sampling = {"max_response_tokens": args.max_response_tokens, "temperature": args.temperature}
    grader = common.Grader()  # for --eval-data, --reward-weight and the samples
    samples = Samples(run.out, tokenizer, args.sample_every, colour_by="forward_kl")
    stop = run_folder.StopRules(args, run, model, tokenizer, dtype)

    # ---- rollout: the teacher answers every problem, once and for all steps
    rollout_start = time.time()
    if saved is None:
        longest = max(map(len, teacher_prompts))
        sampler = common.make_sampler(args, teacher, args.teacher, teacher_tokenizer, dtype, longest, **sampling)
        stop.watch(sampler)
        saved = teacher_rollouts(args, run, sampler, teacher_tokenizer, problems, teacher_prompts)
        sampler.sleep()
    saved = [row for row in saved if row["response_ids"]]  # none is left of one whose first id no token has
    rollout_time = time.time() - rollout_start
    params, teacher_params = common.count_params(model, teacher)
    sampled = sum(len(row["response_ids"]) for row in saved)
    read = sampled + sum(len(teacher_prompts[index[row["problem"]]]) for row in saved)
    run.spend(sampled_tokens=sampled, flops=2 * read * teacher_params)  # also where --rollouts saves doing it again

    # for --eval-data alone, and always hf: the teacher has the process's one vLLM engine
    eval_sampler = common.HFSampler(model, tokenizer, dtype, batch_tokens=args.rollout_batch_tokens, **sampling)
    stream = dataset.ProblemStream(len(saved), args.seed)

    def evaluate(step):
        answers = [p.answer for p in eval_problems]
        return common.evaluate(eval_sampler, tokenizer, eval_prompts, answers, grader, seed=(args.seed, step, 1))

    start = run.resume(model, optimizer, stream)
    if args.paced:
        run.consult(problems)  # eval_math.py did, for their pass rates
    if args.eval_every and start == 0:
        run.log(0, evaluate(0))
    for step in range(start + 1, total_steps + 1):
        step_start = time.time()
        batch = [saved[i] for i in stream.take(args.rollouts_per_step)]
        rows = [index[row["problem"]] for row in batch]
        response_ids = [row["response_ids"] for row in batch]
        tokens = sum(map(len, response_ids))

        # ---- weights of the tokens: all the same unless an option says otherwise (docs/options.md)
        weights = torch.tensor([problem_weights[i] for i in rows], dtype=torch.float64)  # (B,)
        if args.reward_weight:
            run.consult(problems[i] for i in rows)
            rewards = common.grade(grader, tokenizer, response_ids, [problems[i].answer for i in rows])
            weights *= 1 - args.reward_weight + args.reward_weight * torch.tensor(rewards, dtype=torch.float64)
        sizes = torch.tensor([len(r) for r in response_ids])
        weights = weights.repeat_interleave(sizes)  # (tokens,)
        trained, weight_sum = int((weights > 0).sum()), float(weights.sum())  # the sum is the loss's one denominator
        weights = (weights / (weight_sum or 1)).split(sizes.tolist())  # of each response (R,)

        # ---- train: one optimizer step, gradients accumulated over micro-batches
        sums, score_time = torch.zeros(15, dtype=torch.float64), 0.0
        lengths = [len(prompts[i]) + len(r) for i, r in zip(rows, response_ids, strict=True)]
        for micro_batch in parallel.share(common.micro_batches(lengths, args.micro_batch_tokens)):
            chosen_ids = [response_ids[k] for k in micro_batch]
            score_start = time.time()
            with torch.no_grad(), common.autocast(device, dtype):
                teacher_hidden, teacher_head, _ = common.response_hidden(
                    teacher, [teacher_prompts[rows[k]] for k in micro_batch], chosen_ids
                )  # (N, Ht), (V, Ht)
            score_time += time.time() - score_start

            with common.autocast(device, dtype):
                hidden, head, ids = common.response_hidden(model, [prompts[rows[k]] for k in micro_batch], chosen_ids)
                target = TeacherHead(teacher_hidden, teacher_head)
                weight = torch.cat([torch.zeros(0), *(weights[k] for k in micro_batch)])  # (N,)
                weight = weight.to(device, torch.promote_types(dtype, torch.float32))
                options = {"temperature": args.temperature, "target_ids": ids}
                if args.loss == "ce":
                    _, stats = fused_linear_divergence(hidden.detach(), head.detach(), target, **options)  # to log
                    logprobs, _ = fused_linear_logprob(hidden, head, ids)  # (N,): SFT has no temperature
                    loss = -(weight * logprobs).sum()
                else:
                    # sum_n w_n D_n
                    loss, stats = fused_linear_divergence(hidden, head, target, kind="forward_kl", weight=weight, **options)
                    if trained < tokens:  # there the tokens of weight 0 are left out; the metrics are means over all
                        _, stats = fused_linear_divergence(hidden.detach(), head.detach(), target, **options)
            values = [
                loss.detach() * tokens,
                stats.forward_kl.sum(),
                stats.reverse_kl.sum(),
                stats.student_entropy.sum(),
                stats.teacher_entropy.sum(),
            ]
            sums[:5] += torch.stack([v.double().cpu() for v in values])
            sums[5:11] += telemetry.sums_by_third(stats.forward_kl, [len(r) for r in chosen_ids])
            sums[11:] += telemetry.top_k_sums(hidden, head, target, args.temperature, tokens)
            samples.keep(step, micro_batch, chosen_ids, **stats._asdict())
            # last, as FSDP2 then takes the head back, and times the ranks over which it averages
            (loss * parallel.world_size()).backward()
        sums, grad_norm = parallel.all_reduce(sums), common.clip_gradients(model, args.max_grad_norm)
        stop.unless_finite(step, policy_loss=sums[0], grad_norm=grad_norm)
        if weight_sum:  # else nothing is to be learned, and AdamW's momentum would move the weights nevertheless
            optimizer.step()
        optimizer.zero_grad()
        step_time = time.time() - step_start

        # ---- log
        policy_loss, forward_kl, reverse_kl, entropy, teacher_entropy = (sums[:5] / tokens).tolist()
        early, middle, late = (sums[5:8] / sums[8:11].clamp(min=1)).tolist()
        overlap, student_mass, teacher_mass = (sums[11:14] / sums[14]).tolist()
        run.spend(updates=int(weight_sum > 0), flops=sum(lengths) * (6 * params + 2 * teacher_params))
        metrics = {
            "charts/response_length": tokens / len(batch),
            "charts/truncated_frac": sum(row["truncated"] for row in batch) / len(batch),
            "charts/repetition": telemetry.repetition(response_ids),
            "charts/learning_rate": optimizer.param_groups[0]["lr"],
            "charts/tokens_per_sec": tokens / step_time,
            "charts/trained_frac": trained / tokens,
            "losses/policy_loss": policy_loss,
            "losses/forward_kl": forward_kl,
            "losses/forward_kl_early": early,
            "losses/forward_kl_middle": middle,
            "losses/forward_kl_late": late,
            "losses/reverse_kl": reverse_kl,
            "losses/entropy": entropy,
            "losses/teacher_entropy": teacher_entropy,
            "losses/grad_norm": grad_norm,
            "debug/topk_overlap": overlap,
            "debug/topk_overlap_mass": student_mass,
            "debug/topk_overlap_teacher_mass": teacher_mass,
            "time/rollout": rollout_time if step == 1 else 0.0,
            "time/score": score_time,
            "time/train": step_time - score_time,
            "time/step": step_time,
        }
        if run.labels:
            metrics |= {"charts/labels_used": len(run.labels)}
        if args.reward_weight:
            metrics |= {"charts/reward": sum(rewards) / len(rewards)}
        if args.eval_every and (step % args.eval_every == 0 or step == total_steps):
            metrics |= evaluate(step)
        run.log(
            step, metrics, f"forward_kl {forward_kl:.4f}, {tokens / len(batch):.0f} tokens, {tokens / step_time:.0f} tok/s"
        )
        samples.write(step, [problems[i] for i in rows], response_ids, [row["truncated"] for row in batch], grader)
        stop.if_truncated(step, metrics["charts/truncated_frac"])
        run.checkpoint(step, model, optimizer, stream)

    grader.close()
    run.finish(model, tokenizer, dtype)


def teacher_rollouts(args, run, sampler, tokenizer, problems, prompts) -> list[dict]:
    """The rows of rollouts.jsonl. A part at a time goes to a file aside, where a killed run finds what it had sampled."""
    path, aside, n = run.out / "rollouts.jsonl", run.out / "rollouts.partial.jsonl", args.rollouts_per_prompt
    if path.exists():
        return dataset.load_rows(str(path), "--resume")
    lines = aside.read_text().splitlines(keepends=True) if aside.exists() else []
    lines = lines[: len(lines) // (PROBLEMS_PER_PART * n) * PROBLEMS_PER_PART * n]  # whole parts only
    parallel.barrier()  # every rank has read what rank 0 now writes to
    with (
        run_folder.rank_zero_file(aside, lines) as file,
        common.progress_bar(len(problems) * n, "teacher rollouts", "response") as bar,
    ):
        bar.update(len(lines))
        for start in range(len(lines) // n, len(problems), PROBLEMS_PER_PART):
            part = range(start, min(start + PROBLEMS_PER_PART, len(problems)))
            responses = sampler.sample([prompts[i] for i in part], n, seed=(args.seed, start), progress=bar)
            for k, r in enumerate(responses):
                row = {"problem": problems[start + k // n].text, "response_ids": r.ids, "truncated": r.truncated}
                lines.append(json.dumps(row | {"response": tokenizer.decode(r.ids)}) + "\n")
            file.writelines(lines[-len(responses) :])
            file.flush()
    if parallel.rank() == 0:
        aside.rename(path)
    return [json.loads(line) for line in lines]


if __name__ == "__main__":
    common.run(main, Args)
