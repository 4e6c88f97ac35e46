"""Several ranks (torchrun, FSDP2, gloo on this CPU) against one process: the same weights, however the work is split; and
a killed run that goes on, on any number of ranks."""

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT, FakeGrader, read_jsonl
from safetensors.torch import load_file

import opd
from infra import run_folder
from infra.cli import UsageError

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
        ["variants/opd_sampled", SMALL | distil | {"train_data": data, "out": f"{out}/sampled", "prompts_per_step": 1}],
    ]


def stop(*_):
    raise KeyboardInterrupt


@contextlib.contextmanager
def interrupted(monkeypatch, at: int):
    """Within, a run ends by Ctrl-C as it logs this step, and must."""
    log = run_folder.Run.log
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(run_folder.Run, "log", lambda run, step, *rest: log(run, step, *rest) if step != at else stop())
        yield


def difference(a, b) -> float:
    """Largest over the tensors of |a - b| / |a|."""
    a, b = load_file(a / "model.safetensors"), load_file(b / "model.safetensors")
    assert a.keys() == b.keys()
    return max(float((a[k] - b[k]).norm() / a[k].norm()) for k in a)


@pytest.mark.parametrize("ranks", [2, pytest.param(3, marks=pytest.mark.slow)])
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


COSINE = {"learning_rate_decay": "cosine", "learning_rate_warmup_steps": 2}


@pytest.mark.parametrize("schedule", [{}, COSINE], ids=["constant", "cosine"])
@pytest.mark.parametrize("script", ["grpo", "fkl_warmup", "opd"])
def test_a_stopped_run_goes_on_to_the_same_bits(
    run_script, fake_grader, checkpoints, data, tmp_path, monkeypatch, script, schedule
):
    fake_grader(FakeGrader.rule)
    args = schedule | next(args for name, args in jobs(checkpoints, data, tmp_path / "whole") if name == script)
    whole = run_script(script, **args)
    assert len({row["charts/learning_rate"] for row in whole.metrics if row["step"]}) == (4 if schedule else 1)
    args |= {"out": str(tmp_path / "stopped"), "save_every": 2}
    with interrupted(monkeypatch, at=4):
        run_script(script, **args)
    assert [path.name for path in (tmp_path / "stopped" / "checkpoints").iterdir()] == ["step_000002"]
    with pytest.raises(UsageError, match="holds an unfinished run .step_000002.*--resume"):
        run_script(script, **args)
    resumed = run_script(script, **args, resume=True)
    expected, got = load_file(whole.out / "model.safetensors"), load_file(resumed.out / "model.safetensors")
    assert all(torch.equal(expected[key], got[key]) for key in expected)
    assert [row["step"] for row in resumed.metrics] == [row["step"] for row in whole.metrics]
    for mine, theirs in zip(resumed.metrics, whole.metrics, strict=True):
        assert {k: v for k, v in mine.items() if not k.startswith(TIMES)} == {
            k: v for k, v in theirs.items() if not k.startswith(TIMES)
        }
    assert resumed.record["labels_used"] == whole.record["labels_used"]
    assert not (resumed.out / "checkpoints").exists()


@pytest.mark.slow
def test_hybrid_shards_give_the_single_process_weights(run_script, fake_grader, checkpoints, data, tmp_path):
    """Four ranks on two pretended nodes: shards within a node, replicas across."""
    fake_grader(FakeGrader.rule)
    hybrid = [
        [script, args | {"hybrid_shard": True, "nodes": 2}] for script, args in jobs(checkpoints, data, tmp_path / "h")
    ]
    ranked = torchrun(4, "tests/parallel_ranks.py", json.dumps(hybrid[:3]))
    assert ranked.returncode == 0, ranked.stderr[-3000:]
    for script, args in jobs(checkpoints, data, tmp_path / "single")[:3]:
        assert difference(run_script(script, **args).out, tmp_path / "h" / script) < 1e-5, script


@pytest.mark.slow
def test_a_run_of_two_ranks_goes_on_with_one_and_with_three(run_script, fake_grader, checkpoints, data, tmp_path):
    fake_grader(FakeGrader.rule)
    stopped = [
        [script, args | {"save_every": 1, "stop_at": 2}] for script, args in jobs(checkpoints, data, tmp_path / "two")
    ]
    ranked = torchrun(2, "tests/parallel_ranks.py", json.dumps(stopped))
    assert ranked.returncode == 0, ranked.stderr[-3000:]
    for name in ("one", "three"):
        shutil.copytree(tmp_path / "two", tmp_path / name)
    resumed = [[script, args | {"resume": True}] for script, args in jobs(checkpoints, data, tmp_path / "three")]
    ranked = torchrun(3, "tests/parallel_ranks.py", json.dumps(resumed))
    assert ranked.returncode == 0, ranked.stderr[-3000:]
    for script, args in jobs(checkpoints, data, tmp_path / "whole"):
        whole = run_script(script, **args)
        one = run_script(script, **args | {"out": str(tmp_path / "one" / whole.out.name), "resume": True})
        assert difference(whole.out, one.out) < 1e-5 and difference(whole.out, tmp_path / "three" / whole.out.name) < 1e-5
        assert [row["step"] for row in one.metrics] == [row["step"] for row in whole.metrics]


