# docs/scaling.md
"""What a command will need, before it runs: memory per GPU phase by phase, tokens and FLOPs a step, and whether it fits.

Read from the models' configs alone. Weights, gradients and optimizer are counted; activations are traced through two
layers of fake tensors, which have shapes and no memory. Responses are taken to be as long as --max-response-tokens
allows, prompts PROMPT_TOKENS long. On a CPU the figures are resident memory, imports included.
"""

import importlib.util
import os
import re
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoConfig, AutoModelForCausalLM

from infra import parallel
from infra.cli import require
from infra.hub import explain_missing, from_hub
from infra.models import autocast, device_and_dtype
from kernels.linear import WORKSPACE_BYTES

PROMPT_TOKENS = 256
GB = 1e9
MARGIN = 1.1  # how far an estimate must be above the hardware before the run is refused
CUDA_CONTEXT = 1.0 * GB  # what CUDA and NCCL take beside the tensors


@dataclass
class Sizes:
    """Elements and dimensions of one model."""

    config: object
    params: int
    root: int  # of the embedding, the head and the last norm: gathered together, and whole from forward to backward
    layer: int  # of one decoder layer
    kv: int  # cache elements a token

    @staticmethod
    def read(path: str, flag: str) -> "Sizes":
        try:
            config = from_hub(lambda: AutoConfig.from_pretrained(path), path)
            with torch.device("meta"):
                model = AutoModelForCausalLM.from_config(config)
        except Exception as error:  # of whatever kind: what a config that makes no sense makes a library raise
            raise explain_missing(flag, path, error) from None
        params = sum(p.numel() for p in model.parameters())
        layers = [sum(p.numel() for p in layer.parameters()) for layer in model.base_model.layers]
        kv = 2 * config.num_hidden_layers * config.num_key_value_heads * head_dim(config)
        return Sizes(config, params, params - sum(layers), max(layers), kv)


def head_dim(config) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


@dataclass
class Hardware:
    gpus: int
    bytes: float  # memory of one
    shards: int  # ranks that one copy of a model is spread over
    cuda: bool

    @staticmethod
    def find(args) -> "Hardware":
        gpus, cuda = parallel.world_size(), torch.cuda.is_available() or bool(args.plan_gpu)
        if args.plan_gpu:
            match = re.fullmatch(r"(?:(\d+)x)?(\d+(?:\.\d+)?)GB", args.plan_gpu)
            require(match, f"--plan-gpu {args.plan_gpu}: write it as 80GB, or 8x80GB for eight of them")
            gpus, memory = int(match[1] or gpus), float(match[2]) * GB
        elif cuda:
            memory = torch.cuda.get_device_properties(0).total_memory
        else:
            memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / gpus
        local = int(os.environ.get("LOCAL_WORLD_SIZE", min(8, gpus)))
        return Hardware(gpus, memory, local if args.hybrid_shard else gpus, cuda)


@dataclass
class Workload:
    """What the script does with its models in one step."""

    trained: Sizes
    frozen: dict[str, Sizes]  # teacher, reference
    sampled: Sizes  # the model that answers
    responses: int  # a step
    updates: int = 1  # optimizer steps a step
    cached: bool = False  # the frozen model's hidden states wait in CPU memory


