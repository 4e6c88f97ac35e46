# docs: docs/kernels.md
"""The stats and grad leaves of divergence_torch.py for CUDA: two passes over the logits, three for the jsd.

One program takes one row. Every thread keeps an online softmax of its own over the columns it reads, and the threads
are merged once, after the loop: a tile is shaped (threads, VECTOR) and reduced over VECTOR only, so the loop has no
shuffles. VECTOR is what one 16-byte load brings; one such load of each model per thread and step keeps the registers
at 40 (fp32) and 64 (bf16).

The statistics of a row, in the order of `table` (n, 9), fp32:
    forward_kl, reverse_kl, student entropy, teacher entropy, student log_z, teacher log_z, E_s[gap],
    and for the jsd its value and KL(p_s || m)
"""

import torch
import triton
import triton.language as tl

from kernels.divergence_torch import KINDS, Leaf

FORWARD_KL, REVERSE_KL, JSD = (tl.constexpr(i) for i in range(3))  # positions in KINDS
STATS_WARPS, GRAD_WARPS, GRAD_BLOCK = 16, 8, 4096


@triton.jit
def load_logits(ptr, columns, V, inv_t):
    return tl.load(ptr + columns, mask=columns < V, other=float("-inf")).to(tl.float32) * inv_t


@triton.jit
def load_both(zs_ptr, zt_ptr, columns, V, inv_t):
    """Student's and teacher's logits, and their gap. The gap is scaled last: the compiler may fuse one of two products
    with their difference, and logits that are the same would differ by its rounding."""
    zs = load_logits(zs_ptr, columns, V, 1.0)
    zt = load_logits(zt_ptr, columns, V, 1.0)
    return zs * inv_t, zt * inv_t, (zs - zt) * inv_t


