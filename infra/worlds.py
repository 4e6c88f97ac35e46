# docs/bridge.md
"""The settings of the embedded worlds' stages, where the command line gives none."""

import os
import shlex

WORLDS = {  # where they differ; all were chosen on the worlds' dev splits (docs/bridge.md)
    "arithmetic": {"response_tokens": 64, "micro_batch_tokens": 2048, "teacher_steps": 40},
    "swaps": {"response_tokens": 72, "micro_batch_tokens": 4096, "teacher_steps": 60},
}


def fill_in(args) -> None:
    """Fill an embedded world's settings into bridge.py's Args; flags of the command line come last, and the last counts."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # two threads gain little here, and stall on a busy machine
    args.jobs = args.jobs or min(os.cpu_count(), 4)
    folder, world = f"{args.out}/world", WORLDS[args.world]
    args.teacher, args.student = f"{folder}/teacher_base", f"{folder}/student_base"
    args.benchmarks = (f"{folder}/test.jsonl",)
    prompt = f'--instruction "" --max-response-tokens {world["response_tokens"]}'
    shared, micro = (
        f"{prompt} --eval-data {shlex.quote(folder)}/dev.jsonl",
        f"--micro-batch-tokens {world['micro_batch_tokens']}",
    )
    grpo = f"{shared} --prompts-per-step 32 --minibatch-prompts 16 {micro} --eval-every 10"
    dense = f"{shared} --learning-rate 7e-4 {micro}"
    rollouts = 1 if args.labels else 4  # 2,048 in all: of the 2,048 unlabeled prompts, or of the 512 labeled ones
    warmup = f"{dense} --rollouts-per-prompt {rollouts} --rollouts-per-step 64 --eval-every 20"
    args.teacher_grpo_flags = f"{grpo} --learning-rate 2e-4 --max-steps {world['teacher_steps']} {args.teacher_grpo_flags}"
    args.student_grpo_flags = f"{grpo} --learning-rate 2e-4 --max-steps 60 {args.student_grpo_flags}"
    args.stage3_flags = f"{grpo} --learning-rate 1e-4 --max-steps 40 {args.stage3_flags}"
    args.warmup_flags = f"{warmup} --max-steps 100 {args.warmup_flags}"
    args.opd_flags = f"{dense} --prompts-per-step 64 --eval-every 50 --max-steps 200 {args.opd_flags}"
    args.eval_flags = f"{prompt} --samples 4 --temperature 1 --top-p 1 --top-k 0 {args.eval_flags}"
