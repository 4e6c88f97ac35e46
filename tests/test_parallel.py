"""Several ranks (torchrun, FSDP2, gloo on this CPU) against one process: the same weights, however the work is split; and
a killed run that goes on, on any number of ranks."""

import json
import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, FakeGrader, read_jsonl
from safetensors.torch import load_file

SMALL = {"instruction": "", "max_response_tokens": 12, "micro_batch_tokens": 60, "max_steps": 5, "learning_rate": 1e-3}
TIMES = ("time/", "charts/tokens_per_sec")


def torchrun(ranks: int, *command, timeout=240):
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc_per_node={ranks}",
        *map(str, command),
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout, cwd=ROOT)


def jobs(checkpoints, data, out):
    """Every trainer, with batches that neither 2 nor 3 ranks divide evenly, tied and untied heads."""
    grpo = {"model": checkpoints.student, "prompts_per_step": 6, "minibatch_prompts": 3, "group_size": 3, "kl_coef": 0.1}
    distil = {"student": checkpoints.llama, "teacher": checkpoints.narrow}
    return [
        ["grpo", SMALL | grpo | {"train_data": data, "out": f"{out}/grpo", "eval_data": data, "eval_every": 5}],
        ["fkl_warmup", SMALL | distil | {"train_data": data, "out": f"{out}/fkl_warmup", "rollouts_per_step": 5}],
        ["opd", SMALL | distil | {"train_data": data, "out": f"{out}/opd", "prompts_per_step": 7}],
        ["opd", SMALL | distil | {"train_data": data, "out": f"{out}/sampled", "prompts_per_step": 1, "loss": "sampled"}],
    ]


def difference(a, b) -> float:
    """Largest over the tensors of |a - b| / |a|."""
    a, b = load_file(a / "model.safetensors"), load_file(b / "model.safetensors")
    assert a.keys() == b.keys()
    return max(float((a[k] - b[k]).norm() / a[k].norm()) for k in a)


@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_give_the_single_process_weights(run_script, fake_grader, checkpoints, data, tmp_path, ranks):
    fake_grader(FakeGrader.rule)
    ranked = torchrun(ranks, "tests/parallel_ranks.py", json.dumps(jobs(checkpoints, data, tmp_path / "ranked")))
    assert ranked.returncode == 0, ranked.stderr[-3000:]
    for script, args in jobs(checkpoints, data, tmp_path / "single"):
        single = run_script(script, **args)
        out = tmp_path / "ranked" / single.out.name
        assert difference(single.out, out) < 1e-5, single.out.name
        for mine, theirs in zip(single.metrics, read_jsonl(out / "metrics.jsonl"), strict=True):
            for key in mine:
                if not key.startswith(TIMES):
                    assert theirs[key] == pytest.approx(mine[key], rel=1e-3, abs=1e-5), (single.out.name, key)
        assert json.loads((out / "run.json").read_text())["hardware"]["ranks"] == ranks
