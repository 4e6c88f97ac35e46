"""One step of each script on a pretended GPU (fake_cuda.py): nothing is on the wrong device, and under --dtype bfloat16 no
matrix product that counts is taken in float32."""

import contextlib
from types import SimpleNamespace

import fake_cuda
import pytest
import torch
from conftest import SCRIPTS, random_model
from torch.distributed.fsdp import FSDPModule
from transformers import AutoModelForCausalLM

import toy
from infra import models, sampler_hf
from infra.cli import UsageError
from infra.sampler_hf import HFSampler


@pytest.fixture
def gpu(monkeypatch, checkpoints):
    AutoModelForCausalLM.from_pretrained(checkpoints.student)  # what transformers imports late, it must not import within
    with fake_cuda.pretended(monkeypatch) as operations:
        yield operations


def in_float32(operations) -> list:
    """Products of float32 operands on the GPU, but for the angles of rotary embeddings (one factor each), the sample of rows
    that telemetry compares, and merged adapters."""
    return [
        (name, shapes)
        for name, dtypes, shapes, callers in operations.products
        if dtypes == {torch.float32} and not callers & {"top_k_sums", "merge"} and all(s[-2] != 1 for s in shapes[1:])
    ]


def run(script, checkpoints, data, out, **flags):
    module = SCRIPTS[script]
    pair = {"student": checkpoints.student, "teacher": checkpoints.wide}
    pair = {"model": checkpoints.student} if script == "grpo" else pair
    sizes = {"grpo": {"prompts_per_step": 4, "minibatch_prompts": 2, "group_size": 4}}
    sizes |= {"fkl_warmup": {"rollouts_per_step": 4}}
    common = {"train_data": data, "instruction": "", "max_response_tokens": 8, "max_steps": 1, "micro_batch_tokens": 60}
    common |= {"sampler": "hf", "save_every": 0, "out": str(out)}
    module.main(module.Args(**pair | sizes.get(script, {"prompts_per_step": 4}) | common | flags))


@pytest.mark.parametrize(
    "script, flags",
    [
        ("grpo", {}),
        ("grpo", {"kl_coef": 0.1, "gradient_checkpointing": True}),
        ("grpo", {"kl_coef": 0.1, "lora_rank": 4}),
        ("fkl_warmup", {}),
        ("fkl_warmup", {"loss": "ce", "gradient_checkpointing": True}),
        ("opd", {}),
        ("opd", {"lora_rank": 4, "gradient_checkpointing": True}),
        ("opd", {"offload_teacher": True, "gradient_checkpointing": True}),
    ],
)
def test_a_step_of(script, flags, gpu, checkpoints, data, tmp_path, monkeypatch, fake_grader):
    fake_grader(lambda answer, j: float(j % 2))
    run(script, checkpoints, data, tmp_path / "run", **flags)
    assert (tmp_path / "run" / "model.safetensors").exists()
    assert len(gpu.products) > 100 and in_float32(gpu) == []


class Sharded(FSDPModule):
    """What --offload-teacher under torchrun makes of a model: weights on the CPU, gathered on the GPU to compute."""

    def unshard(self):
        torch.nn.Module._apply(self, lambda t: t.to("cuda"))

    def reshard(self):
        torch.nn.Module._apply(self, lambda t: t.to("cpu"))

    def set_reshard_after_forward(self, *_, **__):
        pass


def offloaded(model):
    model.__class__ = type("Sharded", (Sharded, type(model)), {})
    for module in (model, model.base_model):
        module.register_forward_pre_hook(lambda module, inputs: model.unshard() and None)
    return model


