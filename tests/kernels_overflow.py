"""More logits than 32-bit offsets reach: 14,200 rows of 151,936 columns. Run in its own process, for its memory.

One row is repeated with stride 0, so the logits take 1.2 MB. Only the last rows have a weight: they must come out as
the first row does.
"""

import torch

from kernels import TeacherLogits, divergence_from_logits

N, V, LAST = 14_200, 151_936, 40
assert (N - LAST) * V > 2**31
torch.manual_seed(0)
zs, zt = (torch.randn(1, V).expand(N, V) for _ in range(2))
expected, _ = divergence_from_logits(zs[:1], TeacherLogits(zt[:1]))
weight = torch.zeros(N)
weight[-LAST:] = 1
loss, stats = divergence_from_logits(zs, TeacherLogits(zt), weight=weight, target_ids=torch.full((N,), V - 1))
assert (stats.reverse_kl[-LAST:] == expected).all() and (stats.reverse_kl[:-LAST] == 0).all()
assert (stats.student_logprob[-LAST:] == stats.student_logprob[-1]).all()
torch.testing.assert_close(loss / LAST, expected)
print("ok")
