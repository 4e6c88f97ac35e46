# docs: docs/kernels.md
"""The divergences of divergence.py, whose docstring has their formulas: a float64 reference, and the stats and grad
leaves in torch. divergence_triton.py has the same two leaves for CUDA.
"""

import math
from typing import NamedTuple

import torch

KINDS = ("forward_kl", "reverse_kl", "jsd")
# The torch leaves work on a few rows at a time: on a CPU, one of 151,936 logits for each thread, their temporaries then
# stay in the cache (six rows take twice the time a row).
BLOCK_ELEMENTS = {"cpu": torch.get_num_threads() << 18, "cuda": 1 << 24}
# What a divergence of the caller's own gets for log 0: with -inf, 0 (log 0 - log 0) is nan. Its square is finite in fp32.
LOG_ZERO = -1e18


# ---------------------------------------------------------------------------------------------------------------------
# Reference: the formula in float64, nothing saved
# ---------------------------------------------------------------------------------------------------------------------


def reference_divergence(student_logits, teacher_logits, kind, jsd_beta=0.5, temperature=1.0):  # (N, V), (N, V) -> (N,)
    log_ps = torch.log_softmax(student_logits.double() / temperature, -1)
    log_pt = torch.log_softmax(teacher_logits.double() / temperature, -1)

    def kl(log_p, log_q):
        p = log_p.exp()
        return torch.where(p > 0, p * (log_p - log_q), 0.0).sum(-1)

    if kind == "forward_kl":
        return kl(log_pt, log_ps)
    if kind == "reverse_kl":
        return kl(log_ps, log_pt)
    log_m = torch.logaddexp(log_ps + math.log1p(-jsd_beta), log_pt + math.log(jsd_beta))
    return jsd_beta * kl(log_pt, log_m) + (1 - jsd_beta) * kl(log_ps, log_m)


# ---------------------------------------------------------------------------------------------------------------------
# Kernel: the two leaves
# ---------------------------------------------------------------------------------------------------------------------


class Leaf(NamedTuple):
    """What the stats leaf finds out about a block of r rows."""

    divergence: torch.Tensor  # (r, 1), as all the others
    forward_kl: torch.Tensor
    reverse_kl: torch.Tensor
    student_entropy: torch.Tensor
    teacher_entropy: torch.Tensor
    student_log_z: torch.Tensor
    teacher_log_z: torch.Tensor
    saved: tuple  # for the grad leaf


def softmax_and_log_z(z):  # (r, V) -> (r, V), (r, 1)
    p = torch.softmax(z, -1)
    # On a CPU softmax adds its normaliser up in plain fp32: 1e-5 off at 151,936 ids. A careful sum repairs that.
    p.div_(p.sum(-1, keepdim=True))
    # The largest probability is exp(max - log_z), so two maxima spare a second pass of exponentials.
    return p, z.amax(-1, keepdim=True) - p.amax(-1, keepdim=True).log()


def mean(p, x):  # (r, V), (r, V) -> (r, 1)
    return (p * x).sum(-1, keepdim=True)


def mean_over_support(p, x):
    """A sum over p leaves out the ids with p = 0, even where x is infinite or nan there: 0 log 0 = 0."""
    return mean(p, x.masked_fill(p == 0, 0))


def torch_stats(zs, zt, kind, jsd_beta, inv_t):  # (r, V), (r, V) -> Leaf
    dtype = torch.promote_types(zs.dtype, torch.float32)
    zs, zt = zs.to(dtype), zt.to(dtype)
    if inv_t != 1:
        zs, zt = zs * inv_t, zt * inv_t
    ps, log_z_s = softmax_and_log_z(zs)
    pt, log_z_t = softmax_and_log_z(zt)
    gap, shift = zs - zt, log_z_s - log_z_t  # log p_s - log p_t = gap - shift

    moments = mean(ps, gap), mean(pt, gap), mean(ps, zs), mean(pt, zt)
    if sum(moments).isnan().any():  # 0 * inf: some logit is -inf, or so low that its probability is 0
        moments = (mean_over_support(*px) for px in ((ps, gap), (pt, gap), (ps, zs), (pt, zt)))
        gap = gap.masked_fill(ps == 0, 0)
    gap_s, gap_t, mean_zs, mean_zt = moments
    forward_kl, reverse_kl = shift - gap_t, gap_s - shift

    if kind == "forward_kl":
        divergence, saved = forward_kl, (ps, pt)
    elif kind == "reverse_kl":
        divergence, saved = reverse_kl, (ps, gap, gap_s)
    elif callable(kind):
        log_ps = (zs - log_z_s).clamp_(min=LOG_ZERO).requires_grad_()
        log_pt = (zt - log_z_t).clamp_(min=LOG_ZERO)
        with torch.enable_grad():
            result = kind(log_ps, log_pt)  # (r,)
        shape = tuple(result.shape) if isinstance(result, torch.Tensor) else type(result).__name__
        if shape != (len(zs),):
            raise ValueError(f"kind must turn log-probabilities {tuple(zs.shape)} into ({len(zs)},); it returned {shape}")
        divergence, saved = result.detach().to(dtype).unsqueeze(1), (ps, log_ps, result)
    else:
        # log p_s - log m = -log(1 - beta + beta p_t / p_s) by d = log p_s - log p_t alone: exactly 0 at d = 0, and no
        # probability is taken the logarithm of. Beyond |d| = 80 one of the two is below 1e-34: the clamp is not seen.
        d = (zs - zt - shift).nan_to_num_(nan=0.0).clamp_(-80, 80)
        ratio_s = torch.expm1(-d).mul_(jsd_beta).log1p_().neg_()  # log p_s - log m
        ratio_t = ratio_s - d  # log p_t - log m
        kl_student = mean(ps, ratio_s)
        divergence = jsd_beta * mean(pt, ratio_t) + (1 - jsd_beta) * kl_student
        saved = ps, ratio_s, kl_student
    return Leaf(divergence, forward_kl, reverse_kl, log_z_s - mean_zs, log_z_t - mean_zt, log_z_s, log_z_t, saved)


def torch_grad(leaf, scale, kind, jsd_beta, out):  # scale (r, 1) = weight / T, out (r, V)
    if kind == "forward_kl":
        ps, pt = leaf.saved
        out.copy_((ps - pt).mul_(scale))
    elif callable(kind):
        ps, log_ps, result = leaf.saved
        if not result.requires_grad:
            raise ValueError("kind's result does not depend on log_p_student: there is no gradient")
        (score,) = torch.autograd.grad(result, log_ps, scale.squeeze(1).to(result.dtype))
        out.copy_(torch.addcmul(score, ps, score.sum(-1, keepdim=True), value=-1))
    else:
        ps, score, mean_score = leaf.saved
        out.copy_((score - mean_score).mul_(ps).mul_(scale * (1 - jsd_beta) if kind == "jsd" else scale))
