"""--plan: what it counts against what really is saved and used, what it refuses, and what docs/scaling.md shows of it."""

import re
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
import tyro
from conftest import ROOT, SCRIPTS, planned_and_used, random_model, saved_activations
from transformers import LlamaConfig, Qwen3Config

import grpo
import opd
import toy
from infra import plan, sampler_hf
from infra.cli import UsageError
from infra.sampler_hf import GrowingLayer, HFSampler


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
    "Qwen/Qwen3-0.6B": qwen3(1024, 28, 16, 3072, True),
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
    saved = saved_activations(model)
    hw = plan.Hardware(gpus=1, bytes=80e9, shards=1, cuda=True)
    counted = plan.activation_bytes(args(dtype="float32"), plan.Sizes.read(tmp_path, "--student"), hw, rows=3, length=40)
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
    with pytest.raises(UsageError, match=r"utilization 0.1: 8.0 GB hold the 3.4 GB .* less than one prompt"):
        check(args(plan_gpu="80GB", vllm_gpu_memory_utilization=0.1))


def test_a_plan_in_which_vllm_lacks_room_for_its_weights_does_not_fit(hub, monkeypatch, capsys):
    """--plan once printed "fits" for what the run itself then refused."""
    monkeypatch.chdir(hub)
    with pytest.raises(SystemExit):
        check(args(plan_gpu="80GB", plan=True, vllm_gpu_memory_utilization=0.1))
    assert "does not fit: --vllm-gpu-memory-utilization 0.1: 8.0 GB hold" in capsys.readouterr().out


def plans(arguments):
    student, teacher = plan.Sizes.read(arguments.student, "--student"), plan.Sizes.read(arguments.teacher, "--teacher")
    work = plan.Workload(student, {"teacher": teacher}, student, arguments.prompts_per_step, cached=True)
    hw = plan.Hardware.find(arguments)
    return work, hw, plan.estimate(arguments, work, hw)


def test_by_default_vllm_gets_what_the_models_leave(hub, monkeypatch):
    """Asleep while the model trains: what is left in the rollout; awake: what is left in the fullest phase."""
    monkeypatch.chdir(hub)
    for sleep in (True, False):
        arguments = args(gradient_checkpointing=True, vllm_sleep=sleep)
        work, hw, phases = plans(arguments)
        fullest = phases["rollout"] if sleep else max(phases.values(), key=lambda parts: sum(parts.values()))
        assert 0.93 * hw.bytes < sum(fullest.values()) <= 0.95 * hw.bytes
        assert phases["train"]["vLLM"] == (plan.GRAPHS if sleep else phases["rollout"]["vLLM"])
        check(arguments)
        assert arguments.vllm_gpu_memory_utilization == pytest.approx(phases["rollout"]["vLLM"] / hw.bytes)
        least = 30 if sleep else 10
        assert plan.vllm_cache_tokens(arguments, work, hw, phases) > least * (plan.PROMPT_TOKENS + 8192)


def test_a_gpu_that_is_a_little_too_small_is_refused(hub, monkeypatch):
    """Running out of memory is the other end of it. A CPU has swap, and other processes that may end."""
    monkeypatch.chdir(hub)
    need = plan.peak_bytes(plans(args(gradient_checkpointing=True, sampler="hf"))[2]) / plan.GB
    check(args(gradient_checkpointing=True, sampler="hf", plan_gpu=f"{need + 0.1:.1f}GB"))
    with pytest.raises(UsageError, match="needs about"):
        check(args(gradient_checkpointing=True, sampler="hf", plan_gpu=f"{need - 0.5:.1f}GB"))


@pytest.mark.parametrize("gpus, stays", [("80GB", 151936 * 4096), ("8x80GB", 2 * 151936 * 4096 + 4096)])
def test_of_an_offloaded_teacher_the_head_stays(hub, monkeypatch, gpus, stays):
    """With several GPUs all that is gathered with the head: the embedding and the last norm."""
    monkeypatch.chdir(hub)
    phases = plans(args(gradient_checkpointing=True, sampler="hf", offload_teacher=True, plan_gpu=gpus))[2]
    assert phases["train"]["teacher"] == 2 * stays


def test_the_plan_counts_what_waits_in_the_cpu_s_memory(hub, monkeypatch):
    monkeypatch.chdir(hub)
    work, hw, _ = plans(args())
    assert plan.host_bytes(args(), work, hw) == {"teacher's hidden states, pinned": 256 * 8192 * 4096 * 2}
    offloaded = plan.host_bytes(args(offload_teacher=True), work, hw)["teacher, pinned"]
    H, wide, V, KV = 4096, 12288, 151936, 1024  # Qwen3-8B: q and o, k and v, the MLP's, embedding and head
    matrices = ((72, H * H), (72, H * KV), (108, H * wide), (2, V * H))
    assert offloaded == pytest.approx(sum(n * 2 ** (2 * size - 1).bit_length() for n, size in matrices), rel=0.05)


