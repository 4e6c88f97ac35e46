# docs/lora.md
"""LoRA (Hu et al. 2021, arXiv 2106.09685): the model is frozen, and each linear layer of its decoder learns
a low-rank update.

    W' = W + (alpha / r) B A        W (out, in), B (out, r), A (r, in)

Embedding, head and norms are frozen too. B begins at 0, so the model begins as its base. peft puts the adapters into the
layers, in place: the model stays the transformers model that everything else knows. W is never written to. Whoever needs W',
a sampler or the checkpoint, gets a copy, one tensor at a time where that is enough."""

import contextlib
import functools
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from infra import parallel
from infra.cli import UsageError, require


def inject(model, rank: int, alpha: float, seed: int):
    """`model` itself, frozen, with adapters of `rank` in every linear layer of its decoder, float32 (float64 in a float64
    model). A is drawn from `seed` alone, uniform within 1 / sqrt(in). Raises UsageError without peft, or where the decoder
    has matrices outside of linear layers."""
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError:
        raise UsageError("--lora-rank needs a package: pip install peft") from None
    linear = {name for name, module in model.base_model.layers.named_modules() if isinstance(module, nn.Linear)}
    for name, parameter in model.base_model.layers.named_parameters():
        known = parameter.ndim < 2 or name.removesuffix(".weight") in linear
        require(known, f"--lora-rank: {name} {list(parameter.shape)} of {model.name_or_path} belongs to no linear layer")
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        target_modules=sorted({name.rpartition(".")[2] for name in linear}),
        task_type="CAUSAL_LM",
        base_model_name_or_path=model.name_or_path,
    )
    inject_adapter_in_model(config, model, low_cpu_mem_usage=True)  # freezes all else; adapters have no memory yet
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for _, layer in adapted(model):
            base = layer.base_layer.weight
            master = torch.promote_types(base.dtype, torch.float32)
            for matrix in (layer.lora_A.default, layer.lora_B.default):
                matrix.weight = nn.Parameter(torch.empty(matrix.weight.shape, dtype=master, device=base.device))
            layer.reset_lora_parameters("default", True)
            layer.cast_input_dtype_enabled = False  # autocast does, without a copy of the input for each layer
    return model


def adapted(model) -> list:
    """[(name, layer)] of the linear layers that have an adapter; none without LoRA."""
    return [(name, module) for name, module in model.named_modules() if hasattr(module, "lora_A")]


@torch.no_grad()
def merge(layer) -> torch.Tensor:
    """W' (out, in) of one layer: whole, a copy, in float32 or float64. A collective where it is sharded."""
    weight, a, b = (parallel.full_tensor(m.weight) for m in (layer.base_layer, layer.lora_A.default, layer.lora_B.default))
    dtype = torch.promote_types(weight.dtype, torch.float32)
    return torch.addmm(weight.to(dtype), b.to(dtype), a.to(dtype), alpha=layer.scaling["default"])


@torch.no_grad()
def plain_weights(model):
    """(name, tensor) of every parameter that the model would have without adapters, these merged; tied ones once. Whole
    tensors, one at a time; a collective where they are sharded."""
    parallel.reshard(model)
    layers = dict(adapted(model))
    for name, parameter in model.named_parameters():
        owner, _, rest = name.rpartition(".base_layer.")
        if rest == "weight":
            yield f"{owner}.weight", merge(layers[owner])
        elif not is_adapter(name):
            yield name.replace(".base_layer.", "."), parallel.full_tensor(parameter)


def is_adapter(name: str) -> bool:
    """Whether a parameter's name is that of an adapter's A or B."""
    return ".lora_A." in name or ".lora_B." in name


@contextlib.contextmanager
def _computing(model, choose):
    """Within, each adapted layer computes the function choose(layer). Nothing else of it changes."""
    layers = [layer for _, layer in adapted(model)]
    try:
        for layer in layers:
            layer.forward = choose(layer)
        yield
    finally:
        for layer in layers:
            layer.__dict__.pop("forward", None)


def adapters_off(model):
    """Within, the model is its base: GRPO's reference."""
    return _computing(model, lambda layer: layer.base_layer.forward)


def merged(model, dtype: torch.dtype):
    """Within, the model multiplies by merged copies of its weights in `dtype`, as fast as one without adapters."""

    def product(layer):
        return functools.partial(nn.functional.linear, weight=merge(layer).to(dtype), bias=layer.base_layer.bias)

    return _computing(model, product)


def adapter_state(model) -> dict[str, torch.Tensor]:
    """{name in PEFT's format: whole tensor on the CPU}; {} without LoRA. A collective where they are sharded."""
    named = [(name, parameter) for name, parameter in model.named_parameters() if is_adapter(name)]
    whole = {name: parallel.full_tensor(parameter.detach()).cpu().contiguous() for name, parameter in named}
    return {f"base_model.model.{name.replace('.default.', '.')}": tensor for name, tensor in whole.items()}


def write_adapter(model, state: dict[str, torch.Tensor], folder: Path) -> None:
    """adapter_config.json, which names the base, and adapter_model.safetensors, for `PeftModel.from_pretrained`."""
    model.peft_config["default"].save_pretrained(folder)
    save_file(state, folder / "adapter_model.safetensors", metadata={"format": "pt"})
