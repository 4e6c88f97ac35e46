"""More logits than 32-bit offsets reach: 14,200 rows of 151,936 columns. Run in its own process, for its memory.

One row is repeated with stride 0, so the logits take 0.6 MB. Every row must come out as the first.
"""

import torch

from kernels import TeacherLogits, divergence_from_logits

N, V = 14_200, 151_936
assert N * V > 2**31
torch.manual_seed(0)
zs, zt = (torch.randn(1, V).expand(N, V) for _ in range(2))
expected, _ = divergence_from_logits(zs[:1], TeacherLogits(zt[:1]))
loss, stats = divergence_from_logits(zs, TeacherLogits(zt), target_ids=torch.full((N,), V - 1))
assert (stats.reverse_kl == expected).all()
assert (stats.student_logprob == stats.student_logprob[0]).all()
torch.testing.assert_close(loss / N, expected)
print("ok")
