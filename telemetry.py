# docs/telemetry.md
"""Early signs of trouble at next to no cost: repetition, KL by position, overlap of the models' top tokens.

Each gives sums, which the scripts add up over micro-batches and divide once, as they do with the losses."""

import torch

from kernels import TeacherLogits

TOP_K = 8
OVERLAP_TOKENS = 256  # positions a step at which the top tokens are compared, at most one in 16


def repetition(responses: list[list[int]]) -> float:
    """Mean share of a response's 4-grams of tokens that occurred in it before (seq-rep-4, arXiv 1908.04319)."""
    shares = []
    for ids in responses:
        grams = list(zip(ids, ids[1:], ids[2:], ids[3:], strict=False))
        shares.append(1 - len(set(grams)) / len(grams) if grams else 0.0)
    return sum(shares) / len(shares)


def sums_by_third(values, lengths: list[int]):
    """values (N,), packed response after response -> (6,) float64 on the CPU: sums over the early, middle and late third of
    each response, and the number of tokens in each."""
    length = torch.tensor(lengths, dtype=torch.long)
    start = (length.cumsum(0) - length).repeat_interleave(length)  # (N,) where the token's response begins
    third = (torch.arange(len(start)) - start) * 3 // length.repeat_interleave(length)  # (N,)
    values = values.detach().double().cpu()
    return torch.cat([torch.bincount(third, w, minlength=3).double() for w in (values, torch.ones_like(values))])


@torch.no_grad()
def top_k_sums(hidden, head, target, temperature: float, tokens: int):
    """(4,) float64 on the CPU, over a sample of the N positions: sums of the share of the TOP_K likeliest ids that student
    and teacher have in common, of the probability that either gives to those, and the number of positions.

    hidden (N, H), head (V, H), target: TeacherHead or TeacherLogits of the same positions; `tokens` of the whole step set
    how many are sampled."""
    stride = max(16, tokens // OVERLAP_TOKENS)
    rows = slice(0, None, stride)
    with torch.autocast(hidden.device.type, enabled=False):
        student = hidden[rows].to(head.dtype) @ head.T  # (n, V)
        if isinstance(target, TeacherLogits):
            teacher = target.logits[rows]
        else:
            teacher = target.hidden[rows].to(target.weight.dtype) @ target.weight.T
    V = min(student.shape[1], teacher.shape[1])  # vocabularies that differ by padding share their first ids
    logits = [one[:, :V].float() / temperature for one in (student, teacher)]
    top = [one.topk(min(TOP_K, V), dim=-1) for one in logits]
    shared = (top[0].indices[:, :, None] == top[1].indices[:, None, :]).to(logits[0].dtype)  # (n, K, K)
    masses = [
        ((one.values - z.logsumexp(-1, keepdim=True)).exp() * shared.sum(dim)).sum()
        for one, z, dim in zip(top, logits, (2, 1), strict=True)
    ]
    sums = torch.stack([shared.sum() / shared.shape[1], *masses])
    return torch.cat([sums.double().cpu(), torch.tensor([len(shared)], dtype=torch.float64)])
