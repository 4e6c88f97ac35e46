#!/usr/bin/env bash
# recipes/README.md
# Llama-3.3-70B-Instruct -> Llama-3.1-8B-Instruct on four nodes of eight 80 GB GPUs with a shared folder. NOT RUN YET.
# The paper's ordering on this pair: raw_teacher < direct_grpo < bridge. What is not set has the paper's value by default.
# Started on every node at once, and again to go on with what is not finished:
#
#     NODE_RANK=0 HEAD=node0 GRADER=boxed bash recipes/llama3_70b_to_8b.sh [OUT [SEED]]
set -euo pipefail
cd "$(dirname "$0")/.."

out=${1:-runs/llama3_70b_to_8b} seed=${2:-1} grader=${GRADER:-math} data=open-r1/DAPO-Math-17k-Processed
teacher=meta-llama/Llama-3.3-70B-Instruct student=meta-llama/Llama-3.1-8B-Instruct
launch="torchrun --nnodes 4 --node-rank $NODE_RANK --rdzv-backend c10d --rdzv-endpoint $HEAD:29500 --nproc_per_node 8"
stage="--seed $seed --gradient-checkpointing --resume"
large="--vllm-tp 8"  # eight GPUs hold one copy of the teacher for vLLM

# ---- labels: 80 % for the teacher (or for direct_grpo), 20 % held out for the last stage
[ "$NODE_RANK" != 0 ] || python -c "from infra.dataset import split_labels as split; split('$data', '--train-data', '$out/data')"
train=$out/data/train.jsonl heldout=$out/data/heldout.jsonl
prompts=${PROMPTS:-$train}  # of the dense stages, which need no labels: PROMPTS=AI-MO/NuminaMath-CoT has 860,000 more

# ---- teacher_rl: the labels spent on the teacher
$launch grpo.py --model $teacher --train-data $train --grader $grader --out $out/teacher_rl $stage $large \
    --micro-batch-tokens 8448

# ---- direct_grpo: the same labels spent on the student. Above raw_teacher, below bridge
$launch grpo.py --model $student --train-data $train --grader $grader --out $out/direct_grpo $stage

# ---- bridge: the RL teacher through warmup and OPD.
$launch fkl_warmup.py --teacher $out/teacher_rl --student $student --train-data $prompts --out $out/bridge_warmup $stage $large
$launch opd.py --teacher $out/teacher_rl --student $out/bridge_warmup --train-data $prompts --out $out/bridge $stage

# ---- no_opd: the warmup's loss for as many updates as warmup and OPD make together
$launch fkl_warmup.py --teacher $out/teacher_rl --student $student --train-data $prompts --out $out/no_opd $stage $large \
    --rollouts-per-prompt 16

# ---- raw_teacher: a teacher that saw no reward through the same bridge. Below direct_grpo
$launch fkl_warmup.py --teacher $teacher --student $student --train-data $prompts --out $out/raw_teacher_warmup $stage $large
$launch opd.py --teacher $teacher --student $out/raw_teacher_warmup --train-data $prompts --out $out/raw_teacher $stage

# ---- no_warmup: OPD from the student as it came, as many updates
$launch opd.py --teacher $out/teacher_rl --student $student --train-data $prompts --out $out/no_warmup $stage --epochs 16

# ---- bridge_grpo: the held-out labels, spent on the bridged student
$launch grpo.py --model $out/bridge --train-data $heldout --grader $grader --out $out/bridge_grpo $stage

# ---- measure: MATH-500, AIME 2024 and 2025, 16 samples a problem
$launch eval_math.py --model $teacher --grader $grader --seed $seed --out $out/eval/teacher_base $large
$launch eval_math.py --model $out/teacher_rl --grader $grader --seed $seed --out $out/eval/teacher_rl $large
$launch eval_math.py --model $student --grader $grader --seed $seed --out $out/eval/base
for arm in direct_grpo raw_teacher no_warmup no_opd bridge bridge_grpo; do
    $launch eval_math.py --model $out/$arm --grader $grader --seed $seed --out $out/eval/$arm
done
for arm in direct_grpo raw_teacher no_warmup no_opd bridge_grpo; do
    [ "$NODE_RANK" != 0 ] || python eval_math.py --compare $out/eval/bridge $out/eval/$arm
done