def test_one_failing_rank_ends_all_and_is_reported_once(checkpoints, data, tmp_path):
    job = ["grpo", {"model": checkpoints.student, "train_data": data, "out": str(tmp_path / "out"), "fail_on": 1}]
    began = time.time()
    ranked = torchrun(2, "tests/parallel_ranks.py", json.dumps([job]))
    assert ranked.returncode != 0 and time.time() - began < 60
    assert ranked.stderr.count("RuntimeError: deliberate") == 1 and ranked.stderr.count("rank 1: Traceback") == 1
    assert len(re.findall(r"rank \d+: ", ranked.stderr)) == 1, "the ranks that fail in its wake stay silent"


@pytest.mark.slow
def test_a_usage_error_is_printed_by_one_rank(checkpoints, tmp_path):
    ranked = torchrun(2, "grpo.py", "--model", checkpoints.student, "--train-data", tmp_path / "none.jsonl")
    assert ranked.returncode != 0 and ranked.stderr.count("error: --train-data") == 1


def test_changed_flags_of_a_resumed_run(run_script, checkpoints, data, tmp_path, capsys, monkeypatch):
    """Other models, data or seed are refused: the rest of the run would not be the one that was started."""
    [args] = [args for _, args in jobs(checkpoints, data, tmp_path)[2:3]]
    folder = tmp_path / "opd"
    run_script("opd", **args | {"max_steps": 1})
    record = json.loads((folder / "run.json").read_text()) | {"finished": False}
    (folder / "run.json").write_text(json.dumps(record))
    (folder / "checkpoints" / "step_000001").mkdir(parents=True)
    (folder / "checkpoints" / "step_000001" / "state.json").write_text("{}")
    with pytest.raises(UsageError, match="--resume: --seed was 1, now 7: repeat the flags"):
        run_script("opd", **args | {"resume": True, "seed": 7})
    monkeypatch.setattr(sys, "argv", [str(ROOT / "opd.py")])
    run = run_folder.Run(opd.Args(**args | {"resume": True, "learning_rate": 5.0, "max_steps": 1}), 1)
    assert "--learning-rate was 0.001, now 5.0" in capsys.readouterr().out and run.resumed_from.name == "step_000001"


def test_a_finished_run_has_nothing_to_resume(run_script, checkpoints, data, tmp_path, capsys):
    """So that one line can stand in a job script that is started again and again."""
    [args] = [args for _, args in jobs(checkpoints, data, tmp_path)[2:3]]
    run_script("opd", **args | {"max_steps": 1})
    before = (tmp_path / "opd" / "model.safetensors").stat().st_mtime_ns
    with pytest.raises(SystemExit) as stop:
        run_script("opd", **args | {"max_steps": 1, "resume": True})
    assert stop.value.code == 0 and "opd/ is finished" in capsys.readouterr().out
    assert (tmp_path / "opd" / "model.safetensors").stat().st_mtime_ns == before
    with pytest.raises(UsageError, match="holds a finished run"):
        run_script("opd", **args | {"max_steps": 1})


def test_two_processes_do_not_write_one_folder(tmp_path):
    lock = run_folder.lock_folder(tmp_path)
    with pytest.raises(UsageError, match="another process is writing there"):
        run_folder.lock_folder(tmp_path)
    lock.close()
    run_folder.lock_folder(tmp_path)


def test_a_full_disk_leaves_the_earlier_checkpoint_whole(tmp_path, checkpoints):
    """The real failure of the real writes: a limit on the size of a file, as a full disk or a quota sets it."""
    script = f"""
import resource, sys
from pathlib import Path
import torch, opd
from infra import checkpoint, cli, dataset, run_folder
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained({checkpoints.student!r})
optimizer = torch.optim.AdamW(model.parameters())
args = opd.Args(teacher="t", student="s", out={str(tmp_path)!r}, save_every=1)
sys.argv = ["opd.py"]
run, stream = run_folder.Run(args, 9), dataset.ProblemStream(5, 1)
run.checkpoint(1, model, optimizer, stream)
hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
resource.setrlimit(resource.RLIMIT_FSIZE, (20000, hard))
try:
    run.checkpoint(2, model, optimizer, stream)
except cli.RunStopped as error:
    print(error)
resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
print(checkpoint.restore(checkpoint.latest({str(tmp_path)!r}), model, optimizer)["step"])
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert run.returncode == 0, run.stderr[-2000:]
    message, step = run.stdout.strip().splitlines()
    assert "the checkpoint of step 2 could not be written" in message and "step_000001 is whole: make room" in message
    assert step == "1" and [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step_000001"]
