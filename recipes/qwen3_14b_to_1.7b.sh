#!/usr/bin/env bash
# recipes/README.md
# Qwen3-14B -> Qwen3-1.7B on one node of eight 80 GB GPUs: the stages of Qwen3-8B with a larger teacher. NOT RUN YET: the paper's
# teacher_rl has MATH 89.5; the figures beside the stages are those of the 8B teacher.
#
#     GRADER=boxed bash recipes/qwen3_14b_to_1.7b.sh [OUT [SEED]]
set -euo pipefail
export TEACHER=Qwen/Qwen3-14B
exec bash "$(dirname "$0")/qwen3_8b_to_1.7b.sh" "${1:-runs/qwen3_14b_to_1.7b}" "${2:-1}"
