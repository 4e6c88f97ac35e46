"""Peak memory of a loss and its backward on a CPU: workspace, dW twice, a block of rows. In its own process (Linux)."""

from pathlib import Path

import torch

from kernels import TeacherHead, fused_linear_divergence, fused_linear_logprob


def memory_mb(field):
    return int(Path("/proc/self/status").read_text().split(field + ":")[1].split()[0]) / 2**10


N, V, H, WORKSPACE_MB = 256, 151_936, 16, 64
torch.manual_seed(0)
x, head = torch.randn(N, H, requires_grad=True), torch.randn(V, H, requires_grad=True)
teacher, ids = TeacherHead(torch.randn(N, H), torch.randn(V, H)), torch.randint(V, (N,))
options = dict(workspace_bytes=WORKSPACE_MB << 20)
for rows in (2, N):  # the first, small one loads the code
    before = memory_mb("VmRSS")
    fused_linear_divergence(x[:rows], head, TeacherHead(teacher.hidden[:rows], teacher.weight), **options)[0].backward()
    logprobs, entropy = fused_linear_logprob(x[:rows], head, ids[:rows], **options)
    (logprobs + entropy).sum().backward()
    peak = memory_mb("VmHWM") - before
limit = WORKSPACE_MB + 3 * V * H * 4 / 2**20 + 60  # dW, its scaled copy, head.grad; a dozen blocks of 4 MB
print(f"peak {peak:.0f} MB, at most {limit:.0f} allowed; naive logits alone take {2 * N * V * 4 / 2**20:.0f}")
assert peak < limit
