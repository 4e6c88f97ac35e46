# docs/benchmarks.md
"""What the telemetry of a training script and the canary of its vllm sampler cost, as a share of a step.

Runs the script's own main. Two measures: the seconds spent inside each telemetry function over the seconds of all steps,
and the median step with telemetry against the median step without, the two taking turns step by step within one run. A
step is what lies between two calls at the end of the loop, so writing samples is in it (with an odd --sample-every they
fall into steps with and without in turn). The first 4 steps are warm-up. Without a GPU the seconds are the process's CPU
seconds, less disturbed by what else the machine is doing.

With --sampler vllm the canary counts as telemetry. Its forward pass is timed as it is. What its probe costs among the
prompts of a rollout is the difference of two such rollouts, with the probe and without: in steps of a third kind, which
are not among the median steps, the same prompts are sampled three times either way, and the fastest of each engine step
are summed and compared. Both figures are medians over the steps.

    python benchmarks/telemetry.py opd.py --teacher A --student B --train-data C --sample-every 19 --max-steps 200
    python benchmarks/telemetry.py opd.py --teacher A --student B --train-data C --sampler vllm --max-steps 64
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

from infra import samples_page, telemetry  # noqa: E402

WARMUP = 4  # steps
PROBE, FORWARD = "canary: probe", "canary: forward"
clock = time.perf_counter if torch.cuda.is_available() else time.process_time
IDLE = {  # what each telemetry function is in a step without telemetry
    "repetition": lambda *_: 0.0,
    "sums_by_third": lambda *_: (torch.zeros(3, dtype=torch.float64), [1, 1, 1]),
    "top_k_sums": lambda *_: (*torch.ones(3), 1),
    "keep": lambda *_, **__: None,
    "write": lambda *_, **__: None,
}


def main(script: str, words: list[str]) -> None:
    module = importlib.import_module(Path(script).stem)
    args = tyro.cli(module.Args, args=words)
    sys.argv = [str(ROOT / script), *words]
    kinds = ["with", "without", "probe"][: 3 if args.sampler == "vllm" else 2]
    inside, steps = defaultdict(list), defaultdict(list)  # seconds by function in each step with telemetry; of steps by kind
    state = {"kind": "with", "last": None, "spent": defaultdict(float), "count": 0}

    def timed(owner, name, label=None):
        original = getattr(owner, name)

        def call(*a, **kw):
            if state["kind"] == "without":
                return IDLE[name](*a, **kw)
            start = clock()
            result = original(*a, **kw)
            state["spent"][label or name] += clock() - start
            return result

        setattr(owner, name, call)

    for name in ("repetition", "sums_by_third", "top_k_sums"):
        timed(telemetry, name)
    for name in ("keep", "write"):
        timed(samples_page.Samples, name)
    if args.sampler == "vllm":
        time_probe(state)
        timed(sys.modules["infra.sampler_vllm"].VLLMSampler, "canary", FORWARD)

    if_truncated = module.run_folder.StopRules.if_truncated  # the last thing a step does

    def end_of_step(*a):
        if_truncated(*a)
        now = clock()
        state["count"] += 1
        if state["count"] > WARMUP:
            steps[state["kind"]].append(now - state["last"])
            for name, seconds in state["spent"].items():
                if state["kind"] == "with" or name == PROBE:
                    inside[name].append(seconds)
        state.update(kind=kinds[state["count"] % len(kinds)], spent=defaultdict(float), last=clock())

    module.run_folder.StopRules.if_truncated = end_of_step
    module.main(args)
    total, count = sum(steps["with"]), len(steps["with"])
    on, off = (statistics.median(steps[kind]) for kind in ("with", "without"))
    mean = {name: sum(seconds) / count for name, seconds in inside.items()}  # not every step writes samples
    share = {name: seconds * count / total for name, seconds in mean.items()}
    for name in {PROBE, FORWARD} & set(inside):
        mean[name] = statistics.median(inside[name])
        share[name] = mean[name] / on
    print(f"{script}: {count} steps with telemetry, {len(steps['without'])} without")
    for name in sorted(share, key=share.get, reverse=True):
        print(f"  {name:15} {100 * share[name]:6.2f} % of a step   {1000 * mean[name]:8.3f} ms")
    print(f"  together        {100 * sum(share.values()):6.2f} % of a step")
    print(f"  median step     {on:.4f} s with, {off:.4f} s without: {100 * (on / off - 1):+.1f} %")
    if PROBE in inside:
        low, _, high = statistics.quantiles(inside[PROBE], n=4)
        print(f"  {PROBE}: quartiles {1000 * low:.1f} and {1000 * high:.1f} ms over {len(inside[PROBE])} steps")


def time_probe(state) -> None:
    """In steps of kind "without" no rollout has the canary's probe; in those of kind "probe" it is timed."""
    from infra.sampler_vllm import VLLMSampler

    sample, generate = VLLMSampler._sample, VLLMSampler._generate

    def sample_with_or_without(self, *a):
        tolerance = self.canary_tolerance
        self.canary_tolerance = 0 if state["kind"] == "without" else tolerance
        responses = sample(self, *a)
        self.canary_tolerance = tolerance
        return responses

    def generate_again(self, prompts, params, progress=None, finished=None):
        if state["kind"] != "probe" or prompts[0] is not self.probe:
            return generate(self, prompts, params, progress, finished)
        engine, seconds, outputs = self.llm.llm_engine, {0: [], 1: []}, {}
        step = engine.step
        for leave_out in (0, 1, 1, 0, 0, 1):
            self.llm.reset_prefix_cache()
            ticks = [clock()]
            engine.step = lambda: (step(), ticks.append(clock()))[0]  # noqa: B023
            outputs[leave_out] = generate(self, prompts[leave_out:], params[leave_out:])
            seconds[leave_out].append([after - before for before, after in zip(ticks, ticks[1:] + [clock()], strict=True)])
        engine.step = step
        fastest = [sum(map(min, zip(*seconds[leave_out], strict=True))) for leave_out in (0, 1)]
        state["spent"][PROBE] += fastest[0] - fastest[1]
        return outputs[0]

    VLLMSampler._sample, VLLMSampler._generate = sample_with_or_without, generate_again


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
