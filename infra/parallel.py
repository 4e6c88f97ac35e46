# docs/scaling.md
"""Several GPUs: `torchrun --nproc_per_node 8 opd.py ...` starts one process (rank) per GPU, and FSDP2 shards weights,
gradients and optimizer state over them. gloo on CPUs, NCCL on CUDA.

Every rank sees the whole batch. Two things are divided, the sampler's prompts and the micro-batches, and what comes of
them is gathered at once, so that all between (advantages, denominators, data order, metrics) is the same on every rank
and equals a single process's. Without torchrun nothing is sharded and every function here hands back what it was given.
"""

import contextlib
import os
import sys
import traceback
import types

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from transformers import AutoModelForCausalLM
from transformers.initialization import no_init_weights

_store = None  # the key-value store that torchrun keeps for all ranks


def setup() -> None:
    """Join the process group of torchrun, if there is one. Only rank 0 prints from here on."""
    global _store
    if "RANK" not in os.environ or dist.is_initialized():
        return
    _store, rank, size = next(dist.rendezvous("env://"))
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, store=_store, rank=rank, world_size=size)
    if rank:
        sys.stdout = open(os.devnull, "w")


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def barrier() -> None:
    if dist.is_initialized():
        dist.barrier()


def report_failure(message: str) -> None:
    """Print `message` on the rank that fails first; the others fail in its wake, and torchrun ends them all."""
    if _store is None or _store.add("failures", 1) == 1:
        print(message if world_size() == 1 else f"rank {rank()}: {message}", file=sys.stderr, flush=True)


def exit_on_failure() -> None:
    """Under torchrun: report the exception being handled and end this process, whatever its other threads wait for."""
    if dist.is_initialized():
        report_failure(traceback.format_exc())
        os._exit(1)


# ---------------------------------------------------------------------------------------------- dividing and gathering
def share(micro_batches: list[list]) -> list[list]:
    """This rank's micro-batches: every world_size-th, and empty ones behind them until all ranks have equally many,
    because each forward and backward is a collective that every rank must enter."""
    mine = micro_batches[rank() :: world_size()]
    return mine + [[]] * (-(-len(micro_batches) // world_size()) - len(mine))


def all_gather(mine) -> list:
    """Every rank's `mine`, in the order of the ranks, on every rank."""
    parts = [mine]
    if world_size() > 1:
        parts = [None] * world_size()
        dist.all_gather_object(parts, mine)
    return parts


def merge(mine: dict) -> dict:
    """The entries of every rank's dict, on every rank."""
    return {key: value for part in all_gather(mine) for key, value in part.items()}


def on_rank_zero(function, *args):
    """function(*args), called on rank 0 alone; its result on every rank."""
    result = [function(*args) if rank() == 0 else None]
    if world_size() > 1:
        dist.broadcast_object_list(result)
    return result[0]


def all_reduce(values: torch.Tensor, largest: bool = False) -> torch.Tensor:
    """Sum, or maximum, of a CPU tensor over the ranks; the tensor itself stays as it is."""
    if world_size() > 1:
        values = values.clone()
        dist.all_reduce(values, dist.ReduceOp.MAX if largest else dist.ReduceOp.SUM)
    return values


# ---------------------------------------------------------------------------------------------- sharded models
def shard(model, dtype: torch.dtype, hybrid: bool, offload: bool) -> None:
    """FSDP2 in place over all ranks, or with `hybrid` within each node and replicated across nodes. Weights are gathered
    in the compute dtype, a layer at a time; gradients are reduced in float32 and averaged over the ranks.

    The embedding and the head are gathered with the model itself and stay whole between its forward and the backward
    that follows, which is where the fused losses read the head and where its gradient is reduced."""
    local = int(os.environ["LOCAL_WORLD_SIZE"])
    shape, names = ((world_size() // local, local), ("replicate", "shard")) if hybrid else ((world_size(),), ("shard",))
    mesh = dist.init_device_mesh("cuda" if torch.cuda.is_available() else "cpu", shape, mesh_dim_names=names)
    options = {"mesh": mesh}
    if offload and torch.cuda.is_available():
        options["offload_policy"] = CPUOffloadPolicy()
    if dtype == torch.bfloat16:
        options["mp_policy"] = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for layer in model.base_model.layers:
        fully_shard(layer, **options)
    fully_shard(model, **options)
    model.hooked_base_model = types.MethodType(lambda self, **inputs: self.base_model(**inputs), model)
    register_fsdp_forward_method(model, "hooked_base_model")


def reshard(model) -> None:
    """Give up what a forward pass without a backward has left gathered: until then parameters() are not the shards."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


@contextlib.contextmanager
def gathered(model):
    """Within, every rank holds the whole model in the compute dtype and runs it by itself, as often as it likes."""
    groups = [module for module in model.modules() if isinstance(module, FSDPModule)]
    for module in groups:
        module.unshard()
        module.set_reshard_after_forward(False, recurse=False)
    try:
        yield
    finally:
        for module in groups:
            module.reshard()
            module.set_reshard_after_forward(module is not model, recurse=False)


def full_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """The whole of a sharded tensor (a collective), or the tensor itself."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def load_sharded(load, prepare, dtype: torch.dtype, compute_dtype: torch.dtype, hybrid: bool, offload: bool):
    """The model that `load()` returns, sharded. Only rank 0 calls it, so that a node holds one whole copy, not eight; the
    others build theirs from the configs that rank 0's ended with, and `prepare` it as `load` does."""
    loaded = load() if rank() == 0 else None
    config, generation_config, name = on_rank_zero(lambda: (loaded.config, loaded.generation_config, loaded.name_or_path))
    with no_init_weights():  # pages that nothing writes take no memory
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.tie_weights()
    model.generation_config, model.name_or_path = generation_config, name
    model = prepare(model)
    shard(model, compute_dtype, hybrid, offload)
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(model, {} if loaded is None else loaded.state_dict(), options=options)
    return model