@triton.jit
def tile_columns(start, BLOCK: tl.constexpr, VECTOR: tl.constexpr):  # (BLOCK / VECTOR, VECTOR)
    threads = tl.arange(0, BLOCK // VECTOR)[:, None] * VECTOR
    return start + threads + tl.arange(0, VECTOR)[None, :]


@triton.jit
def rescale(total, factor):
    # inf * 0: an infinite term whose probability has underflowed since counts 0
    return tl.where(factor == 0.0, 0.0, total * factor)


@triton.jit
def fold(top, total, sum_z, sum_gap, z, gap):
    """Add a tile (threads, VECTOR) to each thread's sums of e, e z, e gap: e = exp(z - top), top the largest z yet."""
    new_top = tl.maximum(top, tl.max(z, 1))
    finite_top = tl.where(new_top == float("-inf"), 0.0, new_top)  # nothing but -inf so far: all terms are 0
    factor = tl.exp(top - finite_top)
    e = tl.exp(z - finite_top[:, None])
    total = total * factor + tl.sum(e, 1)
    # each sum leaves out what has no probability, and only that: 0 log 0 = 0
    sum_z = rescale(sum_z, factor) + tl.sum(tl.where(e > 0.0, e * z, 0.0), 1)
    sum_gap = rescale(sum_gap, factor) + tl.sum(tl.where(e > 0.0, e * gap, 0.0), 1)
    return new_top, total, sum_z, sum_gap


@triton.jit
def merge(top, total, sum_z, sum_gap):
    """Threads to row: its maximum, log of the sum of e^(z - max), E[z] and E[gap]."""
    row_top = tl.max(top, 0)
    factor = tl.exp(top - row_top)
    row_total = tl.sum(total * factor, 0)
    mean_z = tl.sum(rescale(sum_z, factor), 0) / row_total
    mean_gap = tl.sum(rescale(sum_gap, factor), 0) / row_total
    return row_top, tl.log(row_total), mean_z, mean_gap


@triton.jit
def stats_kernel(
    zs_ptr,  # (n, V) student logits
    zt_ptr,  # (n, V) teacher logits
    table_ptr,  # (n, 9)
    zs_stride,
    zt_stride,
    V,
    inv_t,
    BLOCK: tl.constexpr,
    VECTOR: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)  # row * stride passes 2^31 at row 14,134 of 151,936 columns
    zs_ptr += row * zs_stride
    zt_ptr += row * zt_stride
    zero = tl.zeros((BLOCK // VECTOR,), tl.float32)
    top_s, total_s, sum_zs, gap_s = zero - float("inf"), zero, zero, zero
    top_t, total_t, sum_zt, gap_t = zero - float("inf"), zero, zero, zero
    for start in tl.range(0, V, BLOCK, num_stages=2):
        columns = tile_columns(start, BLOCK, VECTOR)
        zs, zt, gap = load_both(zs_ptr, zt_ptr, columns, V, inv_t)
        top_s, total_s, sum_zs, gap_s = fold(top_s, total_s, sum_zs, gap_s, zs, gap)
        top_t, total_t, sum_zt, gap_t = fold(top_t, total_t, sum_zt, gap_t, zt, gap)
    max_s, log_s, mean_zs, mean_gap_s = merge(top_s, total_s, sum_zs, gap_s)
    max_t, log_t, mean_zt, mean_gap_t = merge(top_t, total_t, sum_zt, gap_t)
    shift = (max_s - max_t) + (log_s - log_t)  # student log_z - teacher log_z, without rounding the two sums first

    table_ptr += row * 9
    tl.store(table_ptr, shift - mean_gap_t)
    tl.store(table_ptr + 1, mean_gap_s - shift)
    tl.store(table_ptr + 2, max_s - mean_zs + log_s)
    tl.store(table_ptr + 3, max_t - mean_zt + log_t)
    tl.store(table_ptr + 4, max_s + log_s)
    tl.store(table_ptr + 5, max_t + log_t)
    tl.store(table_ptr + 6, mean_gap_s)


@triton.jit
def log_ratio_to_mixture(d, jsd_beta):
    """d = log p_s - log p_t -> clean d, log p_s - log m (log p_t - log m is that minus d). As in torch_stats."""
    d = tl.where(d == d, d, 0.0)  # -inf in both models
    d = tl.minimum(tl.maximum(d, -80.0), 80.0)
    return d, -tl.log(1.0 + jsd_beta * (tl.exp(-d) - 1.0))


@triton.jit
def jsd_kernel(
    zs_ptr,  # as stats_kernel
    zt_ptr,
    table_ptr,
    zs_stride,
    zt_stride,
    V,
    inv_t,
    jsd_beta,
    BLOCK: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """Second pass, with both log_z known: the jsd and KL(p_s || m)."""
    row = tl.program_id(0).to(tl.int64)
    zs_ptr += row * zs_stride
    zt_ptr += row * zt_stride
    table_ptr += row * 9
    log_z_s, log_z_t = tl.load(table_ptr + 4), tl.load(table_ptr + 5)
    kl_student = tl.zeros((BLOCK // VECTOR,), tl.float32)
    kl_teacher = tl.zeros((BLOCK // VECTOR,), tl.float32)
    for start in tl.range(0, V, BLOCK, num_stages=2):
        columns = tile_columns(start, BLOCK, VECTOR)
        zs, zt, gap = load_both(zs_ptr, zt_ptr, columns, V, inv_t)
        d, ratio_s = log_ratio_to_mixture(gap - (log_z_s - log_z_t), jsd_beta)
        kl_student += tl.sum(tl.exp(zs - log_z_s) * ratio_s, 1)
        kl_teacher += tl.sum(tl.exp(zt - log_z_t) * (ratio_s - d), 1)
    row_kl_student = tl.sum(kl_student, 0)
    tl.store(table_ptr + 7, jsd_beta * tl.sum(kl_teacher, 0) + (1.0 - jsd_beta) * row_kl_student)
    tl.store(table_ptr + 8, row_kl_student)


@triton.jit
def grad_kernel(
    zs_ptr,  # (n, V)
    zt_ptr,  # (n, V)
    table_ptr,  # (n, 9)
    scale_ptr,  # (n,) weight / T
    dz_ptr,  # (n, V)
    zs_stride,
    zt_stride,
    dz_stride,
    V,
    inv_t,
    jsd_beta,
    KIND: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    zs, zt, gap = load_both(zs_ptr + row * zs_stride, zt_ptr + row * zt_stride, columns, V, inv_t)
    table_ptr += row * 9
    scale = tl.load(scale_ptr + row)
    log_z_s, log_z_t = tl.load(table_ptr + 4), tl.load(table_ptr + 5)
    ps = tl.exp(zs - log_z_s)
    if KIND == FORWARD_KL:
        dz = ps - tl.exp(zt - log_z_t)
    elif KIND == REVERSE_KL:
        dz = tl.where(ps > 0.0, ps * (gap - tl.load(table_ptr + 6)), 0.0)
    else:
        d, ratio_s = log_ratio_to_mixture(gap - (log_z_s - log_z_t), jsd_beta)
        dz = (1.0 - jsd_beta) * ps * (ratio_s - tl.load(table_ptr + 8))
    tl.store(dz_ptr + row * dz_stride + columns, (dz * scale).to(dz_ptr.dtype.element_ty), mask=columns < V)


# ---------------------------------------------------------------------------------------------------------------------
# Wrapper: the leaves, with the signatures of their torch twins
# ---------------------------------------------------------------------------------------------------------------------


def aligned_rows(z):
    assert z.ndim == 2 and z.is_floating_point()
    return z if z.stride(1) == 1 else z.contiguous()


def stats_shape(*logits):
    """One 16-byte load per thread, counted in the widest dtype."""
    vector = 16 // max(z.element_size() for z in logits)
    return dict(BLOCK=32 * STATS_WARPS * vector, VECTOR=vector, num_warps=STATS_WARPS)


def triton_stats(zs, zt, kind, jsd_beta, inv_t):  # (n, V), (n, V) -> Leaf
    V = min(zs.shape[1], zt.shape[1])  # our own buffers may have a few columns of -inf more
    zs, zt = aligned_rows(zs), aligned_rows(zt)
    table = torch.empty(len(zs), 9, dtype=torch.float32, device=zs.device)
    shape = stats_shape(zs, zt)
    stats_kernel[(len(zs),)](zs, zt, table, zs.stride(0), zt.stride(0), V, inv_t, **shape)
    if kind == "jsd":
        jsd_kernel[(len(zs),)](zs, zt, table, zs.stride(0), zt.stride(0), V, inv_t, jsd_beta, **shape)
    columns = table.split(1, 1)  # (n, 1) each
    divergence = columns[{"forward_kl": 0, "reverse_kl": 1, "jsd": 7}[kind]]
    return Leaf(divergence, *columns[:6], saved=(zs, zt, table, V, inv_t))


def triton_grad(leaf, scale, kind, jsd_beta, out):  # scale (n, 1), out (n, V)
    zs, zt, table, V, inv_t = leaf.saved
    V = min(V, out.shape[1])
    assert out.stride(1) == 1, "the gradient's rows must be contiguous"
    assert out.data_ptr() != zs.data_ptr(), "a row of logits is read once more after its neighbour is written"
    grid = (len(zs), triton.cdiv(V, GRAD_BLOCK))
    grad_kernel[grid](
        zs, zt, table, scale.contiguous(), out, zs.stride(0), zt.stride(0), out.stride(0), V, inv_t, jsd_beta,
        KIND=KINDS.index(kind), BLOCK=GRAD_BLOCK, num_warps=GRAD_WARPS,
    )  # fmt: skip
