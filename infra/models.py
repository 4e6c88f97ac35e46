# docs/architecture.md
"""Models and tokenizers: where they compute, how they are loaded, clipped and saved."""

import contextlib
import functools
import math
import os
import re
import shutil
import subprocess
from pathlib import Path

import torch
import transformers
from torch.distributed.fsdp import FSDPModule
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from infra import lora, parallel
from infra.cli import UsageError, require
from infra.files import full_disk
from infra.hub import explain_missing, first_line, from_hub
from kernels import head_weight

HARMLESS = re.compile(r"rotary_emb\.inv_freq$|\.masked_bias$|\.attn\.bias$")  # buffers of old checkpoints, computed anew
PREFIXES = {  # of tensor names, and what puts them there
    "_orig_mod.": "torch.compile",
    "module.": "DDP or DeepSpeed",
    "_fsdp_wrapped_module.": "FSDP",
    "base_model.model.": "PEFT: merge its adapter first (merge_and_unload)",
}
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
    files = {file.name for file in Path(path).glob("*")} if Path(path).is_dir() else None
    require(
        files is None or files & {"tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json"},
        f"{flag} {path}: has no tokenizer.json; copy the tokenizer's files into the folder",
    )
    try:
        tokenizer = from_hub(lambda: AutoTokenizer.from_pretrained(path, trust_remote_code=False), path)
    except Exception as error:  # of whatever kind: what a damaged file makes a library raise
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


def load_frozen(args, path: str, flag: str, device, dtype: torch.dtype):
    """A teacher, or a reference: `load_model` as the flags say, with --offload-teacher into the CPU's memory."""
    offload = getattr(args, "offload_teacher", False)
    return load_model(path, flag, device, dtype, trainable=False, hybrid_shard=args.hybrid_shard, offload=offload)


def load_policy(args, path: str, flag: str, device, dtype: torch.dtype):
    """The model that trains: all of its weights, or with --lora-rank adapters in a frozen model."""
    adapters = (args.lora_rank, args.lora_alpha, args.seed) if args.lora_rank else None
    model = load_model(path, flag, device, dtype, True, args.hybrid_shard, adapters=adapters)
    if adapters:
        learns, [whole] = sum(p.numel() for p in model.parameters() if p.requires_grad), count_params(model)
        layers = len(lora.adapted(model))
        print(f"--lora-rank {args.lora_rank}: {learns} of {whole} parameters learn, in {layers} linear layers", flush=True)
    return model


def load_model(
    path: str, flag: str, device, dtype: torch.dtype, trainable: bool, hybrid_shard=False, offload=False, adapters=None
):
    """Causal LM in eval mode (no dropout, whose noise would break the importance ratio). Trainable weights are float32
    masters (float64 under --dtype float64); frozen ones are stored in the compute dtype. Sharded if there are ranks.
    With `offload` it waits in the CPU's memory: sharded weights are fetched layer by layer, a whole model by `on_device`.
    With `adapters`, lora.inject's (rank, alpha, seed), it is frozen and they train.

    Raises UsageError as read_checkpoint and lora.inject do."""
    master = torch.float32 if trainable and dtype == torch.bfloat16 and not adapters else dtype

    def prepare(model):
        return lora.inject(model, *adapters) if adapters else model.requires_grad_(trainable)

    def load():
        return prepare(read_checkpoint(path, flag, master))

    if parallel.world_size() == 1:
        return load().to("cpu" if offload else device).eval()
    return parallel.load_sharded(load, prepare, master, dtype, hybrid_shard, offload).eval()


def read_checkpoint(path: str, flag: str, dtype: torch.dtype):
    """Causal LM of a hub id or local folder, on the CPU, read back: every weight is there, has its shape and is finite, and
    none is left over. What its configs say and the weights or the training contradict is repaired, with a line: a tied head
    that is not, dropout, a generation config that could not be saved. Raises UsageError for whatever else is wrong."""

    def load():
        config = without_noise(AutoConfig.from_pretrained(path, trust_remote_code=False), flag, path)
        if Path(path, "generation_config.json").exists():
            GenerationConfig.from_pretrained(path)  # a damaged one would be ignored below, and its EOS ids with it
        options = {"config": config, "dtype": dtype, "use_safetensors": True, "trust_remote_code": False}
        return AutoModelForCausalLM.from_pretrained(path, output_loading_info=True, ignore_mismatched_sizes=True, **options)

    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()  # it reports at length what is one line here
    try:
        model, report = from_hub(load, path)
    except UsageError:
        raise
    except Exception as error:  # of whatever kind: what a damaged file makes a library raise
        if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
            raise
        raise explain_missing(flag, path, error) from None
    finally:
        transformers.logging.set_verbosity(verbosity)
    require_complete(report, flag, path)
    for name, tensor in model.state_dict().items():
        finite = not tensor.is_floating_point() or not tensor.numel() or all(map(math.isfinite, tensor.aminmax()))
        require(finite, f"{flag} {path}: {name} holds nan or inf; the checkpoint is damaged, use another")
    try:
        head_weight(model)
    except ValueError as error:
        raise UsageError(f"{flag} {path}: {error}; use a Qwen or Llama checkpoint") from None
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    if model.config.tie_word_embeddings and not tied:
        print(f"{flag} {path}: config.json says that the head is tied, and the weights have one of their own, which is kept")
        model.config.tie_word_embeddings = False
    repair_generation_config(model, flag, path)
    return model


