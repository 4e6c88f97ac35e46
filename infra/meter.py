# docs/telemetry.md
"""The numbers of one step, by name instead of by position: summed over micro-batches, then once over the ranks.

    meter = Meter()
    meter.add("losses/entropy", entropy)       # a mean over all values added, of any micro-batch on any rank
    meter.sum("losses/policy_loss", loss)      # a sum over them
    meter.max("debug/worst", differences)      # the largest of them
    meter.lap("train")                         # time/train: seconds since the lap before
    metrics = meter.metrics()
"""

import time

import torch

from infra import parallel


class Meter:
    """Sums stay where their values were computed, in float64, and are moved once, when they are asked for. All ranks must
    add the same names, in the same order; a name that was never added is in no row."""

    def __init__(self):
        self.sums, self.counts, self.maxima, self.laps = {}, {}, {}, {}
        self.start = self.last = time.time()

    def add(self, name: str, values: torch.Tensor, count: float | None = None) -> None:
        """Values of any shape for a mean; `count` where they are already sums, over so many."""
        self.sum(name, values)
        self.counts[name] = self.counts.get(name, 0) + (values.numel() if count is None else count)

    def sum(self, name: str, values: torch.Tensor) -> None:
        self.sums[name] = self.sums.get(name, 0) + values.detach().double().sum()

    def max(self, name: str, values: torch.Tensor) -> None:
        """Of values that are at least 0."""
        largest = values.detach().double().max() if values.numel() else values.new_zeros((), dtype=torch.float64)
        self.maxima[name] = torch.maximum(self.maxima[name], largest) if name in self.maxima else largest

    def lap(self, name: str) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # the kernels of this lap are done, not only launched
        now = time.time()
        self.laps[f"time/{name}"] = self.laps.get(f"time/{name}", 0.0) + now - self.last
        self.laps["time/step"], self.last = now - self.start, now

    def total(self, name: str) -> float:
        """A sum so far, over all ranks (a collective)."""
        return float(parallel.all_reduce(self.sums[name].clone().cpu()))  # in place, so of a copy

    def largest(self, name: str) -> float:
        """A maximum so far, over all ranks (a collective)."""
        return float(parallel.all_reduce(self.maxima[name].cpu(), largest=True))

    def metrics(self) -> dict[str, float]:
        """{name: value} over all ranks (a collective), and the laps."""
        metrics = {}
        if self.sums:
            sums = torch.stack(list(self.sums.values())).cpu()
            counts = torch.tensor([self.counts.get(name, 0) for name in self.sums], dtype=torch.float64)
            sums, counts = parallel.all_reduce(torch.cat([sums, counts])).chunk(2)
            for name, value, count in zip(self.sums, sums.tolist(), counts.tolist(), strict=True):
                metrics[name] = value / max(count, 1) if name in self.counts else value
        if self.maxima:
            largest = parallel.all_reduce(torch.stack(list(self.maxima.values())).cpu(), largest=True)
            metrics |= dict(zip(self.maxima, largest.tolist(), strict=True))
        return metrics | self.laps
