# docs: docs/kernels.md
"""Full-vocabulary divergences between a student and a teacher, from hidden states and heads, in chunks of tokens.

Formula. For one token with logits z_s and z_t, both already divided by the temperature T, and p = softmax(z):

    forward_kl = KL(p_t || p_s) = sum_v p_t (log p_t - log p_s)
    reverse_kl = KL(p_s || p_t) = sum_v p_s (log p_s - log p_t)
    jsd        = jsd_beta KL(p_t || m) + (1 - jsd_beta) KL(p_s || m),   m = (1 - jsd_beta) p_s + jsd_beta p_t

    loss = sum_n weight[n] D_n        no division: the caller folds 1 / (token count) into the weight

The gradient of weight D with respect to the student's logits before their division by T:

    forward_kl   (p_s - p_t) weight / T
    reverse_kl   p_s (gap - E_s[gap]) weight / T,   gap = z_s - z_t                   the normalisers cancel
    jsd          (1 - jsd_beta) p_s (log p_s - log m - KL(p_s || m)) weight / T
    a function   (g - p_s sum_v g_v) weight / T,   g = dD / d log p_s, by autograd

It is computed in the forward pass, while a chunk's logits are at hand: four matrix products in all, two that make the
logits and two that reduce their gradient. backward multiplies by a number. docs/kernels.md derives the gradients;
divergence_torch.py and divergence_triton.py compute divergences and gradients, block by block.
"""

import sys
from collections.abc import Callable
from typing import NamedTuple

import torch

from kernels.divergence_torch import BLOCK_ELEMENTS, KINDS, mean_over_support, torch_grad, torch_stats
from kernels.linear import (
    GradsInForward,
    empty_logits,
    operand_dtype,
    project,
    reduce_grads,
    refuse_dtensors,
    result_dtype,
    rows_per_chunk,
)


class TeacherHead(NamedTuple):
    hidden: torch.Tensor  # (N, Ht)
    weight: torch.Tensor  # (Vt, Ht)


class TeacherLogits(NamedTuple):
    logits: torch.Tensor  # (N, Vt)


class TeacherTopK(NamedTuple):
    ids: torch.Tensor  # (N, K) int64, distinct in each row, below the student's vocabulary size
    logprobs: torch.Tensor  # (N, K) under the teacher's full vocabulary, already at the loss's temperature


class DivergenceStats(NamedTuple):
    """Detached, (N,) each, fp32 (fp64 for fp64 inputs), 0 where the weight is 0."""

    forward_kl: torch.Tensor
    reverse_kl: torch.Tensor
    student_entropy: torch.Tensor
    teacher_entropy: torch.Tensor
    student_logprob: torch.Tensor | None = None  # of target_ids
    teacher_logprob: torch.Tensor | None = None


# ---------------------------------------------------------------------------------------------------------------------
# Top-k teacher: the same divergence over K + 1 outcomes, the K ids and "anything else"
# ---------------------------------------------------------------------------------------------------------------------


def topk_buckets(zs, teacher):  # (r, V) divided by T, (r, K) -> (r, K + 1), (r, K + 1), (r, V)
    """The outcomes' logits for both models, and the student's log-softmax within the tail.

    Without the tail bucket the reverse KL is smallest where the student empties the K ids. The student's tail is a
    log-sum-exp over the other ids, because one minus the rest would cancel. Of the teacher's tail no more is known
    than one minus the rest, so it is taken to be at least a rounding error: 0 would make the reverse KL infinite.
    """
    finfo = torch.finfo(zs.dtype)
    logprobs = teacher.logprobs.to(zs.dtype)
    tail = zs.scatter(1, teacher.ids, float("-inf"))  # (r, V)
    tail_log_z = tail.logsumexp(-1, keepdim=True)  # (r, 1)
    tail_logprob = (1 - logprobs.exp().sum(-1, keepdim=True)).clamp_(min=finfo.eps).log_()
    tail_logprob.masked_fill_(tail_log_z.isneginf(), float("-inf"))  # K = V: there is no tail, in either model
    us = torch.cat((zs.gather(1, teacher.ids), tail_log_z), 1)  # (r, K + 1)
    ut = torch.cat((logprobs, tail_logprob), 1)
    return us, ut, tail.sub_(tail_log_z.clamp(min=finfo.min))


def topk_target(teacher, target):  # (r, K), (r, 1) -> (r, 1)
    """The target's bucket: its place among the K ids, or K, the tail."""
    hits = teacher.ids == target
    return hits.int().argmax(1, keepdim=True).masked_fill_(~hits.any(1, keepdim=True), hits.shape[1])