def check_checkpoint(path: str, flag: str, dtype: torch.dtype) -> None:
    """For an engine that reads the checkpoint by itself: raise UsageError as read_checkpoint does, and where it would go
    by config.json's word on the head. Rank 0 reads, into the CPU's memory for a while."""
    tied = parallel.on_rank_zero(lambda: read_checkpoint(path, flag, dtype).config.tie_word_embeddings)
    said = AutoConfig.from_pretrained(path).tie_word_embeddings
    require(tied == said, f"{flag} {path}: set tie_word_embeddings to false in config.json, or use --sampler hf")


def without_noise(config, flag: str, path: str):
    """`config` with every dropout at 0: gradient checkpointing needs the train mode, in which it would make the policy that
    trains another than the one that sampled."""
    inner = config.get_text_config()
    noise = {name: value for name, value in vars(inner).items() if re.search("drop|jitter", name)}
    noise = {name: value for name, value in noise.items() if type(value) in (int, float) and value}
    for name, value in noise.items():
        setattr(inner, name, 0.0)
        print(f"{flag} {path}: config.json's {name} {value} is set to 0, here and in what is saved")
    return config


def require_complete(report: dict, flag: str, path: str) -> None:
    """Raise UsageError where transformers' loading report has a weight that is missing, left over, or of another shape."""
    missing, shapes = sorted(report["missing_keys"]), sorted(report["mismatched_keys"])
    left = sorted(name for name in report["unexpected_keys"] if not HARMLESS.search(name))
    cause = "the weights and config.json do not belong together"
    for prefix, source in PREFIXES.items():
        if any(name.startswith(prefix) for name in left):
            cause = f"the prefix {prefix} is left from {source}: save it again with names that do not have it"
    found = [f"lacks {len(missing)} weights, the first {missing[0]}"] if missing else []
    found += [f"has {len(left)} that the model does not, the first {left[0]}"] if left else []
    found += [f"has {name} in shape {list(has)}, not {list(needs)}" for name, has, needs in shapes[:1]]
    require(not found, f"{flag} {path}: {' and '.join(found)}; {cause}")


def repair_generation_config(model, flag: str, path: str) -> None:
    """Replace a generation config that transformers reads and then refuses to save, after the last step of training."""
    config = model.generation_config
    try:
        return config.validate(strict=True)
    except ValueError:
        config.do_sample = True  # what a temperature or a top_p without it means
    how = "do_sample: true is added"
    try:
        config.validate(strict=True)
    except ValueError:
        ids = {name: getattr(config, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
        model.generation_config, how = GenerationConfig(**ids), "only its token ids are kept"
    print(f"{flag} {path}: generation_config.json cannot be saved as it is: {how}")


def count_params(*models) -> list[int]:
    """Parameters of each model, tied ones once, over all shards."""
    return [sum(p.numel() for p in model.parameters()) for model in models]


def train_flops(model) -> int:
    """FLOPs a token of one forward and backward pass: 6 a parameter that learns, 4 a frozen one, which gets no gradient."""
    return sum((6 if p.requires_grad else 4) * p.numel() for p in model.parameters())


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
    """Ordinary Hugging Face checkpoint in the compute dtype, the precision in which it was sampled from. With LoRA the
    adapters are merged in it, and beside it, in their own precision, in adapter/."""
    state = {}
    for name, whole in lora.plain_weights(model):  # every rank takes part, rank 0 keeps it
        if parallel.rank() == 0:
            state[name] = whole.to(dtype).cpu()
    adapter = lora.adapter_state(model)
    if parallel.rank():
        return
    with _aside(out) as folder:
        _write(model, tokenizer, folder, state, dtype)
        if adapter:
            lora.write_adapter(model, adapter, folder / "adapter")
        for path in sorted(folder.iterdir()):
            if path.is_dir():
                shutil.rmtree(out / path.name, ignore_errors=True)
            os.replace(path, out / path.name)


def try_save(model, tokenizer, out: Path, dtype: torch.dtype) -> None:
    """Write all that save_model does, but for the weights, and delete it again. Raises UsageError if that fails."""
    try:
        with _aside(out) as folder:
            _write(model, tokenizer, folder, {"trial": torch.zeros(1)}, dtype)
    except Exception as error:
        if full_disk(error):
            raise
        raise UsageError(
            f"{model.name_or_path}: the trained model could not be saved ({first_line(error)}); repair its config.json, "
            f"generation_config.json or tokenizer"
        ) from None


def weight_bytes(model, dtype: torch.dtype) -> int:
    """Bytes of the whole model's weights in `dtype`, tied ones once."""
    return sum(parameter.numel() for parameter in model.parameters()) * dtype.itemsize


@contextlib.contextmanager
def _aside(out: Path):
    """A fresh folder in `out`, gone behind it: what is saved there is moved out when it is whole."""
    folder = Path(out, "model.partial")
    shutil.rmtree(folder, ignore_errors=True)  # of a run that was killed while it saved
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _write(model, tokenizer, folder: Path, state: dict, dtype: torch.dtype) -> None:
    model.save_pretrained(folder, state_dict=state)
    before, model.config.dtype = model.config.dtype, dtype  # save_pretrained writes that of the master weights
    model.config.save_pretrained(folder)
    model.config.dtype = before
    tokenizer.save_pretrained(folder)


def clip_gradients(model, max_norm: float) -> float:
    """Scale the gradient to a norm of at most `max_norm`; returns the norm before, over all ranks' shards."""
    return float(parallel.full_tensor(torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)))