def test_the_hf_sampler_s_cache_is_the_planned_one(tmp_path, monkeypatch):
    """In bfloat16 over float32 weights: keys are float32 behind their norm and rotation, and were cached so."""
    model = random_model()
    model.save_pretrained(tmp_path)
    sampler = HFSampler(model, toy.make_tokenizer(), torch.bfloat16, max_response_tokens=9, temperature=0)
    sampler.eos_ids = torch.tensor([-1])  # all answers are of full length
    seen = []

    class Seen(GrowingLayer):
        def update(self, *states, **options):
            keys, values = super().update(*states, **options)
            seen.append((keys.dtype, values.dtype, keys.nbytes + values.nbytes))
            return keys, values

    monkeypatch.setattr(sampler_hf, "GrowingLayer", Seen)
    sampler.sample([[22, 1, 10, 2, 16, 23]] * 3, 2)
    length = 6 + 9 - 1  # the last id is never read
    monkeypatch.setattr(plan, "PROMPT_TOKENS", 6)
    given = {"max_response_tokens": length - 6, "rollout_batch_tokens": 6 * length}
    arguments = args(dtype="bfloat16", sampler="hf", plan_gpu="1GB", **given)
    sizes = plan.Sizes.read(tmp_path, "--student")
    work = plan.Workload(trained=sizes, frozen={}, sampled=sizes, responses=6)
    planned = plan.rollout_bytes(arguments, work, plan.Hardware.find(arguments))["key-value cache"]
    assert {(k, v) for k, v, _ in seen} == {(torch.bfloat16, torch.bfloat16)}
    assert sum(size for *_, size in seen[-2:]) == planned  # of both layers


def test_hf_batches_are_a_step_s_unless_all_problems_or_the_evaluation_s_are_answered(hub, monkeypatch):
    """fkl_warmup.py's teacher answers all problems before the first step: on a GPU it took half as much again as planned."""
    monkeypatch.chdir(hub)
    base = {"sampler": "hf", "prompts_per_step": 4, "max_response_tokens": 100}
    work, hw, phases = plans(args(**base))
    token = work.sampled.kv * 2
    assert phases["rollout"]["key-value cache"] == 4 * (plan.PROMPT_TOKENS + 100) * token
    whole = 131072 * token
    assert plans(args(**base, eval_data="x", eval_every=9))[2]["rollout"]["key-value cache"] == whole
    assert plans(args(**base, eval_data="x"))[2]["rollout"] == phases["rollout"], "which evaluates nothing"
    of_all = plan.estimate(args(**base), replace(work, all_at_once=True), hw)
    assert of_all["rollout"]["key-value cache"] == whole and "evaluate" not in of_all
    by_teacher = replace(work, sampled=work.frozen["teacher"])
    evaluated = plan.estimate(args(plan_gpu="80GB", eval_data="x", eval_every=9), by_teacher, hw)
    assert evaluated["evaluate"]["key-value cache"] == whole  # the student's own, though vLLM samples the rollouts


def test_a_prompt_s_answers_are_one_batch_however_small_the_flag(hub, monkeypatch):
    monkeypatch.chdir(hub)
    given = {"dtype": "bfloat16", "sampler": "hf", "rollout_batch_tokens": 1, "max_response_tokens": 100}
    arguments = grpo.Args(model="Qwen/Qwen3-1.7B", **given)
    sizes, hw = plan.Sizes.read(arguments.model, "--model"), plan.Hardware.find(arguments)
    planned = plan.rollout_bytes(arguments, plan.Workload(sizes, {}, sizes, 64), hw)
    assert planned["key-value cache"] == arguments.group_size * (plan.PROMPT_TOKENS + 100) * sizes.kv * 2


def test_more_gpus_take_less_memory_each(hub, monkeypatch):
    monkeypatch.chdir(hub)
    arguments = args(gradient_checkpointing=True)
    student, teacher = plan.Sizes.read(arguments.student, "--student"), plan.Sizes.read(arguments.teacher, "--teacher")
    work = plan.Workload(trained=student, frozen={"teacher": teacher}, sampled=student, responses=256)
    peaks = []
    for gpus in (2, 4, 8, 16):
        hw = plan.Hardware.find(replace(arguments, plan_gpu=f"{gpus}x80GB"))
        peaks.append(sum(plan.estimate(arguments, work, hw)["train"].values()))
    assert peaks[:3] == sorted(peaks, reverse=True)[:3]


def documented_plans():
    """(script, flags, output) of every command of the docs with --plan and the block of text behind it."""
    page = "".join((ROOT / "docs" / name).read_text() for name in ("scaling.md", "lora.md"))
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
