# docs/architecture.md
"""Models and tokenizers: where they compute, how they are loaded, clipped and saved."""

import contextlib
import functools
import os
import shutil
import subprocess
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch.distributed.fsdp import FSDPModule
from transformers import AutoModelForCausalLM, AutoTokenizer

from infra import parallel
from infra.cli import UsageError, require
from infra.hub import explain_missing, from_hub
from kernels import head_weight

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32, "float64": torch.float64}


def device_and_dtype(dtype: str) -> tuple[torch.device, torch.dtype]:
    """Device and compute dtype; "auto" is bfloat16 on CUDA and float32 on a CPU. Raises UsageError where there is an NVIDIA
    GPU that torch cannot use."""
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", torch.cuda.current_device())
        # Attention by flash attention. cuDNN's, which torch prefers on Hopper, builds a plan for every shape it has not seen
        # and never drops one: micro-batches seldom have the same shape twice, and a decoded token makes a new one.
        torch.backends.cuda.enable_cudnn_sdp(False)
    else:
        require(not unused_gpu(), f"{unused_gpu()}, or set CUDA_VISIBLE_DEVICES= to compute on the CPU")
    if dtype == "auto":
        dtype = "bfloat16" if device.type == "cuda" else "float32"
    return device, DTYPES[dtype]


@functools.cache
def unused_gpu() -> str | None:
    """Why torch does not use the GPU that nvidia-smi finds, and the fix; None if there is no such GPU, or if
    CUDA_VISIBLE_DEVICES hides it. torch itself only warns, and would train on the CPU."""
    if os.environ.get("CUDA_VISIBLE_DEVICES", "all") in ("", "-1") or not shutil.which("nvidia-smi"):
        return None
    found = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True)
    if found.returncode or not found.stdout.strip():
        return None
    card = found.stdout.splitlines()[0]
    if torch.version.cuda is None:
        return f"nvidia-smi finds {card}, but torch {torch.__version__} is built without CUDA: install requirements.txt"
    needs = f"torch {torch.__version__} needs one for CUDA {torch.version.cuda}"
    return f"nvidia-smi finds {card}, but torch cannot use it, most likely for an old driver ({needs}): update the driver"


def compute_device(model) -> torch.device:
    """Where a model computes: not always where its parameters are, as FSDP2 may keep its shards in the CPU's memory."""
    return device_and_dtype("auto")[0] if isinstance(model, FSDPModule) else model.device


def autocast(device: torch.device, dtype: torch.dtype):
    """bfloat16 compute over float32 master weights; nothing for the other dtypes."""
    return torch.autocast(device.type, torch.bfloat16) if dtype == torch.bfloat16 else contextlib.nullcontext()


def load_tokenizer(path: str, flag: str):
    """Tokenizer of a hub id or local folder. Raises UsageError if it is missing or has no chat template."""
    try:
        tokenizer = from_hub(lambda: AutoTokenizer.from_pretrained(path, trust_remote_code=False), path)
    except (OSError, ValueError) as error:
        raise explain_missing(flag, path, error) from None
    require(
        tokenizer.chat_template,
        f"{flag} {path}: its tokenizer has no chat template; use an instruct checkpoint, "
        f"or add chat_template.jinja to the folder",
    )
    require(
        tokenizer.eos_token_id is not None,
        f"{flag} {path}: its tokenizer has no eos_token; set one in tokenizer_config.json",
    )
    if tokenizer.pad_token_id is None:  # only ever used outside of every mask
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_model(path: str, flag: str, device, dtype: torch.dtype, trainable: bool, hybrid_shard=False, offload=False):
    """Causal LM in eval mode (no dropout, whose noise would break the importance ratio). Trainable weights are float32
    masters (float64 under --dtype float64); frozen ones are stored in the compute dtype. Sharded if there are ranks.
    With `offload` it waits in the CPU's memory: sharded weights are fetched layer by layer, a whole model by `on_device`."""
    master = torch.float32 if trainable and dtype == torch.bfloat16 else dtype

    def load():
        return AutoModelForCausalLM.from_pretrained(path, dtype=master, use_safetensors=True, trust_remote_code=False)

    try:
        if parallel.world_size() == 1:
            model = from_hub(load, path).to("cpu" if offload else device)
        else:
            model = parallel.load_sharded(path, lambda: from_hub(load, path), master, dtype, hybrid_shard, offload)
    except (OSError, ValueError, SafetensorError) as error:
        raise explain_missing(flag, path, error) from None
    try:
        head_weight(model)
    except ValueError as error:
        raise UsageError(f"{flag} {path}: {error}; use a Qwen or Llama checkpoint") from None
    return model.eval().requires_grad_(trainable)


