#!/usr/bin/env bash
# recipes/README.md
# Qwen3-1.7B -> Qwen3-0.6B on one 24 GB GPU, by the commands of qwen3_8b_to_1.7b_one_gpu.sh. NOT RUN YET; the paper has no such
# pair, so the numbers in that file are not for this one.
#
#     bash recipes/qwen3_1.7b_to_0.6b_one_gpu.sh [OUT [SEED]]
set -euo pipefail
export TEACHER=${TEACHER:-Qwen/Qwen3-1.7B} STUDENT=${STUDENT:-Qwen/Qwen3-0.6B}
exec bash "$(dirname "$0")/qwen3_8b_to_1.7b_one_gpu.sh" "${1:-runs/qwen3_1.7b_to_0.6b_one_gpu}" "${2:-1}"
