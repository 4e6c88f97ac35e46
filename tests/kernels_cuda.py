"""Whole losses on a GPU, Triton leaves included, against float64. Run in its own process; needs a CUDA device."""

import itertools

import torch

from kernels import (
    TeacherHead,
    TeacherLogits,
    TeacherTopK,
    divergence_from_logits,
    fused_linear_divergence,
    fused_linear_logprob,
)
from kernels.divergence_torch import reference_divergence
from kernels.logprob import reference_logprob

KINDS = [("forward_kl", 0.5), ("reverse_kl", 0.5), ("jsd", 0.5), ("jsd", 0.1)]
torch.manual_seed(0)
torch.set_default_device("cuda")


def relative_error(value, reference):
    return ((value.double() - reference).norm() / reference.norm()).item()


def check(values, references, tolerance, what):
    for value, reference in zip(values, references, strict=True):
        error = relative_error(value.detach(), reference.detach())
        print(f"{what}: {error:.1e}")
        assert error < tolerance, f"{what}: {error:.1e}, at most {tolerance:.1e} allowed"


# 151669 is no multiple of 16: our own buffers are padded, a caller's logits are not
for V, dtype in ((1000, torch.float32), (151669, torch.bfloat16), (151936, torch.bfloat16)):
    N, Hs, Ht = 300, 128, 192
    x, head = torch.randn(N, Hs, dtype=dtype), torch.randn(V, Hs, dtype=dtype).mul_(3 / Hs**0.5)
    target, teacher_head = torch.randn(N, Ht, dtype=dtype), torch.randn(V, Ht, dtype=dtype).mul_(0.5 / Ht**0.5)
    target[:, :Hs] += x
    teacher_head[:, :Hs] += head
    weight = (torch.rand(N) < 0.8) / N
    ids = torch.randint(V, (N,))
    x64, head64 = (t.double().requires_grad_() for t in (x, head))
    x.requires_grad_(), head.requires_grad_()
    zt = target.double() @ teacher_head.double().T
    tolerance = 1e-2 if dtype == torch.bfloat16 else 2e-4
    for kind, jsd_beta in KINDS:
        for temperature in (1.0, 0.7):
            expected = (weight * reference_divergence(x64 @ head64.T, zt, kind, jsd_beta, temperature)).sum()
            references = torch.autograd.grad(expected, (x64, head64))
            for workspace_bytes in (None, 130 * V * 12):  # one chunk; three, with a tail
                loss, stats = fused_linear_divergence(
                    x, head, TeacherHead(target, teacher_head), weight=weight, kind=kind, jsd_beta=jsd_beta,
                    temperature=temperature, target_ids=ids, workspace_bytes=workspace_bytes,
                )  # fmt: skip
                what = f"V = {V}, {kind} {jsd_beta}, T = {temperature}"
                check([loss], [expected], 1e-3, f"{what}, loss")
                check(torch.autograd.grad(loss, (x, head)), references, tolerance, f"{what}, gradient")
            zs = (x64 @ head64.T).detach().to(dtype).requires_grad_()
            zs64 = zs.detach().double().requires_grad_()
            teacher = TeacherLogits(zt.to(dtype))
            expected = (weight * reference_divergence(zs64, teacher.logits, kind, jsd_beta, temperature)).sum()
            loss, _ = divergence_from_logits(
                zs, teacher, weight=weight, kind=kind, jsd_beta=jsd_beta, temperature=temperature
            )
            check([loss], [expected], 1e-3, f"{what}, from logits")
            grads = torch.autograd.grad(loss, zs), torch.autograd.grad(expected, zs64)
            check(*grads, tolerance, f"{what}, logits' gradient")

    own_kl = lambda log_ps, log_pt: (log_ps.exp() * (log_ps - log_pt)).sum(-1)  # noqa: E731
    for teacher in (TeacherHead(target, teacher_head), TeacherLogits(zt)):
        loss, _ = fused_linear_divergence(x, head, teacher, weight=weight, kind=own_kl)
        expected = (weight * reference_divergence(x64 @ head64.T, zt, "reverse_kl")).sum()
        grads = torch.autograd.grad(loss, (x, head)), torch.autograd.grad(expected, (x64, head64))
        check(*grads, tolerance, f"V = {V}, a function, gradient")

    logprobs, topk_ids = zt.log_softmax(-1).topk(32)
    loss, _ = fused_linear_divergence(x, head, TeacherTopK(topk_ids, logprobs.float()), weight=weight)
    cpu = [t.detach().double().cpu() for t in (x, head, logprobs, weight)]
    leaves = [cpu[0].requires_grad_(), cpu[1].requires_grad_()]
    expected, _ = fused_linear_divergence(*leaves, TeacherTopK(topk_ids.cpu(), cpu[2]), weight=cpu[3])
    grads = [g.cpu() for g in torch.autograd.grad(loss, (x, head))]
    check(grads, torch.autograd.grad(expected, leaves), tolerance, f"V = {V}, top-k gradient")

    g, h = torch.randn(N), torch.randn(N)
    values = fused_linear_logprob(x, head, ids, temperature=0.7)
    references = reference_logprob(x64 @ head64.T, ids, 0.7)
    check(values, references, 1e-4, f"V = {V}, logprob and entropy")
    total, expected = ((g * v[0] + h * v[1]).sum() for v in (values, references))
    check(
        torch.autograd.grad(total, (x, head)), torch.autograd.grad(expected, (x64, head64)), tolerance,
        f"V = {V}, logprob gradient",
    )  # fmt: skip

# identical models: exactly 0, gradient included
for (kind, jsd_beta), temperature in itertools.product(KINDS, (1.0, 0.7)):
    teacher = TeacherHead(x.detach(), head.detach())
    loss, _ = fused_linear_divergence(x, head, teacher, kind=kind, jsd_beta=jsd_beta, temperature=temperature)
    assert loss == 0 and all((grad == 0).all() for grad in torch.autograd.grad(loss, (x, head)))

# beyond 2^31 logits: the last rows equal the first
N, V = 14_200, 151_936
zs = torch.empty(N, V, dtype=torch.bfloat16)
zs.copy_(torch.randn(1, V)).requires_grad_()
loss, stats = divergence_from_logits(zs, TeacherLogits(torch.randn(1, V).expand(N, V)))
(grad,) = torch.autograd.grad(loss, zs)
assert (stats.reverse_kl == stats.reverse_kl[0]).all() and torch.equal(grad[-1], grad[0])

# autocast: fp32 hidden states and head, bf16 products
x, head = torch.randn(300, 128, requires_grad=True), torch.randn(1000, 128, requires_grad=True)
target = torch.randn(300, 1000)
with torch.autocast("cuda", dtype=torch.bfloat16):
    loss, _ = fused_linear_divergence(x, head, TeacherLogits(target), kind="forward_kl")
expected = reference_divergence(x.double() @ head.double().T, target, "forward_kl").sum()
grads = torch.autograd.grad(loss, (x, head))
assert all(grad.dtype == torch.float32 for grad in grads)
check(grads, torch.autograd.grad(expected, (x, head)), 2e-2, "autocast")
print("ok")
