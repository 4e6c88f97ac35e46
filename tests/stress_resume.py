"""Kill -9 a training run at random moments, saving included, and go on with --resume each time: the final weights must be
bit-identical to those of an uninterrupted run with as many ranks.

    python tests/stress_resume.py --kills 30
    python tests/stress_resume.py --kills 10 --ranks 2 --script grpo
"""

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]
import torch  # noqa: E402
from conftest import ROOT, random_model, write_jsonl  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

import toy  # noqa: E402
from infra import checkpoint  # noqa: E402

STEPS = 40
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}


def make_inputs(folder: Path) -> dict[str, list[str]]:
    """Models and problems under `folder`; returns each script's command line but for --out."""
    for name, seed in (("student", 1), ("teacher", 2)):
        random_model(seed=seed).save_pretrained(folder / name)
        toy.make_tokenizer().save_pretrained(folder / name)
    data = write_jsonl(folder / "data.jsonl", [{"problem": f"{n}+{n % 3}?", "answer": str(n % 10)} for n in range(40)])
    shared = ["--train-data", data, "--instruction", "", "--max-response-tokens", "16", "--micro-batch-tokens", "300"]
    shared += ["--max-steps", str(STEPS), "--save-every", "1", "--learning-rate", "1e-3", "--resume"]
    pair = ["--teacher", f"{folder}/teacher", "--student", f"{folder}/student"]
    grpo = ["--model", f"{folder}/student", "--prompts-per-step", "8", "--minibatch-prompts", "4", "--kl-coef", "0.1"]
    return {
        "grpo": shared + grpo,
        "fkl_warmup": [*shared, *pair, "--rollouts-per-step", "16"],
        "opd": [*shared, *pair, "--prompts-per-step", "16"],
    }


def start(script: str, flags: list[str], out: Path, ranks: int) -> subprocess.Popen:
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"] if ranks > 1 else []
    command = [sys.executable, *launcher, str(ROOT / f"{script}.py"), *flags, "--out", str(out)]
    return subprocess.Popen(
        command, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True
    )


def members(process: subprocess.Popen) -> list[int]:
    """Process ids of the run: the script itself, or torchrun's ranks."""
    path = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    return [int(pid) for pid in path.read_text().split()] if path.exists() else []


def kill_once(process, out: Path, ranks: int, rng: random.Random) -> str | None:
    """At a random moment of the run, kill -9 one of its processes; returns what it was doing, None if it ended before."""
    kind, reached = (
        rng.choice(["starting", "at work", "at work", "saving", "saving"]),
        checkpoint.step(checkpoint.latest(out)),
    )
    wait = rng.uniform(0, 10 if kind == "starting" else 0.1)
    target = rng.randint(reached, STEPS - 2) if kind != "starting" else 0
    while process.poll() is None and checkpoint.step(checkpoint.latest(out)) < target:
        time.sleep(0.002)
    deadline = time.time() + wait
    while process.poll() is None and time.time() < deadline:
        time.sleep(0.002)
    while kind == "saving" and process.poll() is None and not list(out.glob("checkpoints/*.partial")):
        time.sleep(0.0002)
    if process.poll() is not None:
        return None
    victims = members(process) if ranks > 1 else [process.pid]
    os.kill(rng.choice(victims or [process.pid]), signal.SIGKILL)
    process.wait(60)  # torchrun ends the other ranks
    return "saving" if list(out.glob("checkpoints/*.partial")) else "at work" if checkpoint.latest(out) else "starting"


def stress(script: str, ranks: int, kills: int, seed: int, folder: Path) -> dict[str, int]:
    """Raises AssertionError if a resumed run fails or ends with other weights. Returns how often it was killed when."""
    rng, flags, moments = random.Random(seed), make_inputs(folder)[script], {}
    whole = start(script, flags, folder / "whole", ranks)
    assert whole.wait() == 0, whole.stderr.read()
    expected, rounds = load_file(folder / "whole" / "model.safetensors"), 0
    while sum(moments.values()) < kills:
        rounds += 1
        out = folder / f"killed{rounds}"
        while True:
            process = start(script, flags, out, ranks)
            moment = kill_once(process, out, ranks, rng) if sum(moments.values()) < kills else None
            if moment is None:
                assert process.wait() == 0, process.stderr.read()
                break
            moments[moment] = moments.get(moment, 0) + 1
        got = load_file(out / "model.safetensors")
        assert got.keys() == expected.keys() and all(torch.equal(got[k], expected[k]) for k in got), f"{out}: other weights"
        rows = (out / "metrics.jsonl").read_text().splitlines()
        assert len(rows) == STEPS, f"{out}: {len(rows)} rows of metrics"
    return moments | {"runs": rounds}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--script", choices=["grpo", "fkl_warmup", "opd"], default="opd")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        moments = stress(args.script, args.ranks, args.kills, args.seed, Path(folder))
    print(f"{args.script}, {args.ranks} rank(s): {moments}: the weights of every run equal the uninterrupted one's")
