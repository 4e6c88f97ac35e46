"""--plan: what it counts against what really is saved and used, what it refuses, and what docs/scaling.md shows of it."""

import re
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
import tyro
from conftest import ROOT, SCRIPTS, planned_and_used, random_model
from transformers import LlamaConfig, Qwen3Config

import opd
from infra import plan
from infra.cli import UsageError


def qwen3(hidden, layers, heads, intermediate, tied):
    return Qwen3Config(
        hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=8, head_dim=128,
        intermediate_size=intermediate, vocab_size=151936, tie_word_embeddings=tied, max_position_embeddings=40960,
    )  # fmt: skip


def llama(hidden, layers, heads, intermediate):
    return LlamaConfig(
        hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=8, head_dim=128,
        intermediate_size=intermediate, vocab_size=128256, tie_word_embeddings=False, max_position_embeddings=131072,
    )  # fmt: skip


CONFIGS = {
    "Qwen/Qwen3-1.7B": qwen3(2048, 28, 16, 6144, True),
    "Qwen/Qwen3-8B": qwen3(4096, 36, 32, 12288, False),
    "Qwen/Qwen3-14B": qwen3(5120, 40, 40, 17408, False),
    "meta-llama/Llama-3.1-8B-Instruct": llama(4096, 32, 32, 14336),
    "meta-llama/Llama-3.3-70B-Instruct": llama(8192, 80, 64, 28672),
}


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """A folder with the configs of the models that the docs speak of, under their hub ids."""
    folder = tmp_path_factory.mktemp("hub")
    for name, config in CONFIGS.items():
        config.save_pretrained(folder / name)
    return folder


def args(**changes):
    return opd.Args(**({"teacher": "Qwen/Qwen3-8B", "student": "Qwen/Qwen3-1.7B", "plan_gpu": "80GB"} | changes))


def check(arguments):
    student, teacher = plan.Sizes.read(arguments.student, "--student"), plan.Sizes.read(arguments.teacher, "--teacher")
    work = plan.Workload(trained=student, frozen={"teacher": teacher}, sampled=student, responses=arguments.prompts_per_step)
    plan.check(arguments, work)


@pytest.mark.parametrize("arch, tied", [("qwen3", True), ("llama", False)])
def test_counted_activations_are_those_that_autograd_saves(arch, tied, tmp_path):
    model = random_model(arch, tied, num_hidden_layers=5).requires_grad_()
    model.save_pretrained(tmp_path)
    kept, weights = {}, {p.untyped_storage().data_ptr() for p in model.parameters()}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model.base_model(input_ids=torch.zeros((3, 40), dtype=torch.long), use_cache=False)
    saved = sum(t.untyped_storage().nbytes() for key, t in kept.items() if key not in weights)
    counted = plan.activation_bytes(args(), plan.Sizes.read(tmp_path, "--student"), 4, False, rows=3, length=40)
    assert counted == pytest.approx(saved, rel=0.1)


def test_gpus_are_written_in_one_way(hub, monkeypatch):
    monkeypatch.chdir(hub)
    with pytest.raises(UsageError, match="--plan-gpu 80: write it as 80GB, or 8x80GB"):
        check(args(plan_gpu="80"))


def test_what_cannot_fit_is_refused_with_the_flags_that_would_make_it_fit(hub, monkeypatch):
    monkeypatch.chdir(hub)
    with pytest.raises(
        UsageError, match=r"needs about 1\d\d.\d GB per GPU, there are 80.0: it would fit with --gradient-ch"
    ):
        check(args())
    check(args(gradient_checkpointing=True))
    with pytest.raises(UsageError, match="it would fit on 2 such GPUs"):
        check(args(plan_gpu="40GB", gradient_checkpointing=True))
    with pytest.raises(UsageError, match="use smaller models"):
        check(args(plan_gpu="2GB", sampler="hf"))
    with pytest.raises(UsageError, match="--vllm-gpu-memory-utilization 0.3: 3.0 GB do not hold the 3.4 GB of weights"):
        check(args(plan_gpu="10GB"))


def test_a_plan_in_which_vllm_lacks_room_for_its_weights_does_not_fit(hub, monkeypatch, capsys):
    """--plan once printed "fits" for what the run itself then refused."""
    monkeypatch.chdir(hub)
    with pytest.raises(SystemExit):
        check(args(plan_gpu="10GB", plan=True))
    assert "does not fit: --vllm-gpu-memory-utilization 0.3: 3.0 GB do not hold" in capsys.readouterr().out


def test_more_gpus_take_less_memory_each(hub, monkeypatch):
    monkeypatch.chdir(hub)
    arguments = args(gradient_checkpointing=True)
    student, teacher = plan.Sizes.read(arguments.student, "--student"), plan.Sizes.read(arguments.teacher, "--teacher")
    work = plan.Workload(trained=student, frozen={"teacher": teacher}, sampled=student, responses=256)
    peaks = []
    for gpus in (2, 4, 8, 16):
        hw = plan.Hardware.find(replace(arguments, plan_gpu=f"{gpus}x80GB"))
        peaks.append(max(sum(phase.values()) for phase in plan.estimate(arguments, work, hw).values()))
    assert peaks[:3] == sorted(peaks, reverse=True)[:3]


def documented_plans():
    """(script, flags, output) of every command of docs/scaling.md with --plan and the block of text behind it."""
    page = (ROOT / "docs" / "scaling.md").read_text()
    found = re.findall(r"```bash\npython (\S+) ([^`]*?--plan)\n```\n+```text\n([^`]*)```", page)
    assert len(found) >= 5
    return found


@pytest.mark.parametrize("script, flags, expected", documented_plans())
def test_documented_plans_are_what_the_commands_print(hub, monkeypatch, capsys, script, flags, expected):
    monkeypatch.chdir(hub)
    module = SCRIPTS[script.removesuffix(".py")]
    with pytest.raises(SystemExit):
        module.main(tyro.cli(module.Args, args=flags.replace("\\\n", " ").split()))
    assert capsys.readouterr().out == expected


def test_plan_prints_and_exits_before_anything_is_read(hub):
    command = [sys.executable, ROOT / "opd.py", "--teacher", "Qwen/Qwen3-8B", "--student", "Qwen/Qwen3-1.7B", "--plan"]
    command += ["--plan-gpu", "8x80GB", "--gradient-checkpointing"]
    run = subprocess.run(command, cwd=hub, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0 and "peak" in run.stdout and "8 x 80 GB" in run.stdout, run.stderr[-2000:]
    assert not (hub / "ckpt").exists()


@pytest.mark.parametrize(
    "script", ["opd.py", *(pytest.param(s, marks=pytest.mark.slow) for s in ("fkl_warmup.py", "grpo.py"))]
)
def test_planned_memory_is_that_of_the_toy(world, tmp_path, script):
    flags = ["--train-data", world / "train.jsonl", "--instruction=", "--max-response-tokens", 64, "--max-steps", 2]
    pair = ["--teacher", world / "teacher_base", "--student", world / "student_base"]
    flags += {
        "opd.py": [*pair, "--prompts-per-step", 16],
        "fkl_warmup.py": [*pair, "--rollouts-per-step", 16],
        "grpo.py": ["--model", world / "teacher_base", "--prompts-per-step", 16, "--minibatch-prompts", 8],
    }[script]
    planned, used = planned_and_used(script, *flags, "--micro-batch-tokens", 2048, "--out", tmp_path / "run")
    assert planned == pytest.approx(used, rel=0.15)
