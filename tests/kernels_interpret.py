"""The Triton leaves on CPU tensors against the float64 references. Run with TRITON_INTERPRET=1, in its own process.

The interpreter truncates where the GPU rounds to bf16, so gradients stay fp32 here; bf16 logits are read as they are.
"""

import itertools
import os

os.environ["TRITON_INTERPRET"] = "1"  # before the first `import triton`

import torch

from kernels.divergence import Formula, block_loss
from kernels.divergence_torch import reference_divergence, torch_grad, torch_stats
from kernels.divergence_triton import triton_grad, triton_stats
from kernels.linear import empty_logits
from kernels.logprob import reference_logprob
from kernels.logprob_triton import triton_grad as logprob_grad
from kernels.logprob_triton import triton_stats as logprob_stats

KINDS = [("forward_kl", 0.5), ("reverse_kl", 0.5), ("jsd", 0.5), ("jsd", 0.1), ("jsd", 0.9)]
INF = float("inf")


def check(value, expected, tolerance, what):
    expected = expected.float()
    error = (value - expected)[expected.isfinite()].abs().max().item() if expected.isfinite().any() else 0.0
    scale = max(1.0, expected[expected.isfinite()].abs().max().item() if expected.isfinite().any() else 1.0)
    assert error <= tolerance * scale, f"{what}: off by {error:.1e} on a scale of {scale:.1e}"
    assert torch.equal(value[expected.isinf()], expected[expected.isinf()]), f"{what}: {value} where {expected}"


def check_divergence(zs, zt, name, temperature=1.0, infinite=(), tolerance=3e-6, kinds=KINDS[:3]):
    n, V = zs.shape
    weight = torch.linspace(-1.0, 2.0, n)
    for kind, jsd_beta in kinds:
        leaf = triton_stats(zs, zt, kind, jsd_beta, 1 / temperature)
        dz = torch.full((n, V), float("nan"))
        triton_grad(leaf, (weight / temperature).unsqueeze(1), kind, jsd_beta, dz)
        reference_zs = zs.detach().double().requires_grad_()
        what = f"{name}, {kind} {jsd_beta}"
        for field in ("forward_kl", "reverse_kl"):
            expected = reference_divergence(zs, zt, field, temperature=temperature)
            check(getattr(leaf, field).squeeze(1), expected, tolerance, f"{what}, {field}")
        ids = torch.zeros(n).long()
        check(leaf.student_entropy.squeeze(1), reference_logprob(zs, ids, temperature)[1], tolerance, what + ", H_s")
        check(leaf.teacher_entropy.squeeze(1), reference_logprob(zt, ids, temperature)[1], tolerance, what + ", H_t")
        check(leaf.student_log_z.squeeze(1), (zs.double() / temperature).logsumexp(-1), tolerance, what + ", log_z")
        if kind in infinite:
            continue
        expected = reference_divergence(reference_zs, zt, kind, jsd_beta, temperature)
        check(leaf.divergence.squeeze(1), expected.detach(), tolerance, f"{what}, divergence")
        (expected * weight).sum().backward()
        if zs.isfinite().all() and zt.isfinite().all():
            check(dz, reference_zs.grad, tolerance, f"{what}, gradient")
        else:
            assert dz.isfinite().all(), f"{what}: {dz}"


def put(z, values):
    z = z.clone()
    for i, value in values.items():
        z[:, i] = value
    return z


torch.manual_seed(0)
for V, temperature in itertools.product((1, 16, 1000, 4099), (1.0, 0.7)):
    check_divergence(3 * torch.randn(3, V), 3 * torch.randn(3, V), f"V = {V}, T = {temperature}", temperature, kinds=KINDS)
check_divergence(3 * torch.randn(1, 151669), 3 * torch.randn(1, 151669), "V = 151669", kinds=KINDS[2:3])

# identical models: exactly 0, and so is the gradient
z = 3 * torch.randn(2, 5000)
for (kind, jsd_beta), temperature in itertools.product(KINDS, (1.0, 0.7)):
    leaf, dz = triton_stats(z, z.clone(), kind, jsd_beta, 1 / temperature), torch.empty_like(z)
    triton_grad(leaf, torch.ones(2, 1), kind, jsd_beta, dz)
    assert (leaf.divergence == 0).all() and (dz == 0).all(), kind