def estimate(args, work: Workload, hw: Hardware) -> dict[str, dict[str, float]]:
    """{phase: {what: bytes}} per GPU. The phases of a step are rollout and train, with --offload-teacher score too."""
    compute = 2 if device_and_dtype(args.dtype)[1] == torch.bfloat16 or (hw.cuda and args.dtype == "auto") else 4
    compute, master = (8, 8) if args.dtype == "float64" else (compute, 4)
    sharded, S, P = hw.shards > 1, hw.shards, work.trained.params
    length = PROMPT_TOKENS + args.max_response_tokens
    state = {
        "before any tensor": CUDA_CONTEXT if hw.cuda else resident_bytes(),
        "weights": P * master / S,
        "AdamW": 2 * P * master / S,
    }
    for name, sizes in work.frozen.items():
        whole = sizes.root if sharded else 0  # the fused losses read a whole head
        state[name] = (sizes.params / S + whole) * compute
    if getattr(args, "offload_teacher", False) and hw.cuda:  # but for its head, it waits in the CPU's memory
        state["teacher"] = work.frozen["teacher"].root * compute

    rollout = state | rollout_bytes(args, work, hw, compute, sharded, length)
    tokens = min(args.micro_batch_tokens, work.responses * length)
    rows = max(tokens // length, 1)
    config = work.trained.config
    head = config.vocab_size * config.hidden_size
    width = max([sizes.config.hidden_size for sizes in work.frozen.values()], default=0)
    train = state | {
        "gradients": P * master / S,
        "activations": activation_bytes(args, work.trained, compute, sharded, rows, tokens // rows),
        "head's gradient": head * 4 + (head * compute if sharded else 0),
        "logits' workspace": min(WORKSPACE_BYTES["cuda" if hw.cuda else "cpu"], 3 * tokens * config.vocab_size * 4),
        "hidden states": tokens * config.hidden_size * 4 * 2,
    }
    if uses_vllm(args, hw) and not (hw.cuda and args.vllm_sleep):
        train["vLLM"] = vllm_bytes(args, work, hw, compute)
    if sharded:
        train["gathered weights"] = (2 * work.trained.layer + work.trained.root) * compute + 2 * work.trained.layer * 4
    elif compute == 2:
        train["bfloat16 copy of the weights"] = P * 2
    if work.cached and not hw.cuda:
        train["teacher's hidden states"] = work.responses * args.max_response_tokens * width * compute
    phases = {"rollout": rollout, "train": train}
    if getattr(args, "offload_teacher", False):
        teacher = work.frozen["teacher"]
        phases["score"] = state | {"teacher": (2 * teacher.layer if sharded else teacher.params) * compute}
        if uses_vllm(args, hw) and not args.vllm_sleep:
            phases["score"]["vLLM"] = vllm_bytes(args, work, hw, compute)
    return phases


def peak_bytes(phases: dict[str, dict[str, float]]) -> float:
    return max(sum(parts.values()) for parts in phases.values())


def resident_bytes() -> float:
    """Memory of this process now. Not ru_maxrss, which begins with that of the process it was forked from."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:  # no Linux
        return 0.4 * GB


def rollout_bytes(args, work: Workload, hw: Hardware, compute: int, sharded: bool, length: int) -> dict[str, float]:
    """What the sampler takes while it samples."""
    if uses_vllm(args, hw):
        return {"vLLM": vllm_bytes(args, work, hw, compute)}
    tokens = min(args.rollout_batch_tokens, -(-work.responses // hw.gpus) * length)
    parts = {
        "gathered weights": work.sampled.params * compute if sharded else 0,
        "key-value cache": tokens * work.sampled.kv * compute,
        "probabilities": max(tokens // length, 1) * work.sampled.config.vocab_size * 32,  # float32 and float64 of a row
    }
    if compute == 2 and not sharded and work.sampled is work.trained:
        parts["bfloat16 copy of the weights"] = work.trained.params * 2  # autocast's
    return parts


def uses_vllm(args, hw: Hardware) -> bool:
    if args.sampler == "auto":
        return hw.cuda and (bool(args.plan_gpu) or importlib.util.find_spec("vllm") is not None)
    return args.sampler == "vllm"


def vllm_bytes(args, work: Workload, hw: Hardware, compute: int) -> float:
    """vLLM's share of the GPU; on a CPU its weights and its cache."""
    if not hw.cuda:
        return work.sampled.params * compute + (512 << 20)
    return args.vllm_gpu_memory_utilization * hw.bytes


def activation_bytes(args, sizes: Sizes, compute: int, sharded: bool, rows: int, length: int) -> float:
    """What autograd keeps of one micro-batch of rows x length tokens: counted on models of one and two layers."""
    dtype = {2: torch.bfloat16, 4: torch.float32, 8: torch.float64}[compute]
    saved = [saved_bytes(sizes.config, dtype, sharded, rows, length, layers) for layers in (1, 2)]
    layer, rest = saved[1] - saved[0], 2 * saved[0] - saved[1]
    count = sizes.config.num_hidden_layers
    if args.gradient_checkpointing:  # each layer's input, and one layer at a time
        return rest + count * rows * length * sizes.config.hidden_size * compute + layer
    return rest + count * layer


def saved_bytes(config, dtype, sharded: bool, rows: int, length: int, layers: int) -> int:
    """Bytes of the distinct tensors, weights left out, that autograd saves in the forward pass of `layers` layers."""
    config = type(config)(**(config.to_dict() | {"num_hidden_layers": layers, "vocab_size": 32, "layer_types": None}))
    config.pad_token_id = None
    config._attn_implementation = "sdpa"
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage()._cdata] = tensor
        return tensor

    master = torch.float32 if dtype == torch.bfloat16 and not sharded else dtype
    with FakeTensorMode(), autocast(torch.device("cpu"), dtype):
        model = AutoModelForCausalLM.from_config(config, dtype=master)
        input_ids = torch.zeros((rows, length), dtype=torch.long)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model.base_model(input_ids=input_ids, use_cache=False)
        weights = {p.untyped_storage()._cdata for p in model.parameters()}
        shapes = {shape for p in model.parameters() if p.ndim == 2 for shape in (p.shape, p.T.shape)}
        return sum(
            t.untyped_storage().nbytes()
            for key, t in kept.items()
            if key not in weights and t.shape not in shapes  # autocast's copies of the weights are counted by themselves
        )


def flops(work: Workload, responses: int, length: int) -> dict[str, float]:
    """FLOPs of one step: 2 a weight and token forward, 6 forward and backward, and the attention's own."""

    def forward(sizes: Sizes) -> float:
        config = sizes.config
        width = config.num_attention_heads * head_dim(config)
        attention = 2 * config.num_hidden_layers * width * length  # q k^T and p v, causal: half of 2 x 2
        return responses * length * (2 * sizes.params + attention)

    return {
        "rollout": forward(work.sampled),
        "score": sum(map(forward, work.frozen.values())) + (forward(work.trained) if work.updates > 1 else 0),
        "train": 3 * forward(work.trained),
    }


def check(args, work: Workload) -> None:
    """Under --plan print what the command needs and exit. Otherwise raise UsageError if it cannot fit this hardware."""
    hw = Hardware.find(args)
    phases = estimate(args, work, hw)
    peak = peak_bytes(phases)
    if args.plan:
        print(render(args, work, hw, phases))
        raise SystemExit(0)
    shortage = vllm_shortage(args, work, hw)
    require(not shortage, shortage)
    require(
        peak <= hw.bytes * MARGIN,
        f"needs about {peak / GB:.1f} GB per {'GPU' if hw.cuda else 'process'}, there are {hw.bytes / GB:.1f}: "
        f"{advice(args, work, hw)} (--plan prints the whole count)",
    )


def vllm_shortage(args, work: Workload, hw: Hardware) -> str | None:
    """What is wrong if vLLM's share of a GPU does not hold its copy of the weights."""
    if not uses_vllm(args, hw):
        return None
    share, weights = vllm_bytes(args, work, hw, 2), work.sampled.params * 2 / max(args.vllm_tp, 1)
    if share > weights:
        return None
    return (
        f"--vllm-gpu-memory-utilization {args.vllm_gpu_memory_utilization}: {share / GB:.1f} GB do not hold the "
        f"{weights / GB:.1f} GB of weights that vLLM keeps on each GPU, and its cache; raise it, or --vllm-tp"
    )


def advice(args, work: Workload, hw: Hardware) -> str:
    """The first set of flags, the least costly first, with which the command would fit."""

    def fits(changes, gpus=hw.gpus):
        changed = replace(args, **changes)
        hardware = replace(hw, gpus=gpus, shards=gpus if gpus != hw.gpus else hw.shards)
        return peak_bytes(estimate(changed, work, hardware)) <= hw.bytes

    length = PROMPT_TOKENS + args.max_response_tokens
    smaller = {
        "micro_batch_tokens": min(args.micro_batch_tokens, length),
        "rollout_batch_tokens": min(args.rollout_batch_tokens, 4 * length),
    }
    for changes in (
        {"vllm_sleep": True},
        {"micro_batch_tokens": smaller["micro_batch_tokens"]},
        {"rollout_batch_tokens": smaller["rollout_batch_tokens"]},
        smaller,
        {"gradient_checkpointing": True},
        {"gradient_checkpointing": True, "vllm_sleep": True},
        smaller | {"gradient_checkpointing": True, "vllm_sleep": True},
    ):
        if fits(changes):
            flags = [
                f"--{k.replace('_', '-')}" + ("" if v is True else f" {v}")
                for k, v in changes.items()
                if getattr(args, k) != v
            ]
            return f"it would fit with {' '.join(flags)}"
    for gpus in (2, 4, 8, 16, 32, 64, 128):
        if hw.cuda and gpus > hw.gpus and fits({"gradient_checkpointing": True, "vllm_sleep": True}, gpus):
            return f"it would fit on {gpus} such GPUs (torchrun) with --gradient-checkpointing --vllm-sleep"
    return "use smaller models, or hardware with more memory"


def render(args, work: Workload, hw: Hardware, phases: dict[str, dict[str, float]]) -> str:
    """The plan as text."""
    length = PROMPT_TOKENS + args.max_response_tokens
    tokens = work.responses * length
    lines = [f"{hw.gpus} x {hw.bytes / GB:.0f} GB" + (f", one copy of each model over {hw.shards}" if hw.shards > 1 else "")]
    models = {"trained": work.trained} | work.frozen
    lines.append("; ".join(f"{name} {sizes.params / 1e9:.3f} B parameters" for name, sizes in models.items()))
    for phase, parts in phases.items():
        lines.append(f"\n{phase}: {sum(parts.values()) / GB:.2f} GB")
        lines += [f"  {size / GB:8.2f}  {what}" for what, size in parts.items() if size >= 0.005 * GB]
    lines.append(
        f"\na step: up to {work.responses} responses x {length} tokens = {tokens / 1e6:.2f} M tokens, "
        + ", ".join(f"{name} {value / 1e15:.3g}" for name, value in flops(work, work.responses, length).items())
        + " PFLOP"
    )
    peak = peak_bytes(phases)
    verdict = "fits" if peak <= hw.bytes else f"does not fit: {advice(args, work, hw)}"
    shortage = vllm_shortage(args, work, hw)
    verdict = f"does not fit: {shortage}" if shortage else verdict
    lines.append(f"peak {peak / GB:.2f} of {hw.bytes / GB:.1f} GB: {verdict}")
    return "\n".join(lines)
