"""The step's numbers: means, sums and maxima over micro-batches and ranks, and the laps of the clock."""

import json

import pytest
import torch
from test_parallel import torchrun

from infra import meter
from infra.meter import Meter

BATCHES = [[1.0, 2.0, 6.0], [], [0.5], [3.0, 3.0]]


def filled(batches) -> Meter:
    meter = Meter()
    for values in map(torch.tensor, batches):
        meter.add("mean", values)
        meter.add("positive", values > 1)
        meter.add("given_count", values.sum(), count=2 * len(values))
        meter.sum("sum", values)
        meter.max("max", values)
    return meter


def expected(batches):
    values = [value for batch in batches for value in batch]
    return {
        "mean": sum(values) / len(values),
        "positive": sum(value > 1 for value in values) / len(values),
        "given_count": sum(values) / (2 * len(values)),
        "sum": sum(values),
        "max": max(values),
    }


def test_micro_batches_of_any_size_give_the_figures_of_all_values():
    meter = filled(BATCHES)
    assert meter.total("sum") == 15.5
    assert meter.metrics() == pytest.approx(expected(BATCHES), rel=1e-15)
    assert filled([sum(BATCHES, [])]).metrics() == pytest.approx(expected(BATCHES), rel=1e-15)


def test_values_are_summed_in_float64_and_hold_no_graph():
    meter = Meter()
    for value in (1e8, 1.0, -1e8):  # the 1 is lost in a float32
        meter.sum("sum", torch.tensor(value))
    grows = torch.ones(3, requires_grad=True)
    meter.add("mean", grows * 2)
    meter.max("max", grows)
    assert meter.metrics() == {"sum": 1.0, "mean": 2.0, "max": 1.0}
    assert not any(tensor.requires_grad for tensor in (*meter.sums.values(), *meter.maxima.values()))


def test_a_name_that_was_never_added_is_in_no_row():
    assert Meter().metrics() == {}
    meter = Meter()
    meter.sum("sum", torch.tensor(0.0))
    assert meter.metrics() == {"sum": 0.0}
    with pytest.raises(KeyError):
        meter.total("another")


def test_a_name_without_values_is_0():
    """Of a rank, or a step, whose rows are all empty."""
    meter = Meter()
    meter.add("mean", torch.zeros(0))
    meter.max("max", torch.zeros(0))
    assert meter.metrics() == {"mean": 0.0, "max": 0.0}


def test_a_maximum_alone_is_logged():
    meter = Meter()
    meter.max("max", torch.tensor([0.25, 0.5]))
    assert meter.metrics() == {"max": 0.5}


def test_laps_of_one_name_add_up_and_the_step_is_the_whole(monkeypatch):
    monkeypatch.setattr(meter.time, "time", iter([10.0, 11.0, 14.0, 14.5]).__next__)
    clock = Meter()
    clock.lap("score")
    assert clock.laps == {"time/score": 1.0, "time/step": 1.0}
    clock.lap("train")
    clock.lap("score")
    clock.sum("sum", torch.tensor(2.0))
    assert clock.metrics() == {"sum": 2.0, "time/score": 1.5, "time/train": 3.0, "time/step": 4.5}


def test_two_ranks_log_the_figures_of_all_values(tmp_path):
    """Each has half of the micro-batches; one of them only an empty one, and a smaller maximum."""
    script = tmp_path / "rank.py"
    script.write_text(f"""
import json, sys
from pathlib import Path
sys.path.insert(0, "tests")
from test_infra_meter import BATCHES, filled
from infra import parallel
parallel.setup()
out = []
for batches in (BATCHES, [BATCHES[0], []]):
    meter = filled(batches[parallel.rank() :: 2])
    out.append([meter.total("sum"), meter.metrics()])
Path({str(tmp_path)!r}, f"{{parallel.rank()}}.json").write_text(json.dumps(out))
parallel.barrier()
""")
    done = torchrun(2, script)
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert first == second
    for (total, metrics), batches in zip(first, (BATCHES, [BATCHES[0], []]), strict=True):
        assert total == expected(batches)["sum"] and metrics == pytest.approx(expected(batches), rel=1e-15)
