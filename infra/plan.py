# docs/scaling.md
"""What a command will need, before it runs: memory per GPU phase by phase, tokens and FLOPs a step, and whether it fits.

Read from the models' configs alone. Weights, gradients and optimizer are counted; activations are traced through two
layers of fake tensors, which have shapes and no memory. Responses are taken to be as long as --max-response-tokens
allows, prompts PROMPT_TOKENS long. On a CPU the figures are resident memory, imports included.
"""

import importlib.util
import math
import os
import re
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoConfig, AutoModelForCausalLM

from infra import lora, parallel
from infra.cli import require
from infra.hub import explain_missing, from_hub
from infra.models import autocast, device_and_dtype
from kernels.linear import WORKSPACE_BYTES

PROMPT_TOKENS = 256
GB = 1e9
CPU_MARGIN = 1.1  # how far an estimate must be above a CPU's memory before the run is refused; a GPU's has no give
CUDA_CONTEXT = 1.0 * GB  # what CUDA and NCCL take beside the tensors
RESERVE = 0.05  # of a GPU, left free where vLLM's share is chosen: fragments of torch's memory, and an estimate is one
GRAPHS = 1.5 * GB  # vLLM's CUDA graphs, kernels and buffers, which stay while it sleeps; not measured


@dataclass
class Sizes:
    """Elements and dimensions of one model."""

    config: object
    params: int
    root: int  # of the embedding, the head and the last norm: gathered together, and whole from forward to backward
    layer: int  # of one decoder layer
    kv: int  # cache elements a token
    rank_one: int  # of LoRA adapters of rank 1: inputs + outputs of all linear layers in the decoder

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
        linear = [module for module in model.base_model.layers.modules() if isinstance(module, torch.nn.Linear)]
        rank_one = sum(module.in_features + module.out_features for module in linear)
        return Sizes(config, params, params - sum(layers), max(layers), kv, rank_one)


def head_dim(config) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


@dataclass(frozen=True)
class Hardware:
    gpus: int
    bytes: float  # memory of one
    shards: int  # ranks that one copy of a model is spread over
    cuda: bool

    @property
    def sharded(self) -> bool:
        return self.shards > 1

    @staticmethod
    def find(args) -> "Hardware":
        gpus, cuda = parallel.world_size(), torch.cuda.is_available() or bool(args.plan_gpu)
        if args.plan_gpu:
            match = re.fullmatch(r"(?:(\d+)x)?(\d+(?:\.\d+)?)GB", args.plan_gpu)
            require(match, f"--plan-gpu {args.plan_gpu}: write it as 80GB, or 8x80GB for eight of them")
            gpus, memory = int(match[1] or gpus), float(match[2]) * GB
        elif device_and_dtype("auto")[0].type == "cuda":
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
    all_at_once: bool = False  # all problems are answered before the first step, not a step's at a time