# ---------------------------------------------------------------------------------------------------------------------
# Wrapper: blocks of rows, chunks of tokens, and the public functions
# ---------------------------------------------------------------------------------------------------------------------


class Formula(NamedTuple):
    kind: str | Callable
    jsd_beta: float
    inv_t: float


def choose_leaves(kind, teacher, device, dtype):
    """(stats leaf, grad leaf, how many logits they take at a time)."""
    in_torch = callable(kind) or isinstance(teacher, TeacherTopK) or dtype != torch.float32
    if device.type == "cuda" and not in_torch:
        try:
            from kernels.divergence_triton import triton_grad, triton_stats

            return triton_stats, triton_grad, sys.maxsize
        except ImportError:  # no Triton on this platform
            pass
    return torch_stats, torch_grad, BLOCK_ELEMENTS.get(device.type, BLOCK_ELEMENTS["cpu"])


def block_loss(zs, teacher, weight, target_ids, dz, formula, leaves):
    """zs (r, V), teacher logits (r, V) or a TeacherTopK, weight (r,) -> weighted divergences (r,), DivergenceStats.

    Writes the gradient with respect to zs to dz (r, V), which may be the memory of zs itself.
    """
    kind, jsd_beta, inv_t = formula
    stats_leaf, grad_leaf, _ = leaves
    topk = isinstance(teacher, TeacherTopK)
    us, ut, logit_scale = zs, teacher, inv_t
    if topk:  # scales the student's logits now: the teacher's logprobs are at temperature T already
        zs, logit_scale = zs.to(weight.dtype) * inv_t, 1
        us, ut, tail_log_p = topk_buckets(zs, teacher)
    leaf = stats_leaf(us, ut, kind, jsd_beta, logit_scale)

    stats = list(leaf[1:5])
    if topk:  # the student's entropy over the vocabulary, not the buckets: add the choice left within the tail
        tail_p, tail_mass = tail_log_p.exp(), (us[:, -1:] - leaf.student_log_z).exp()
        stats[2] = stats[2] - tail_mass * mean_over_support(tail_p, tail_log_p)
    if target_ids is not None:
        target = target_ids.unsqueeze(1)  # (r, 1)
        bucket = topk_target(teacher, target) if topk else target
        stats.append(zs.gather(1, target).to(weight.dtype) * logit_scale - leaf.student_log_z)
        stats.append(ut.gather(1, bucket).to(weight.dtype) * logit_scale - leaf.teacher_log_z)
    stats = DivergenceStats(*(s.squeeze(1) for s in stats))

    if dz is not None:
        scale = (weight * inv_t).unsqueeze(1)  # (r, 1)
        if topk:
            du = torch.empty_like(us)
            grad_leaf(leaf, scale, kind, jsd_beta, du)
            # a log-sum-exp hands its gradient down by the ids' shares in it; a single id gets all of its own
            dz.copy_(tail_p.mul_(du[:, -1:]).scatter_(1, teacher.ids, du[:, :-1]))
        else:
            grad_leaf(leaf, scale, kind, jsd_beta, dz)
    return weight * leaf.divergence.squeeze(1), stats


def take(x, rows):
    """Rows of a tensor, of a TeacherTopK, or of nothing. A slice gives a view, indices give a copy."""
    return x._make(t[rows] for t in x) if isinstance(x, TeacherTopK) else None if x is None else x[rows]


def logits_reader(hidden_or_logits, head, V, C, dtype, operand, width):
    """-> the head as the products read it (None for logits), and a function from rows to their logits (c, V)."""
    if head is None:
        return None, lambda rows: hidden_or_logits[rows, :V]
    head = head[:V].to(operand)
    buffer = empty_logits(C, V, dtype, head.device)[:, :width]

    def read(rows):
        hidden = hidden_or_logits[rows].to(operand)  # (c, H)
        return project(hidden, head, buffer[: len(hidden)])

    return head, read


