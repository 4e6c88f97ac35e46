# docs: docs/kernels.md
"""Log-probability of given ids and entropy of the whole distribution, from hidden states and a head, in chunks.

Formula. For one token with logits z, already divided by the temperature T, p = softmax(z) and the sampled id a:

    logprob = z_a - log sum_v exp z_v
    entropy = -sum_v p_v log p_v

Gradient with respect to the logits before their division by T, for upstream gradients g (logprob) and h (entropy):

    (g (1[v = a] - p_v) - h p_v (log p_v + entropy)) / T

Unlike a divergence, the policy loss that these two enter is not known here: backward projects each chunk once more.
That makes four matrix products in all, and one where no gradient is wanted.
"""

import sys

import torch

from kernels.divergence_torch import BLOCK_ELEMENTS, mean, mean_over_support, softmax_and_log_z
from kernels.linear import (
    empty_logits,
    operand_dtype,
    project,
    reduce_grads,
    refuse_dtensors,
    refuse_second_derivative,
    result_dtype,
    rows_per_chunk,
)


def reference_logprob(logits, ids, temperature=1.0):  # (N, V), (N,) -> (N,), (N,) in float64
    log_p = torch.log_softmax(logits.double() / temperature, -1)
    p = log_p.exp()
    return log_p.gather(1, ids.unsqueeze(1)).squeeze(1), -torch.where(p > 0, p * log_p, 0.0).sum(-1)


# ---------------------------------------------------------------------------------------------------------------------
# Kernel: the two leaves in torch. logprob_triton.py has the same two for CUDA.
# ---------------------------------------------------------------------------------------------------------------------


def torch_stats(z, inv_t):  # (r, V) -> log_z (r, 1), entropy (r, 1)
    if inv_t != 1:
        z = z * inv_t
    p, log_z = softmax_and_log_z(z)
    mean_z = mean(p, z)
    if mean_z.isnan().any():  # 0 * inf: a logit of -inf
        mean_z = mean_over_support(p, z)
    return log_z, log_z - mean_z


def torch_grad(z, ids, log_z, entropy, grad_logprob, grad_entropy, inv_t, out):  # (r, V), 5 x (r, 1) -> out (r, V)
    log_p = (z * inv_t).sub_(log_z)
    p = log_p.exp()
    if grad_entropy is None:
        dz = p.mul_(grad_logprob * -inv_t)
    else:
        log_p.clamp_(min=torch.finfo(p.dtype).min)  # 0 * -inf
        score = log_p.add_(entropy).mul_(grad_entropy * -inv_t)
        if grad_logprob is not None:
            score.sub_(grad_logprob * inv_t)
        dz = p.mul_(score)
    if grad_logprob is not None:
        dz.scatter_add_(1, ids, grad_logprob * inv_t)
    out.copy_(dz)


def choose_leaves(device, dtype):
    """(stats leaf, grad leaf, how many logits they take at a time)."""
    if device.type == "cuda" and dtype == torch.float32:
        try:
            from kernels.logprob_triton import triton_grad, triton_stats

            return triton_stats, triton_grad, sys.maxsize
        except ImportError:  # no Triton on this platform
            pass
    return torch_stats, torch_grad, BLOCK_ELEMENTS.get(device.type, BLOCK_ELEMENTS["cpu"])


# ---------------------------------------------------------------------------------------------------------------------
# Wrapper
# ---------------------------------------------------------------------------------------------------------------------


