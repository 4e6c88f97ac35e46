"""Full-vocabulary divergences and sampled log-probabilities that never hold the `[tokens, vocabulary]` logits."""

from kernels.divergence import (
    DivergenceStats,
    TeacherHead,
    TeacherLogits,
    TeacherTopK,
    divergence_from_logits,
    fused_linear_divergence,
)
from kernels.linear import head_weight
from kernels.logprob import fused_linear_logprob

__all__ = [
    "DivergenceStats",
    "TeacherHead",
    "TeacherLogits",
    "TeacherTopK",
    "divergence_from_logits",
    "fused_linear_divergence",
    "fused_linear_logprob",
    "head_weight",
]