@torch.no_grad()
def loss_and_grads(student, head, teacher, weight, target_ids, needs_grad, operand, workspace_bytes, formula):
    """-> loss (), DivergenceStats of (N,), gradients of `student` and `head` (None where not needed).

    `student` are hidden states (N, Hs), or logits (N, V) where `head` is None.
    """
    N, device, dtype = student.shape[0], student.device, result_dtype(operand)
    needs_student, needs_head = needs_grad
    if weight is None:
        weight, n = torch.ones(N, dtype=dtype, device=device), N
    else:
        weight = weight.to(dtype)
        kept = weight.nonzero().squeeze(1)  # a masked token leaves here, before the products
        n = len(kept)

    # Vocabularies that differ by padding share their first V ids.
    V = student.shape[1] if head is None else head.shape[0]
    if isinstance(teacher, TeacherHead):
        V = min(V, teacher.weight.shape[0])
    elif isinstance(teacher, TeacherLogits):
        V = min(V, teacher.logits.shape[1])

    # On a CPU a row's gradient overwrites its logits; on a GPU a bf16 gradient stands beside fp32 logits.
    in_place = head is not None and device.type == "cpu"
    bytes_per_row = V * (2 * dtype.itemsize + (0 if in_place else operand.itemsize))
    C = rows_per_chunk(n, bytes_per_row, workspace_bytes, device)
    leaves = choose_leaves(formula.kind, teacher, device, dtype)
    B = min(C, max(1, leaves[2] // V))
    width = V if leaves[0] is torch_stats else None  # the padding of our buffers is for Triton

    student_head, read_student = logits_reader(student, head, V, C, dtype, operand, width)
    if isinstance(teacher, TeacherTopK):

        def read_teacher(rows):
            return take(teacher, rows)

    elif isinstance(teacher, TeacherLogits):
        _, read_teacher = logits_reader(teacher.logits, None, V, C, dtype, None, width)
    else:
        teacher_operand = operand_dtype(teacher.hidden)
        if result_dtype(teacher_operand) != dtype:
            teacher_operand = dtype
        _, read_teacher = logits_reader(teacher.hidden, teacher.weight, V, C, dtype, teacher_operand, width)
    dstudent = torch.zeros_like(student) if needs_student else None
    dhead = torch.zeros_like(head, dtype=dtype) if needs_head else None
    if any(needs_grad) and head is not None and not in_place:
        dz_buffer = empty_logits(C, V, operand, device)[:, :width]

    # Weighted divergence and statistics of every row, 0 where masked. One table: small results kept from block to block
    # would each pin a hole in the heap where a block's temporaries were.
    table = weight.new_zeros(5 if target_ids is None else 7, N)
    for start in range(0, n, C):
        end = min(start + C, n)
        rows = slice(start, end) if n == N else kept[start:end]
        zs, dz = read_student(rows), None
        if any(needs_grad):
            dz = dstudent[rows, :V] if head is None else zs if in_place else dz_buffer[: end - start]
        chunk = zs, read_teacher(rows), weight[rows], take(target_ids, rows), dz
        for i in range(0, end - start, B):
            losses, stats = block_loss(*(take(x, slice(i, i + B)) for x in chunk), formula, leaves)
            block = slice(start + i, min(start + i + B, end))
            table[:, block if n == N else kept[block]] = torch.stack((losses, *stats[: len(table) - 1]))
        if head is not None and any(needs_grad):
            dx = reduce_grads(dz, student[rows].to(operand), student_head, needs_student, dhead)
            if needs_student:
                dstudent[rows] = dx.to(dstudent.dtype)
        elif needs_student and n < N:
            dstudent[rows, :V] = dz
    losses, *stats = table
    return losses.sum(), DivergenceStats(*stats), dstudent, dhead


def divergence(student, head, teacher, weight, kind, jsd_beta, temperature, target_ids, workspace_bytes):
    """Checks what the caller passed, computes loss and gradients, and ties them into autograd."""
    if kind not in KINDS and not callable(kind):
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, or a function; got {kind!r}")
    if not 0 <= jsd_beta <= 1:
        raise ValueError(f"jsd_beta must lie between 0 (forward KL) and 1 (reverse KL); got {jsd_beta}")
    if not temperature > 0:
        raise ValueError(f"temperature must be positive; got {temperature}")
    if not isinstance(teacher, (TeacherHead, TeacherLogits, TeacherTopK)):
        raise ValueError(f"teacher must be a TeacherHead, TeacherLogits or TeacherTopK; got {type(teacher).__name__}")
    if weight is not None and weight.requires_grad:
        raise ValueError("weight is a constant of the loss and gets no gradient: pass weight.detach()")
    teacher_parts = {f"teacher.{name}": tensor for name, tensor in teacher._asdict().items()}
    refuse_dtensors({"student": student, "student_weight": head, "weight": weight, **teacher_parts})
    N = len(student)
    for name, tensor in (("teacher", teacher[0]), ("weight", weight), ("target_ids", target_ids)):
        if tensor is not None and len(tensor) != N:
            raise ValueError(f"{name} has {len(tensor)} rows, the student has {N}")

    if isinstance(teacher, TeacherTopK) and teacher.ids.shape != teacher.logprobs.shape:
        shapes = tuple(teacher.ids.shape), tuple(teacher.logprobs.shape)
        raise ValueError(f"TeacherTopK needs ids and logprobs of one shape; got {shapes[0]} and {shapes[1]}")
    if kind == "jsd" and jsd_beta in (0, 1):
        kind = "reverse_kl" if jsd_beta else "forward_kl"  # the limits; the formula itself gives 0 there
    formula = Formula(kind, float(jsd_beta), 1 / temperature)
    needs_grad = [torch.is_grad_enabled() and t is not None and t.requires_grad for t in (student, head)]
    operand = operand_dtype(student)  # reads the autocast state, which the products below must not see
    teacher_type = type(teacher)

    def compute(student, head, weight, target_ids, *teacher):
        with torch.autocast(student.device.type, enabled=False):
            return loss_and_grads(
                student, head, teacher_type(*teacher), weight, target_ids, needs_grad, operand, workspace_bytes, formula
            )

    constants = (None if t is None else t.detach() for t in (weight, target_ids, *teacher))
    tensors = student, head, *constants
    loss, stats, *grads = compute(*tensors)
    if any(needs_grad):
        loss = GradsInForward.apply(loss, grads, lambda *tensors: compute(*tensors)[2:], *tensors)
    return loss, stats


def fused_linear_divergence(
    student_hidden,
    student_weight,
    teacher,
    *,
    weight=None,
    kind="reverse_kl",
    jsd_beta=0.5,
    temperature=1.0,
    target_ids=None,
    workspace_bytes=None,
):
    """sum_n weight[n] D(student_n, teacher_n) over the full vocabulary, without the (N, V) logits.

    Args:
        student_hidden: (N, Hs), the last hidden states, after the final norm. fp32, bf16, fp16 or fp64.
        student_weight: (V, Hs), the output head. May be tied to the embedding, frozen, or of another dtype.
        teacher: `TeacherHead`, `TeacherLogits` or `TeacherTopK`; it gets no gradient. Where the vocabularies differ in
            size, the ids that both have are the vocabulary, and the rest of the head's gradient is 0.
        weight: (N,) constants: mask, 1 / token count, importance weights, of any sign. Rows of weight 0 cost nothing.
        kind: "forward_kl" = KL(teacher || student), "reverse_kl" = KL(student || teacher), "jsd", or a function of the
            two models' log-probabilities at temperature T, (log_p_student, log_p_teacher), both (r, V), -> (r,). See below.
        jsd_beta: weight of the teacher in the mixture; at 0 and 1 "jsd" is the forward and the reverse KL.
        temperature: divides both models' logits (a `TeacherTopK` is taken as it is); there is no factor T^2.
        target_ids: (N,) int64, the ids whose log-probabilities to report in the statistics.
        workspace_bytes: room for one chunk's logits and their gradient; `linear.WORKSPACE_BYTES` by default. It
            changes speed and memory, not the result.

    Returns:
        loss: (), fp32 (fp64 for fp64 inputs). 0, with a graph and zero gradients, where N = 0 or every weight is 0.
        stats: `DivergenceStats`, detached. With a `TeacherTopK` the KLs and the teacher's entropy are those of the
            K + 1 outcomes, and the teacher's log-probability of a target outside the K ids is that of the whole tail.

    A logit of -inf in both models counts 0. In the teacher alone, where the student has mass, it makes the reverse KL
    infinite and its gradient useless; in the student alone, likewise for the forward KL.

    A function as `kind` gets r of the rows at a time, any of them, so it must treat each row by itself: a sum or a mean
    over rows would depend on how they were cut. It is written in torch, in fp32 (fp64 for fp64 inputs), and autograd
    differentiates it in log_p_student, which it must not change in place; nothing else gets a gradient. log 0 comes as
    -1e18, so that 0 (log 0 - log 0) is 0 in its value and its gradient; where a built-in kind is infinite, the same
    formula as a function is very large. With a `TeacherTopK` V is K + 1: the K ids, and last the tail. It is called
    again by a second backward through a retained graph. On a GPU it runs as plain torch, without the Triton leaves.

    The gradients are computed here, so the loss can be scaled and added to others but not differentiated twice.

    Raises `ValueError` for an unknown kind, a function whose result has another shape or no gradient, an impossible
    jsd_beta or temperature, row counts that differ, a weight that requires grad, and a DTensor.
    """
    return divergence(
        student_hidden, student_weight, teacher, weight, kind, jsd_beta, temperature, target_ids, workspace_bytes
    )


def divergence_from_logits(
    student_logits,
    teacher,
    *,
    weight=None,
    kind="reverse_kl",
    jsd_beta=0.5,
    temperature=1.0,
    target_ids=None,
    workspace_bytes=None,
):
    """`fused_linear_divergence` for callers who have the student's logits (N, V) already.

    Two passes over the logits, the gradient (N, V) in their dtype, and nothing else of that size.
    """
    return divergence(student_logits, None, teacher, weight, kind, jsd_beta, temperature, target_ids, workspace_bytes)
