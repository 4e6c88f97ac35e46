# docs/benchmarks.md
"""What the telemetry of a training script costs, as a share of a step.

Runs the script's own main. Two measures: the seconds spent inside each telemetry function over the seconds of all steps,
and the median step with telemetry against the median step without, the two taking turns step by step within one run. A
step is what lies between two calls at the end of the loop, so writing samples is in it (with an odd --sample-every they
fall into steps with and without in turn). The first 4 steps are warm-up. Without a GPU the seconds are the process's CPU
seconds, less disturbed by what else the machine is doing.

    python benchmarks/telemetry.py opd.py --teacher A --student B --train-data C --sample-every 19 --max-steps 200
"""

import importlib
import statistics
import sys
import time
from collections import defaultdict
from pathlib import Path

import torch
import tyro

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import samples_page  # noqa: E402
import telemetry  # noqa: E402

WARMUP = 4  # steps
clock = time.perf_counter if torch.cuda.is_available() else time.process_time
IDLE = {  # what each telemetry function is in a step without telemetry
    "repetition": lambda *_: 0.0,
    "sums_by_third": lambda *_: torch.zeros(6, dtype=torch.float64),
    "top_k_sums": lambda *_: torch.ones(4, dtype=torch.float64),
    "keep": lambda *_, **__: None,
    "write": lambda *_, **__: None,
}


def main(script: str, words: list[str]) -> None:
    module = importlib.import_module(Path(script).stem)
    args = tyro.cli(module.Args, args=words)
    sys.argv = [str(ROOT / script), *words]
    inside, steps = defaultdict(float), {True: [], False: []}  # seconds by function in steps with telemetry; steps by on
    state = {"on": True, "last": None, "spent": defaultdict(float), "count": 0}

    def timed(owner, name):
        original = getattr(owner, name)

        def call(*a, **kw):
            if not state["on"]:
                return IDLE[name](*a, **kw)
            start = clock()
            result = original(*a, **kw)
            state["spent"][name] += clock() - start
            return result

        setattr(owner, name, call)

    for name in ("repetition", "sums_by_third", "top_k_sums"):
        timed(telemetry, name)
    for name in ("keep", "write"):
        timed(samples_page.Samples, name)

    if_truncated = module.common.StopRules.if_truncated  # the last thing a step does

    def end_of_step(*a):
        if_truncated(*a)
        now = clock()
        state["count"] += 1
        if state["count"] > WARMUP:
            steps[state["on"]].append(now - state["last"])
            for name, seconds in state["spent"].items():
                inside[name] += seconds
        state["on"], state["spent"], state["last"] = not state["on"], defaultdict(float), clock()

    module.common.StopRules.if_truncated = end_of_step
    module.main(args)
    total = sum(steps[True])
    print(f"{script}: {len(steps[True])} steps with telemetry, {len(steps[False])} without")
    for name, seconds in sorted(inside.items(), key=lambda item: -item[1]):
        print(f"  {name:14} {100 * seconds / total:6.2f} % of a step   {1000 * seconds / len(steps[True]):8.3f} ms")
    print(f"  together       {100 * sum(inside.values()) / total:6.2f} % of a step")
    on, off = (statistics.median(steps[which]) for which in (True, False))
    print(f"  median step    {on:.4f} s with, {off:.4f} s without: {100 * (on / off - 1):+.1f} %")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
