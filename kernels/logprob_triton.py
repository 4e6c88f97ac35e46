# docs: docs/kernels.md
"""The stats and grad leaves of logprob.py for CUDA: one pass over the logits each. Built from divergence_triton.py."""

import torch
import triton
import triton.language as tl

from kernels.divergence_triton import (
    GRAD_BLOCK,
    GRAD_WARPS,
    aligned_rows,
    fold,
    load_logits,
    merge,
    stats_shape,
    tile_columns,
)


@triton.jit
def logprob_stats_kernel(
    z_ptr,  # (n, V)
    log_z_ptr,  # (n,)
    entropy_ptr,  # (n,)
    z_stride,
    V,
    inv_t,
    BLOCK: tl.constexpr,
    VECTOR: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    z_ptr += row * z_stride
    zero = tl.zeros((BLOCK // VECTOR,), tl.float32)
    top, total, sum_z, unused = zero - float("inf"), zero, zero, zero
    for start in tl.range(0, V, BLOCK, num_stages=2):
        z = load_logits(z_ptr, tile_columns(start, BLOCK, VECTOR), V, inv_t)
        top, total, sum_z, unused = fold(top, total, sum_z, unused, z, tl.zeros_like(z))
    row_max, log_total, mean_z, unused_mean = merge(top, total, sum_z, unused)
    tl.store(log_z_ptr + row, row_max + log_total)
    tl.store(entropy_ptr + row, row_max - mean_z + log_total)


@triton.jit
def logprob_grad_kernel(
    z_ptr,  # (n, V)
    ids_ptr,  # (n,), as the next four
    log_z_ptr,
    entropy_ptr,
    grad_logprob_ptr,
    grad_entropy_ptr,
    dz_ptr,  # (n, V)
    z_stride,
    dz_stride,
    V,
    inv_t,
    HAS_LOGPROB: tl.constexpr,
    HAS_ENTROPY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    log_p = load_logits(z_ptr + row * z_stride, columns, V, inv_t) - tl.load(log_z_ptr + row)
    p = tl.exp(log_p)
    score = tl.zeros_like(p)
    if HAS_LOGPROB:
        score -= tl.load(grad_logprob_ptr + row)
    if HAS_ENTROPY:
        score -= tl.load(grad_entropy_ptr + row) * (log_p + tl.load(entropy_ptr + row))
    dz = tl.where(p > 0.0, p * score, 0.0)
    if HAS_LOGPROB:  # before the rounding to bf16: g (1 - p) is small where p is near 1
        dz += tl.where(columns == tl.load(ids_ptr + row), tl.load(grad_logprob_ptr + row), 0.0)
    tl.store(dz_ptr + row * dz_stride + columns, (dz * inv_t).to(dz_ptr.dtype.element_ty), mask=columns < V)


def triton_stats(z, inv_t):  # (n, V) -> log_z (n, 1), entropy (n, 1)
    z = aligned_rows(z)
    log_z, entropy = (torch.empty(len(z), 1, dtype=torch.float32, device=z.device) for _ in range(2))
    logprob_stats_kernel[(len(z),)](z, log_z, entropy, z.stride(0), z.shape[1], inv_t, **stats_shape(z))
    return log_z, entropy


def triton_grad(z, ids, log_z, entropy, grad_logprob, grad_entropy, inv_t, out):  # (n, V), 5 x (n, 1) -> out (n, V)
    z, V = aligned_rows(z), min(z.shape[1], out.shape[1])
    assert out.stride(1) == 1 and out.data_ptr() != z.data_ptr()
    # a kernel's arguments cannot be None: what is not there is a pointer that is not read
    g, h = (log_z if grad is None else grad.float().contiguous() for grad in (grad_logprob, grad_entropy))
    logprob_grad_kernel[(len(z), triton.cdiv(V, GRAD_BLOCK))](
        z, ids.contiguous(), log_z, entropy, g, h, out, z.stride(0), out.stride(0), V, inv_t,
        HAS_LOGPROB=grad_logprob is not None, HAS_ENTROPY=grad_entropy is not None,
        BLOCK=GRAD_BLOCK, num_warps=GRAD_WARPS,
    )  # fmt: skip
