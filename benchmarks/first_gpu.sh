#!/usr/bin/env bash
# The first hour on a GPU, in two calls of ten minutes: what first_gpu.py says. Run it again to go on; what is done is skipped.
#   bash benchmarks/first_gpu.sh runs/first_gpu
#   bash benchmarks/first_gpu.sh runs/first_gpu --dry-run     tiny, on a CPU
set -euo pipefail
cd "$(dirname "$0")/.."
python=.venv/bin/python
[ -x "$python" ] || python=python
exec "$python" benchmarks/first_gpu.py --out "$@"
