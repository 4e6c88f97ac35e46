"""Peak memory of each loss and its backward on a CPU: workspace, one dW, a block of rows. In its own process (Linux)."""

from pathlib import Path

import torch

from kernels import TeacherHead, fused_linear_divergence, fused_linear_logprob


def memory_mb(field):
    return int(Path("/proc/self/status").read_text().split(field + ":")[1].split()[0]) / 2**10


def divergence(rows, kind="reverse_kl"):
    teacher = TeacherHead(target[:rows], teacher_head)
    fused_linear_divergence(x[:rows], head, teacher, kind=kind, **options)[0].backward()


def own_kind(rows):
    divergence(rows, lambda log_ps, log_pt: (log_ps.exp() * (log_ps - torch.logaddexp(log_pt, log_ps))).sum(-1))


def logprob(rows):
    sum(value.sum() for value in fused_linear_logprob(x[:rows], head, ids[:rows], **options)).backward()


N, V, H, WORKSPACE_MB = 256, 151_936, 256, 64
torch.manual_seed(0)
x, head = torch.randn(N, H, requires_grad=True), torch.randn(V, H, requires_grad=True)
target, teacher_head, ids = torch.randn(N, 16), torch.randn(V, 16), torch.randint(V, (N,))
options = dict(workspace_bytes=WORKSPACE_MB << 20)
dW_MB = V * H * 4 / 2**20
for loss in (divergence, own_kind, logprob):
    loss(2)  # loads the code
    x.grad = head.grad = None
    before = memory_mb("VmRSS")
    loss(N)
    peak = memory_mb("VmHWM") - before
    limit = WORKSPACE_MB + dW_MB + 40  # dW is head.grad; a dozen blocks of 1 MB; dX
    print(f"{loss.__name__}: peak {peak:.0f} MB, at most {limit:.0f} allowed, dW {dW_MB:.0f} of it; "
          f"naive logits alone take {2 * N * V * 4 / 2**20:.0f}")  # fmt: skip
    assert peak < limit
    x.grad = head.grad = None