def count_params(*models) -> list[int]:
    """Parameters of each model, tied ones once, over all shards."""
    return [sum(p.numel() for p in model.parameters()) for model in models]


@contextlib.contextmanager
def on_device(model, device, offload: bool):
    """Within, a frozen whole model that `offload` keeps in the CPU's memory is on `device`. A sharded one has its place, or
    fetches itself layer by layer. The CPU keeps its copy, pinned from the first time on, so that leaving copies nothing."""
    tensors = [*model.parameters(), *model.buffers()] if offload and parallel.world_size() == 1 else []
    kept = [t.data if t.is_pinned() or device.type == "cpu" else t.data.pin_memory() for t in tensors]
    for tensor, host in zip(tensors, kept, strict=True):
        tensor.data = host.to(device, non_blocking=True)
    try:
        yield
    finally:
        for tensor, host in zip(tensors, kept, strict=True):
            tensor.data = host


class HostCache:
    """Hidden states that wait in the CPU's memory, on CUDA in pinned memory, which the GPU copies to and from on its own.
    The memory is that of the largest step, taken once in chunks: pinning is slow, and torch rounds up to a power of two."""

    CHUNK = 1 << 27  # elements: 256 MiB of bfloat16

    def __init__(self):
        self.chunks, self.at, self.used = [], 0, 0

    def clear(self) -> None:
        """What was kept may be overwritten from now on."""
        self.at = self.used = 0

    def keep(self, hidden: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """A copy of (N, H) in `dtype`, good until `clear`. On CUDA it may still be under way: Meter.lap waits for it."""
        size = hidden.numel()
        while self.at < len(self.chunks) and self.used + size > len(self.chunks[self.at]):
            self.at, self.used = self.at + 1, 0
        if self.at == len(self.chunks):
            self.chunks.append(torch.empty(max(size, self.CHUNK), dtype=dtype, pin_memory=hidden.is_cuda))
        kept = self.chunks[self.at][self.used : self.used + size].view(hidden.shape)
        self.used += size
        return kept.copy_(hidden.to(dtype), non_blocking=True)


def enable_gradient_checkpointing(model) -> None:
    """Recompute activations in backward. Transformers does so in train mode only; the supported models have no dropout."""
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()


def save_model(model, tokenizer, out: Path, dtype: torch.dtype) -> None:
    """Ordinary Hugging Face checkpoint in the compute dtype, the precision in which it was sampled from."""
    state = {}
    for name, tensor in model.state_dict().items():
        whole = parallel.full_tensor(tensor)  # every rank takes part, rank 0 keeps it
        if parallel.rank() == 0:
            state[name] = whole.to(dtype).cpu()
    if parallel.rank():
        return
    if model.config.tie_word_embeddings:  # the cast gave the head storage of its own; it is saved once, as the embedding
        state = {name: t for name, t in state.items() if name not in model.all_tied_weights_keys}
    model.save_pretrained(out, state_dict=state)
    model.config.dtype = dtype  # save_pretrained writes that of the master weights
    model.config.save_pretrained(out)
    tokenizer.save_pretrained(out)


def clip_gradients(model, max_norm: float) -> float:
    """Scale the gradient to a norm of at most `max_norm`; returns the norm before, over all ranks' shards."""
    return float(parallel.full_tensor(torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)))