# edge values, in a row of more than one tile
zs, zt = torch.randn(2, 5000), torch.randn(2, 5000)
holes, first_tiles = {1: -INF, 2500: -INF}, dict.fromkeys(range(4990), -INF)
check_divergence(put(zs, holes), put(zt, holes), "-inf in both")
check_divergence(put(zs, first_tiles), put(zt, first_tiles), "first tiles all -inf")
check_divergence(zs, put(zt, {3000: -INF}), "-inf in the teacher", infinite=("reverse_kl",))
check_divergence(put(zs, {3000: -INF}), zt, "-inf in the student", infinite=("forward_kl",))
check_divergence(put(zs, {7: -200.0}), put(zt, {4444: -200.0}), "underflow")
check_divergence(put(zs, {0: 150.0}), put(zt, {4000: 150.0}), "disjoint")
check_divergence(put(zs, {2047: 3e4}), put(zt, {2047: 3e4}), "spike in both", tolerance=1e-4)
check_divergence(put(zs, {4999: 3e4}), zt, "spike in the student", tolerance=1e-4)
# 0 * inf after the fact: an infinite term whose probability underflows when a later tile raises the maximum
leaf = triton_stats(put(zs, {4999: 500.0}), put(zt, {0: -INF, 4999: 500.0}), "reverse_kl", 0.5, 1.0)
assert leaf.reverse_kl.isfinite().all() and leaf.student_entropy.isfinite().all()

# rows apart in memory, columns of -inf beyond V, bf16 logits, more columns in one model's buffer than in the other's
wide_s, wide_t = torch.randn(6, 3008), torch.randn(3, 3008)
wide_s[:, 3001:], wide_t[:, 3001:] = -INF, -INF
leaf = triton_stats(wide_s[::2], wide_t, "reverse_kl", 0.5, 1.0)
dz = torch.empty(3, 3008)
triton_grad(leaf, torch.ones(3, 1), "reverse_kl", 0.5, dz)
expected = reference_divergence(wide_s[::2, :3001], wide_t[:, :3001], "reverse_kl")
check(leaf.divergence.squeeze(1), expected, 3e-6, "wide")
assert (dz[:, 3001:] == 0).all() and dz.isfinite().all()
leaf = triton_stats(wide_s[::2], wide_t[:, :3001], "reverse_kl", 0.5, 1.0)
check(leaf.divergence.squeeze(1), expected, 3e-6, "one model wider than the other")
check_divergence(torch.randn(2, 5000).bfloat16(), torch.randn(2, 5000).bfloat16(), "bf16")
check_divergence(torch.randn(2, 5000), torch.randn(2, 5000).bfloat16(), "fp32 and bf16")
check_divergence(torch.randn(500, 2).T, torch.randn(2, 500), "columns apart in memory")
assert empty_logits(2, 30, torch.float32, torch.device("cpu")).shape == (2, 30)

# the block that calls the leaves: same losses, statistics and gradients with either set, padding columns included
ids, weight = torch.randint(3001, (3,)), torch.rand(3)
for kind, jsd_beta in KINDS:
    formula, results = Formula(kind, jsd_beta, 1 / 0.7), []
    for leaves, V in (((triton_stats, triton_grad, 0), 3008), ((torch_stats, torch_grad, 0), 3001)):
        dz = torch.empty(3, V)
        losses, stats = block_loss(wide_s[::2, :V], wide_t[:, :V], weight, ids, dz, formula, leaves)
        results.append((losses, *stats, dz[:, :3001]))
    for value, expected in zip(*results, strict=True):
        check(value, expected, 3e-6, f"block, {kind}")

# offsets beyond 2^31 elements: three rows 2^30 elements apart; the memory between them is never touched
far = torch.empty((2 << 30) + 64, dtype=torch.bfloat16).as_strided((3, 64), (1 << 30, 1))
far.copy_(torch.randn(3, 64))
check_divergence(far, torch.randn(3, 64), "rows beyond 2^31 elements")
check(logprob_stats(far, 1.0)[0].squeeze(1), far.double().logsumexp(-1), 3e-6, "logprob beyond 2^31 elements")

for V, temperature in itertools.product((1, 1000, 4099), (1.0, 0.7)):
    z, ids = 3 * torch.randn(3, V), torch.randint(V, (3,))
    z[:, V // 2 : V // 2 + V // 3] = -INF
    ids.zero_()
    log_z, entropy = logprob_stats(z, 1 / temperature)
    reference_z = z.double().masked_fill(z.isneginf(), -1e3).requires_grad_()  # the reference's gradient is nan at -inf
    expected = reference_logprob(reference_z, ids, temperature)
    check(log_z.squeeze(1), (z.double() / temperature).logsumexp(-1), 3e-6, "log_z")
    check(entropy.squeeze(1), expected[1].detach(), 3e-6, "entropy")
    g, h = torch.randn(3, 1), torch.randn(3, 1)
    for upstream in ((g, h), (g, None), (None, h)):
        dz = torch.empty_like(z)
        logprob_grad(z, ids.unsqueeze(1), log_z, entropy, *upstream, 1 / temperature, dz)
        total = sum((u.squeeze(1) * v).sum() for u, v in zip(upstream, expected, strict=True) if u is not None)
        check(dz, torch.autograd.grad(total, reference_z, retain_graph=True)[0], 1e-5, f"logprob gradient, V = {V}")
print("ok")
