# docs/lora.md
"""Adapters against all weights, in two parts.

toy     the bridge on the embedded world, RL teacher and student both by adapters of each rank, against full fine-tuning:
        accuracy of each stage
memory  grpo.py on SmolLM2-135M-Instruct, from the Python package that ships it: resident peak against --plan, and the size
        and time of a checkpoint and of what the run leaves

    python benchmarks/lora.py --out runs/lora
    python benchmarks/lora.py --parts memory --out runs/lora

Run again, the toy goes on where it was stopped, as bridge.py does; the tables are printed from what is there."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

MEASURE = """
import json, resource, runpy, sys, time
from pathlib import Path
from infra import checkpoint, run_folder
seen = {}
def timed(module, name, where, kind):
    save = getattr(module, name)
    def saving(*args):
        start = time.perf_counter()
        save(*args)
        seconds, folder = time.perf_counter() - start, where(args)
        seen[name] = {"seconds": seconds, "bytes": sum(path.stat().st_size for path in folder.rglob(kind))}
    setattr(module, name, saving)
timed(checkpoint, "save", lambda args: checkpoint.latest(args[0]), "*.distcp")
timed(run_folder, "save_model", lambda args: args[2], "*.safetensors")
sys.argv = sys.argv[2:]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
finally:
    seen["peak"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print("measured", json.dumps(seen))
"""


@dataclass
class Args:
    out: str = "runs/lora"
    """folder of all runs"""
    parts: tuple[Literal["toy", "memory"], ...] = ("toy", "memory")
    """what to measure"""
    ranks: tuple[int, ...] = (0, 4, 16, 64)
    """of the toy's adapters; 0 is full fine-tuning"""
    seeds: int = 3
    """of the toy's stages"""
    factor: float = 10
    """learning rate of adapters, in units of full fine-tuning's"""
    steps: int | None = None
    """of each stage of the toy, for a trial; none: as many as infra/worlds.py says"""
    more: str = ""
    """further flags for bridge.py"""
    mmap_threshold: int = 0
    """bytes from which on the C library gives freed memory back at once, so that the peak is what was in use (262144); 0: as
    it comes, with what its heap has kept"""
    jobs: int = 2
    """stages of the toy at work at once"""


def toy(args: Args, rank: int) -> Path:
    """Run the bridge with adapters of a rank; the folder with its report.json."""
    out, flags = Path(args.out) / (f"rank{rank}" if rank else "full"), []
    for name, rate in {"teacher-grpo": 2e-4, "warmup": 7e-4, "opd": 7e-4}.items():  # as in infra/worlds.py
        more = f" --lora-rank {rank} --learning-rate {args.factor * rate:g}" if rank else ""
        more += f" --max-steps {args.steps}" if args.steps else ""
        flags += [f"--{name}-flags={more}"]
    command = ["bridge.py", "--arms", "base", "bridge", "--out", out, "--seeds", args.seeds, "--jobs", args.jobs, *flags]
    command = [sys.executable, *map(str, command), *shlex.split(args.more)]
    print(f"$ {shlex.join(command[1:])}", flush=True)
    subprocess.run(command, check=True, cwd=ROOT)
    return out


def toy_table(folders: dict[int, Path]) -> str:
    """Accuracy of each stage and seed: the mean, and the seeds in brackets."""
    stages = ("teacher_rl", "bridge_warmup", "bridge")
    lines = ["| trained | learned of the teacher | " + " | ".join(stages) + " |", "|---" * 5 + "|"]
    for rank, out in folders.items():
        rows = json.loads((out / "report.json").read_text())["stages"]
        log = next(out.glob("seed*/teacher_rl.log"), None)
        share = re.search(r"--lora-rank \d+: (\d+) of (\d+)", log.read_text() if log else "")
        cells = [f"{rows[s]['accuracy']:.3f} ({', '.join(f'{a:.3f}' for a in rows[s]['by_seed'])})" for s in stages]
        learned = f"{int(share[1])} of {int(share[2])}" if share else "all"
        lines.append(f"| {f'rank {rank}' if rank else 'all weights'} | {learned} | {' | '.join(cells)} |")
    return "\n".join(lines)


def memory(args: Args, model: Path, rank: int) -> dict:
    """Plan and measure two steps of grpo.py on `model`; bytes and seconds."""
    problems = Path(args.out) / "problems.jsonl"
    rows = [{"problem": f"What is {a} + {a + 1}?", "answer": str(2 * a + 1)} for a in range(8)]
    problems.write_text("".join(json.dumps(row) + "\n" for row in rows))
    reward = Path(args.out) / "reward.py"  # differs within every group, so that all rows train
    reward.write_text("def reward(response):\n    return sum(map(ord, response)) % 97 / 97\n")
    flags = f"--train-data {problems} --grader {reward}:reward --lora-rank {rank} --sampler hf --prompts-per-step 4 " \
            f"--minibatch-prompts 2 --group-size 4 --max-response-tokens 48 --micro-batch-tokens 800 --max-steps 2 " \
            f"--save-every 1"  # fmt: skip
    out = Path(args.out) / f"memory{rank}"
    shutil.rmtree(out, ignore_errors=True)
    command = ["grpo.py", "--model", str(model), "--out", str(out), *flags.split()]
    plan = subprocess.run([sys.executable, *command, "--plan"], capture_output=True, text=True, check=True, cwd=ROOT)
    planned = float(re.search(r"^peak ([\d.]+) of", plan.stdout, re.MULTILINE)[1]) * 1e9
    launch = [sys.executable, "-c", MEASURE, "--", *command]
    env = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(args.mmap_threshold)} if args.mmap_threshold else os.environ
    run = subprocess.run(launch, capture_output=True, text=True, cwd=ROOT, env=env)
    found = re.search(r"^measured (.*)$", run.stdout, re.MULTILINE)
    assert found and run.returncode == 0, run.stderr[-2000:]
    return {"planned": planned} | json.loads(found[1])


def memory_table(measured: dict[int, dict]) -> str:
    lines = ["| trained | planned | used | checkpoint | written in | output | written in |", "|---" * 7 + "|"]
    for rank, one in measured.items():
        saved, final = one["save"], one["save_model"]
        lines.append(
            f"| {f'rank {rank}' if rank else 'all weights'} | {one['planned'] / 1e9:.2f} GB | {one['peak'] / 1e9:.2f} GB "
            f"| {saved['bytes'] / 1e6:.0f} MB | {saved['seconds']:.1f} s | {final['bytes'] / 1e6:.0f} MB | "
            f"{final['seconds']:.1f} s |"
        )
    return "\n".join(lines)


def main(args: Args) -> None:
    Path(args.out).mkdir(parents=True, exist_ok=True)
    if "memory" in args.parts:
        from benchmarks.real_model import smollm2

        model = Path(args.out) / "smollm2"
        if not (model / "tokenizer.json").exists():
            smollm2(model)
        print(memory_table({rank: memory(args, model, rank) for rank in (0, 32)}), flush=True)
    if "toy" in args.parts:
        folders = {rank: toy(args, rank) for rank in args.ranks}
        print(toy_table(folders))


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