class LinearLogprob(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, ids, inv_t, operand, workspace_bytes):
        ctx.set_materialize_grads(False)  # backward skips the output that nothing used
        (N, V), device, dtype = (len(hidden), len(weight)), hidden.device, result_dtype(operand)
        # as a divergence's chunk, without the teacher: on a CPU the gradient overwrites the logits
        bytes_per_row = V * (dtype.itemsize + (0 if device.type == "cpu" else operand.itemsize))
        C = rows_per_chunk(N, bytes_per_row, workspace_bytes, device)
        stats_leaf, _, block_elements = leaves = choose_leaves(device, dtype)
        B = min(C, max(1, block_elements // V))
        head, buffer = weight.to(operand), empty_logits(C, V, dtype, device)
        logit, log_z, entropy = (torch.empty(N, 1, dtype=dtype, device=device) for _ in range(3))
        for start in range(0, N, C):
            rows = slice(start, min(start + C, N))
            z = project(hidden[rows].to(operand), head, buffer[: rows.stop - start])  # (c, V)
            for i in range(start, rows.stop, B):
                block = slice(i, min(i + B, rows.stop))
                log_z[block], entropy[block] = stats_leaf(z[i - start : block.stop - start], inv_t)
            logit[rows] = z.gather(1, ids[rows].unsqueeze(1)) * inv_t
        ctx.save_for_backward(hidden, weight, ids.unsqueeze(1), log_z, entropy)
        ctx.sizes, ctx.inv_t, ctx.operand, ctx.leaves = (C, B), inv_t, operand, leaves
        return (logit - log_z).squeeze(1), entropy.squeeze(1)

    @staticmethod
    def backward(ctx, grad_logprob, grad_entropy):
        refuse_second_derivative()
        if grad_logprob is None and grad_entropy is None:
            return (None,) * 6
        hidden, weight, ids, log_z, entropy = ctx.saved_tensors
        needs_hidden, needs_head = ctx.needs_input_grad[:2]
        (C, B), inv_t, operand, (_, grad_leaf, _) = ctx.sizes, ctx.inv_t, ctx.operand, ctx.leaves
        (N, V), device, dtype = (len(hidden), len(weight)), hidden.device, log_z.dtype
        grad_logprob, grad_entropy = (None if g is None else g.unsqueeze(1) for g in (grad_logprob, grad_entropy))

        head, buffer = weight.to(operand), empty_logits(C, V, dtype, device)
        dz_buffer = buffer if device.type == "cpu" else empty_logits(C, V, operand, device)
        dhidden = torch.empty_like(hidden) if needs_hidden else None
        dhead = torch.zeros_like(weight, dtype=dtype) if needs_head else None
        with torch.autocast(device.type, enabled=False):
            for start in range(0, N, C):
                rows = slice(start, min(start + C, N))
                x = hidden[rows].to(operand)
                z, dz = project(x, head, buffer[: rows.stop - start]), dz_buffer[: rows.stop - start]  # (c, V) each
                for i in range(start, rows.stop, B):
                    block = slice(i, min(i + B, rows.stop))
                    at = slice(i - start, block.stop - start)
                    g, h = (None if grad is None else grad[block] for grad in (grad_logprob, grad_entropy))
                    grad_leaf(z[at], ids[block], log_z[block], entropy[block], g, h, inv_t, dz[at])
                dx = reduce_grads(dz, x, head, needs_hidden, dhead)
                if needs_hidden:
                    dhidden[rows] = dx.to(dhidden.dtype)
        return dhidden, None if dhead is None else dhead.to(weight.dtype), None, None, None, None


def fused_linear_logprob(hidden, weight, ids, *, temperature=1.0, workspace_bytes=None):
    """log p(ids) and the entropy of p = softmax(hidden @ weight.T / temperature), without the (N, V) logits.

    Args:
        hidden: (N, H), the last hidden states, after the final norm. fp32, bf16, fp16 or fp64.
        weight: (V, H), the output head. May be tied to the embedding, frozen, or of another dtype.
        ids: (N,) int64 below V. There is no ignored id: leave masked tokens out.
        temperature: divides the logits.
        workspace_bytes: room for one chunk's logits and their gradient; `linear.WORKSPACE_BYTES` by default. It
            changes speed and memory, not the result.

    Returns:
        logprobs, entropy: (N,) each, fp32 (fp64 for fp64 inputs). Both differentiable, once, with any upstream
            gradients; backward does no work for an output that nothing used.

    Raises `ValueError` for an impossible temperature, ids of another shape, and a DTensor.
    """
    if not temperature > 0:
        raise ValueError(f"temperature must be positive; got {temperature}")
    if ids.shape != hidden.shape[:1]:
        raise ValueError(f"ids must have the shape {tuple(hidden.shape[:1])}; got {tuple(ids.shape)}")
    refuse_dtensors({"hidden": hidden, "weight": weight, "ids": ids})
    operand = operand_dtype(hidden)  # reads the autocast state, which the products must not see
    with torch.autocast(hidden.device.type, enabled=False):
        return LinearLogprob.apply(hidden, weight, ids, 1 / temperature, operand, workspace_bytes)
