# docs/telemetry.md
"""Early signs of trouble at next to no cost: repetition, KL by position, overlap of the models' top tokens.

Each enters sums into the step's Meter, which divides once, over all micro-batches and ranks."""

import torch

from infra.meter import Meter
from kernels import DivergenceStats, TeacherLogits

TOP_K = 8
OVERLAP_TOKENS = 256  # positions a step at which the top tokens are compared, at most one in 16


def repetition(responses: list[list[int]]) -> float:
    """Mean share of a response's 4-grams of tokens that occurred in it before (seq-rep-4, arXiv 1908.04319)."""
    shares = []
    for ids in responses:
        grams = list(zip(ids, ids[1:], ids[2:], ids[3:], strict=False))
        shares.append(1 - len(set(grams)) / len(grams) if grams else 0.0)
    return sum(shares) / len(shares)


def of_responses(responses) -> dict[str, float]:
    """Metrics of what was sampled: means over the `Response`s."""
    return {
        "charts/response_length": sum(len(r.ids) for r in responses) / len(responses),
        "charts/truncated_frac": sum(r.truncated for r in responses) / len(responses),
        "charts/repetition": repetition([r.ids for r in responses]),
    }


def add_divergences(meter: Meter, stats: DivergenceStats, watched: str, lengths: list[int]) -> None:
    """Both KLs, both entropies, and the `watched` KL by thirds of the responses, whose `lengths` are those of `stats`."""
    meter.add("losses/reverse_kl", stats.reverse_kl)
    meter.add("losses/forward_kl", stats.forward_kl)
    meter.add("losses/entropy", stats.student_entropy)
    meter.add("losses/teacher_entropy", stats.teacher_entropy)
    sums, counts = sums_by_third(getattr(stats, watched), lengths)
    for k, part in enumerate(("early", "middle", "late")):
        meter.add(f"losses/{watched}_{part}", sums[k], counts[k])


def add_sampler_difference(meter: Meter, logprobs: torch.Tensor, sampler_logprobs: torch.Tensor) -> None:
    """How far the trainer's log-probabilities (N,) of the sampled tokens are from those that the sampler reported."""
    difference = (logprobs.detach() - sampler_logprobs).abs()
    meter.add("debug/sampler_logprob_diff_mean", difference)
    meter.max("debug/sampler_logprob_diff_max", difference)


def add_overlap(meter: Meter, hidden, head, target, temperature: float, tokens: int) -> None:
    """Overlap of the likeliest tokens of student and teacher, and the probability that either gives to what they share;
    arguments as in `top_k_sums`."""
    shared, student_mass, teacher_mass, count = top_k_sums(hidden, head, target, temperature, tokens)
    for name, value in (("", shared), ("_mass", student_mass), ("_teacher_mass", teacher_mass)):
        meter.add(f"debug/topk_overlap{name}", value, count)


def sums_by_third(values, lengths: list[int]) -> tuple[torch.Tensor, list[int]]:
    """values (N,), packed response after response -> sums over the early, middle and late third of each response, (3,)
    float64 where the values are, and the number of tokens in each."""
    length = torch.tensor(lengths, dtype=torch.long)
    start = (length.cumsum(0) - length).repeat_interleave(length)  # (N,) where the token's response begins
    third = (torch.arange(len(start)) - start) * 3 // length.repeat_interleave(length)  # (N,)
    member = third == torch.arange(3)[:, None]  # (3, N)
    values = values.detach().double()
    return torch.where(member.to(values.device), values, 0.0).sum(-1), member.sum(-1).tolist()


@torch.no_grad()
def top_k_sums(hidden, head, target, temperature: float, tokens: int):
    """Over a sample of the N positions: sums of the share of the TOP_K likeliest ids that student and teacher have in common
    and of the probability that either gives to those, three scalars where `hidden` is, and the number of positions.

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
    return shared.sum() / shared.shape[1], *masses, len(shared)