def estimate(args, work: Workload, hw: Hardware) -> dict[str, dict[str, float]]:
    """{phase: {what: bytes}} per GPU. The phases of a step are rollout and train, with --offload-teacher score too; where
    the teacher samples also evaluate: --eval-data is answered by the student, always with hf."""
    compute, master = compute_bytes(args, hw), 8 if args.dtype == "float64" else 4
    sharded, S, P = hw.sharded, hw.shards, work.trained.params
    length, adapters = full_length(args), args.lora_rank * work.trained.rank_one
    learned, frozen = adapters or P, dict(work.frozen)
    state = {
        "before any tensor": CUDA_CONTEXT if hw.cuda else resident_bytes(),
        "weights": P * (compute if adapters else master) / S,
        "adapters": adapters * master / S,
        "AdamW": 2 * learned * master / S,
    }
    if adapters:  # GRPO's reference is the policy without them
        frozen.pop("reference", None)
    for name, sizes in frozen.items():
        whole = sizes.root if sharded else 0  # the fused losses read a whole head
        state[name] = (sizes.params / S + whole) * compute
    if getattr(args, "offload_teacher", False) and hw.cuda:  # but for its head, it waits in the CPU's memory
        teacher = work.frozen["teacher"]
        stays = teacher.root if sharded else teacher.config.vocab_size * teacher.config.hidden_size
        state["teacher"] = stays * compute

    rollout = state | rollout_bytes(args, work, hw)
    tokens = min(args.micro_batch_tokens, work.responses * length)
    rows = max(tokens // length, 1)
    config = work.trained.config
    head = config.vocab_size * config.hidden_size
    width = max([sizes.config.hidden_size for sizes in work.frozen.values()], default=0)
    train = state | {
        "gradients": learned * master / S,
        "activations": activation_bytes(args, work.trained, hw, rows, tokens // rows),
        "head's gradient": 0 if adapters else head * 4 + (head * compute if sharded else 0),
        "logits' workspace": min(WORKSPACE_BYTES["cuda" if hw.cuda else "cpu"], 3 * tokens * config.vocab_size * 4),
        "hidden states": tokens * config.hidden_size * 4 * 2,
    }
    if sharded:
        reduced = 0 if adapters else 2 * work.trained.layer * 4
        train["gathered weights"] = (2 * work.trained.layer + work.trained.root) * compute + reduced
    elif compute == 2 and not adapters:
        train["bfloat16 copy of the weights"] = P * 2
    if adapters and not hw.cuda:  # their small tensors break up the C library's heap: 0.7 and 1.2 times as much was measured
        train["kept by the heap"] = train["activations"]
    if work.cached and not hw.cuda:
        train["teacher's hidden states"] = work.responses * args.max_response_tokens * width * compute
    phases = {"rollout": rollout, "train": train}
    if getattr(args, "offload_teacher", False):
        teacher = work.frozen["teacher"]
        phases["score"] = state | {"teacher": (2 * teacher.layer if sharded else teacher.params) * compute}
    if args.eval_every and work.sampled is not work.trained:
        phases["evaluate"] = state | hf_bytes(args, work, hw, work.trained, args.rollout_batch_tokens)
    if uses_vllm(args, hw):
        sleeps = hw.cuda and args.vllm_sleep
        share = vllm_bytes(args, work, hw, sum(rollout.values()) if sleeps else peak_bytes(phases))
        for parts in phases.values():
            parts["vLLM"] = GRAPHS if sleeps and parts is not rollout else share
    return phases


def full_length(args) -> int:
    """Tokens of a prompt and the longest response."""
    return PROMPT_TOKENS + args.max_response_tokens


def compute_bytes(args, hw: Hardware) -> int:
    """Of one number in the compute dtype."""
    return {"bfloat16": 2, "float32": 4, "float64": 8, "auto": 2 if hw.cuda else 4}[args.dtype]


def peak_bytes(phases: dict[str, dict[str, float]]) -> float:
    return max(sum(parts.values()) for parts in phases.values())


def resident_bytes() -> float:
    """Memory of this process now. Not ru_maxrss, which begins with that of the process it was forked from."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:  # no Linux
        return 0.4 * GB


def rollout_bytes(args, work: Workload, hw: Hardware) -> dict[str, float]:
    """What the sampler takes while it samples; vLLM's share comes by itself."""
    if uses_vllm(args, hw):
        return {}
    tokens, length = args.rollout_batch_tokens, full_length(args)
    if not (work.all_at_once or args.eval_every):  # else there are, for all that is known, as many prompts as a batch takes
        tokens = min(tokens, -(-work.responses // hw.gpus) * length)
    tokens = max(tokens, getattr(args, "group_size", 1) * length)  # a prompt is answered in one batch
    return hf_bytes(args, work, hw, work.sampled, tokens)


def hf_bytes(args, work: Workload, hw: Hardware, sizes: Sizes, tokens: int) -> dict[str, float]:
    """What the hf sampler takes for a batch of so many tokens, all of its responses of full length."""
    compute, sharded, trained = compute_bytes(args, hw), hw.sharded, sizes is work.trained
    whole = sizes.params * compute
    parts = {
        "gathered weights": whole if sharded else 0,
        "key-value cache": tokens * sizes.kv * compute,
        "probabilities": max(tokens // full_length(args), 1) * sizes.config.vocab_size * 32,  # float32 and float64 of a row
    }
    if compute == 2 and not hw.cuda and (sharded or args.lora_rank or not trained):  # else the head is float32 itself
        parts["float32 head"] = sizes.config.vocab_size * sizes.config.hidden_size * 4
    if trained and args.lora_rank:
        parts["merged copy of the weights"] = (work.trained.params - work.trained.root) * compute
    elif trained and compute == 2 and not sharded:
        parts["bfloat16 copy of the weights"] = whole  # autocast's
    return parts


def uses_vllm(args, hw: Hardware) -> bool:
    if args.sampler == "auto":
        return hw.cuda and (bool(args.plan_gpu) or importlib.util.find_spec("vllm") is not None)
    return args.sampler == "vllm"


def vllm_bytes(args, work: Workload, hw: Hardware, others: float) -> float:
    """vLLM's share of a GPU, on which the trainer holds `others` bytes meanwhile; on a CPU its weights and its cache.
    By default what is left but for the RESERVE, up to 0.9 of the GPU, and at least what one answer needs."""
    if not hw.cuda:
        return work.sampled.params * compute_bytes(args, hw) + (512 << 20)
    if args.vllm_gpu_memory_utilization is not None:
        return args.vllm_gpu_memory_utilization * hw.bytes
    length = full_length(args)
    least = vllm_fixed_bytes(args, work, hw) + length * vllm_token_bytes(args, work, hw)
    left = min(hw.bytes * (1 - RESERVE) - others, 0.9 * hw.bytes)
    return max(math.floor(100 * left / hw.bytes), math.ceil(100 * least / hw.bytes)) / 100 * hw.bytes


def vllm_fixed_bytes(args, work: Workload, hw: Hardware) -> float:
    """What vLLM takes of its share beside the cache: weights, graphs, and one pass over as many tokens and rows as vLLM 0.32
    takes by default (EngineArgs.get_batch_defaults), with float32 logits and two copies of them in its sampler."""
    rows, tokens = (1024, 16384) if hw.bytes >= 70 * 2**30 else (256, 8192)
    config, compute = work.sampled.config, compute_bytes(args, hw)
    activations = tokens * (2 * config.intermediate_size + 4 * config.hidden_size) * compute
    return GRAPHS + (work.sampled.params * compute + activations) / args.vllm_tp + 3 * rows * config.vocab_size * 4


def vllm_token_bytes(args, work: Workload, hw: Hardware) -> float:
    """Of vLLM's cache, per token and GPU: ranks that share the weights divide the key-value heads."""
    return work.sampled.kv * compute_bytes(args, hw) / min(args.vllm_tp, work.sampled.config.num_key_value_heads)


def vllm_cache_tokens(args, work: Workload, hw: Hardware, phases) -> int:
    """Tokens that vLLM's cache holds on a GPU, and on the others that share its weights."""
    left = phases["rollout"]["vLLM"] - vllm_fixed_bytes(args, work, hw)
    return max(int(left / vllm_token_bytes(args, work, hw)), 0)


def host_bytes(args, work: Workload, hw: Hardware) -> dict[str, float]:
    """{what: bytes} in the CPU's memory per GPU. Pinned blocks are powers of two, which adds a third to typical weights."""
    compute, parts = compute_bytes(args, hw), {}
    if not hw.cuda:
        return parts
    if getattr(args, "offload_teacher", False):
        parts["teacher, pinned"] = work.frozen["teacher"].params * compute / hw.shards * (1 if hw.sharded else 4 / 3)
    if work.cached:
        width = max(sizes.config.hidden_size for sizes in work.frozen.values())
        parts["teacher's hidden states, pinned"] = work.responses * args.max_response_tokens * width * compute / hw.gpus
    return parts


def activation_bytes(args, sizes: Sizes, hw: Hardware, rows: int, length: int) -> float:
    """What autograd keeps of one micro-batch of rows x length tokens: counted on models of one and two layers."""
    compute, sharded = compute_bytes(args, hw), hw.sharded
    dtype = {2: torch.bfloat16, 4: torch.float32, 8: torch.float64}[compute]
    saved = [saved_bytes(sizes.config, dtype, sharded, rows, length, layers, args.lora_rank) for layers in (1, 2)]
    layer, rest = saved[1] - saved[0], 2 * saved[0] - saved[1]
    count = sizes.config.num_hidden_layers
    if args.gradient_checkpointing:  # each layer's input, and one layer at a time
        return rest + count * rows * length * sizes.config.hidden_size * compute + layer
    return rest + count * layer


def saved_bytes(config, dtype, sharded: bool, rows: int, length: int, layers: int, lora_rank: int = 0) -> int:
    """Bytes of the distinct tensors, weights left out, that autograd saves in the forward pass of `layers` layers."""
    config = type(config)(**(config.to_dict() | {"num_hidden_layers": layers, "vocab_size": 32, "layer_types": None}))
    config.pad_token_id = None
    config._attn_implementation = "sdpa"
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage()._cdata] = tensor
        return tensor

    master = torch.float32 if dtype == torch.bfloat16 and not sharded and not lora_rank else dtype
    with torch.device("meta"):  # peft knows this kind of tensor without memory, not the other, which follows autocast
        model = AutoModelForCausalLM.from_config(config, dtype=master)
        model = lora.inject(model, lora_rank, lora_rank, 0) if lora_rank else model
    with FakeTensorMode(), autocast(torch.device("cpu"), dtype):
        for module in model.modules():
            for name, p in module._parameters.items():
                module._parameters[name] = p if p is None else torch.nn.Parameter(empty_like(p), p.requires_grad)
            module._buffers.update({name: empty_like(buffer) for name, buffer in module._buffers.items()})
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


def empty_like(tensor: torch.Tensor) -> torch.Tensor:
    """One such on the CPU."""
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")


def flops(work: Workload, responses: int, length: int, lora_rank: int = 0) -> dict[str, float]:
    """FLOPs of one step: 2 a weight and token forward, 6 forward and backward or 4 if it is frozen, the attention's own."""

    def forward(sizes: Sizes) -> float:
        config = sizes.config
        width = config.num_attention_heads * head_dim(config)
        attention = 2 * config.num_hidden_layers * width * length  # q k^T and p v, causal: half of 2 x 2
        return responses * length * (2 * sizes.params + attention)

    adapters = lora_rank * work.trained.rank_one
    spared = 2 * work.trained.params - 6 * adapters if adapters else 0
    return {
        "rollout": forward(work.sampled),
        "score": sum(map(forward, work.frozen.values())) + (forward(work.trained) if work.updates > 1 else 0),
        "train": 3 * forward(work.trained) - responses * length * spared,
    }


def check(args, work: Workload) -> None:
    """Under --plan print what the command needs and exit. Otherwise raise UsageError if it cannot fit this hardware.
    Replaces --vllm-gpu-memory-utilization none by the share that is left."""
    hw = Hardware.find(args)
    phases = estimate(args, work, hw)
    peak = peak_bytes(phases)
    if args.plan:
        print(render(args, work, hw, phases))
        raise SystemExit(0)
    shortage = vllm_shortage(args, work, hw, phases)
    require(not shortage, shortage)
    require(
        peak <= hw.bytes * (1 if hw.cuda else CPU_MARGIN),
        f"needs about {peak / GB:.1f} GB per {'GPU' if hw.cuda else 'process'}, there are {hw.bytes / GB:.1f}: "
        f"{advice(args, work, hw)} (--plan prints the whole count)",
    )
    if hw.cuda and uses_vllm(args, hw):
        args.vllm_gpu_memory_utilization = round(phases["rollout"]["vLLM"] / hw.bytes, 4)
    host, ranks = sum(host_bytes(args, work, hw).values()), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    require(
        args.plan_gpu or host * ranks <= there,
        f"needs {host * ranks / GB:.0f} GB of the CPU's memory for what waits there, there are {there / GB:.0f}: lower "
        f"--prompts-per-step or --max-response-tokens, or leave out --offload-teacher",
    )


def vllm_shortage(args, work: Workload, hw: Hardware, phases) -> str | None:
    """What is wrong if vLLM's share of a GPU does not hold its copy of the weights and one answer of full length."""
    if not (hw.cuda and uses_vllm(args, hw)):
        return None
    share, weights = phases["rollout"]["vLLM"], work.sampled.params * compute_bytes(args, hw) / args.vllm_tp
    tokens, length = vllm_cache_tokens(args, work, hw, phases), full_length(args)
    if tokens >= length:
        return None
    return (
        f"--vllm-gpu-memory-utilization {share / hw.bytes:.2g}: {share / GB:.1f} GB hold the {weights / GB:.1f} GB of "
        f"weights that vLLM keeps on each GPU, what it computes with, and {tokens} tokens of cache, less than one prompt "
        f"and answer ({length}); raise it, or --vllm-tp"
    )


def advice(args, work: Workload, hw: Hardware) -> str:
    """The first set of flags, the least costly first, with which the command would fit."""

    def fits(changes, gpus=hw.gpus):
        changed = replace(args, **changes)
        hardware = replace(hw, gpus=gpus, shards=gpus if gpus != hw.gpus else hw.shards)
        return peak_bytes(estimate(changed, work, hardware)) <= hw.bytes

    def flags(changes):
        new = {f"--{k.replace('_', '-')}": v for k, v in changes.items() if getattr(args, k) != v}
        given = [flag if value is True else f"{flag} {value}" for flag, value in new.items() if value is not None]
        dropped = [flag for flag, value in new.items() if value is None]
        return " ".join(["with", *given] * bool(given) + ["without", *dropped] * bool(dropped))

    length = full_length(args)
    smaller = {
        "micro_batch_tokens": min(args.micro_batch_tokens, length),
        "rollout_batch_tokens": min(args.rollout_batch_tokens, 4 * length),
    }
    for changes in (
        {"vllm_sleep": True},
        {"vllm_gpu_memory_utilization": None},
        {"micro_batch_tokens": smaller["micro_batch_tokens"]},
        {"rollout_batch_tokens": smaller["rollout_batch_tokens"]},
        smaller,
        {"gradient_checkpointing": True},
        {"gradient_checkpointing": True, "vllm_sleep": True},
        smaller | {"gradient_checkpointing": True, "vllm_sleep": True},
    ):
        if fits(changes):
            return f"it would fit {flags(changes)}"
    changes = {"gradient_checkpointing": True, "vllm_sleep": True}
    adapters, alone = changes | {"lora_rank": 32}, ""
    if not args.lora_rank and hw.gpus == 1 and fits(adapters):
        alone = f"it would fit {flags(adapters)}, which trains adapters (docs/lora.md)"
    for gpus in (2, 4, 8, 16, 32, 64, 128):
        if hw.cuda and gpus > hw.gpus and fits(changes, gpus):
            more = f"it would fit on {gpus} such GPUs (torchrun) {flags(changes)}".rstrip()
            return f"{more}; on this one {alone}" if alone else more
    return alone or "use smaller models, or hardware with more memory"


def render(args, work: Workload, hw: Hardware, phases: dict[str, dict[str, float]]) -> str:
    """The plan as text."""
    length = full_length(args)
    tokens = work.responses * length
    lines = [f"{hw.gpus} x {hw.bytes / GB:.0f} GB" + (f", one copy of each model over {hw.shards}" if hw.sharded else "")]
    models = {"trained": work.trained} | work.frozen
    sizes_of = {name: f"{name} {sizes.params / 1e9:.3f} B parameters" for name, sizes in models.items()}
    if args.lora_rank:
        sizes_of["trained"] += f" by {args.lora_rank * work.trained.rank_one / 1e9:.3f} B of adapters"
    lines.append("; ".join(sizes_of.values()))
    for phase, parts in phases.items():
        lines.append(f"\n{phase}: {sum(parts.values()) / GB:.2f} GB")
        lines += [f"  {size / GB:8.2f}  {what}" for what, size in parts.items() if size >= 0.005 * GB]
    if hw.cuda and uses_vllm(args, hw):
        cache = vllm_cache_tokens(args, work, hw, phases)
        lines.append(
            f"\nvLLM: {phases['rollout']['vLLM'] / hw.bytes:.2f} of the GPU, of it a cache of {cache} tokens: "
            f"{cache / length:.1f} answers of full length at once"
        )
    for what, size in host_bytes(args, work, hw).items():
        lines.append(f"in the CPU's memory, for each GPU: {size / GB:.2f} GB {what}")
    if hw.cuda and 0.85 * hw.bytes < max(sum(p.values()) for name, p in phases.items() if name != "rollout") <= hw.bytes:
        lines.append("near the limit: set PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True, which leaves fewer fragments")
    needed = flops(work, work.responses, length, args.lora_rank)
    lines.append(
        f"\na step: up to {work.responses} responses x {length} tokens = {tokens / 1e6:.2f} M tokens, "
        + ", ".join(f"{name} {value / 1e15:.3g}" for name, value in needed.items())
        + " PFLOP"
    )
    peak = peak_bytes(phases)
    verdict = "fits" if peak <= hw.bytes else f"does not fit: {advice(args, work, hw)}"
    shortage = vllm_shortage(args, work, hw, phases)
    verdict = f"does not fit: {shortage}" if shortage else verdict
    lines.append(f"peak {peak / GB:.2f} of {hw.bytes / GB:.1f} GB: {verdict}")
    return "\n".join(lines)