def test_a_sharded_teacher_whose_weights_wait_on_the_cpu(gpu, checkpoints, data, tmp_path, monkeypatch):
    """Its parameters are not where it computes, as the hf sampler and others once took for granted."""
    load = models.load_model

    def load_model(path, flag, device, dtype, trainable, hybrid_shard=False, offload=False, adapters=None):
        model = load(path, flag, device, dtype, trainable, hybrid_shard, offload, adapters)
        return offloaded(model) if offload else model

    monkeypatch.setattr(models, "load_model", load_model)
    monkeypatch.setattr(models, "on_device", lambda *_: contextlib.nullcontext())  # as with several ranks
    run("opd", checkpoints, data, tmp_path / "run", offload_teacher=True)
    assert (tmp_path / "run" / "model.safetensors").exists() and in_float32(gpu) == []


def test_the_teacher_leaves_the_gpu_without_a_copy(gpu):
    """The CPU's copy, pinned the first time, comes back as it was; the head that is still used stays on the GPU."""
    teacher = random_model(tied=True).requires_grad_(False)
    with models.on_device(teacher, fake_cuda.CUDA, True):
        head = teacher.get_output_embeddings().weight.detach()
        assert all(t.is_cuda for t in [*teacher.parameters(), *teacher.buffers()])
    kept = [p.data_ptr() for p in teacher.parameters()]
    with models.on_device(teacher, fake_cuda.CUDA, True):
        assert teacher.get_output_embeddings().weight is teacher.get_input_embeddings().weight
    assert [p.data_ptr() for p in teacher.parameters()] == kept and head.is_cuda
    assert not any(p.is_cuda for p in teacher.parameters())


def test_hidden_states_wait_in_memory_that_is_taken_once(gpu, monkeypatch):
    monkeypatch.setattr(models.HostCache, "CHUNK", 40)
    cache, hidden = models.HostCache(), [torch.randn(n, 4, device="cuda") for n in (3, 5, 2, 30)]
    for _ in range(2):
        cache.clear()
        kept = [cache.keep(h, torch.bfloat16) for h in hidden]
        assert all(torch.equal(k, h.cpu().bfloat16()) and not k.is_cuda for k, h in zip(kept, hidden, strict=True))
        assert [len(chunk) for chunk in cache.chunks] == [40, 120]


def test_cudnn_attention_is_off_where_there_is_a_gpu(gpu):
    torch.backends.cuda.enable_cudnn_sdp(True)
    device, dtype = models.device_and_dtype("auto")
    assert (device, dtype) == (fake_cuda.CUDA, torch.bfloat16) and not torch.backends.cuda.cudnn_sdp_enabled()


def test_no_row_of_a_padded_prefill_sees_nothing(gpu, monkeypatch):
    masks, attend = [], sampler_hf.sdpa_attention_forward

    def recording(module, query, key, value, mask, **options):
        masks.append(mask)
        return attend(module, query, key, value, mask, **options)

    monkeypatch.setattr(sampler_hf, "sdpa_attention_forward", recording)
    sampler = HFSampler(random_model().to("cuda"), toy.make_tokenizer(), torch.bfloat16, max_response_tokens=4)
    sampler.sample([[22, 1, 10, 2, 16, 23], [22, 7, 23]], 2)
    assert masks and all(mask.any(-1).all() for mask in masks)


@pytest.mark.parametrize("listed", ["GPU 0: NVIDIA H100 80GB HBM3 (UUID: x)\n", ""])
def test_a_gpu_that_torch_cannot_use_is_refused(listed, monkeypatch):
    """An old driver once meant a run on the CPU and a warning."""
    models.unused_gpu.cache_clear()
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(models.shutil, "which", lambda name: name)
    monkeypatch.setattr(models.subprocess, "run", lambda *_, **__: SimpleNamespace(returncode=0, stdout=listed))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    if listed:
        with pytest.raises(UsageError, match="H100.*cannot use it.*CUDA 13.0.*update the driver, or set"):
            models.device_and_dtype("auto")
        models.unused_gpu.cache_clear()
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert models.device_and_dtype("auto")[0].type == "cpu"
    models.unused_gpu.cache_clear()
