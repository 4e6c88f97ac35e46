"""The vllm sampler with the real engine on a CPU. Engines run in processes of their own (tests/vllm_engine.py)."""

import contextlib
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT, random_model, read_jsonl, write_jsonl

import toy

pytestmark = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="needs vllm: make env-vllm")
ENGINE = ROOT / "tests" / "vllm_engine.py"
MODELS = ["qwen3 tied", "qwen3 untied", "llama tied", "llama untied"]
ENV = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}


def run(*command, timeout=300):
    return subprocess.run([sys.executable, *map(str, command)], capture_output=True, text=True, timeout=timeout, env=ENV)


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """{model or "sampling": what was measured}"""
    out = tmp_path_factory.mktemp("engine") / "measured.json"
    done = run(ENGINE, out)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(out.read_text())


# ----------------------------------------------------------------------------------------------------------- the sync
@pytest.mark.parametrize("model", MODELS)
def test_greedy_tokens_equal_hf_after_a_sync_of_perturbed_weights(measured, model):
    one = measured[model]
    assert one["greedy"] == one["greedy_hf"] != one["greedy_before"]


@pytest.mark.parametrize("model", MODELS)
def test_logprobs_equal_the_trainers_after_a_sync(measured, model):
    assert measured[model]["diff"] < 1e-4 and measured[model]["diff_greedy"] < 1e-4


@pytest.mark.parametrize("model", MODELS)
def test_the_canary_is_silent_after_a_sync_and_catches_a_skipped_one(measured, model):
    one = measured[model]
    assert 0 < one["canary_start"] < 1e-5 and 0 < one["canary_synced"] < 1e-5
    assert re.search(r"weight sync 1 \(after step 1 of this run\) failed", one["skipped_sync"])
    assert "--canary-tolerance" in one["skipped_sync"] and one["tolerance_0"] is None


@pytest.mark.parametrize("model", MODELS)
def test_the_canary_catches_a_stale_prefix_cache(measured, model):
    assert "weight sync 3" in measured[model]["stale_prefix_cache"]


@pytest.mark.parametrize("model", MODELS)
def test_a_prefix_cache_that_cannot_be_emptied_ends_the_run(measured, model):
    assert "could not empty its prefix cache" in measured[model]["reset_refused"]


@pytest.mark.parametrize("model", ["qwen3 tied", "llama tied"])
def test_the_canary_catches_a_stale_tied_head(measured, model):
    assert "weight sync 4" in measured[model]["stale_head"]


def test_a_sync_behind_sleep_in_bfloat16_and_of_sharded_weights(measured):
    one = measured["sampling"]
    assert one["canary_behind_sleep"] < 1e-5 and one["bfloat16_canary"] < 0.1
    assert one["sharded_type"] == "DTensor" and one["sharded_canary"] < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("tp", [1, 2])
def test_two_ranks_with_sharded_weights(tmp_path, tp):
    """An engine per rank, and one engine that two ranks share."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2]
    done = run(*torchrun, ENGINE, tmp_path / "ranks.json", "--tp", tp)
    assert (tmp_path / "ranks.json").exists(), done.stdout + done.stderr
    for rank in json.loads((tmp_path / "ranks.json").read_text()).values():
        assert rank["equal"] and rank["canary"] < 1e-5 and rank["canary_again"] < 1e-5


# ----------------------------------------------------------------------------------------------------------- sampling
def test_eos_is_the_last_id_and_only_there_and_truncated_says_so(measured):
    one, eos = measured["sampling"], toy.ID["<|im_end|>"]
    assert one["eos_inside"] == 0 and {truncated for _, _, truncated, _ in one["responses"]} == {True, False}
    for ids, logprobs, truncated, last in one["responses"]:
        assert ids == logprobs and truncated == (last != eos) and (not truncated or ids == 24)


def test_the_seed_decides_the_samples(measured):
    one = measured["sampling"]
    assert one["repeats"] and one["other_seed_differs"] and one["distinct_of_equal_prompts"] > 4


def test_samples_follow_the_models_distribution(measured):
    assert measured["sampling"]["frequency_diff"] < 4 * (0.25 / 4000) ** 0.5


@pytest.mark.parametrize("name", ["temperature", "filters"])
def test_sampler_logprobs_are_those_behind_temperature_top_p_and_top_k(measured, name):
    assert measured["sampling"][f"diff_{name}"] < 1e-4


def test_without_a_model_it_reads_the_checkpoint_and_every_eos_of_its_generation_config(measured):
    one = measured["sampling"]
    assert one["read_greedy"] == one["read_greedy_hf"] and one["ends"] == [3, toy.ID["<|im_end|>"]]


def test_more_prompts_than_the_engine_reads_at_once(measured):
    """On a CPU vLLM 0.32 ended in an error where one was read in two pieces."""
    assert measured["sampling"]["many"] == 800


def test_progress_counts_every_response_once(measured):
    assert measured["sampling"]["progress"] == 20


def test_responses_are_cut_before_ids_beyond_the_tokenizer_and_counted(measured):
    padded = measured["sampling"]["padded"]
    assert 0 < padded["cut"] <= 64 and padded["all_truncated"] and padded["aligned"]
    assert padded["largest_id"] < padded["size"]


# ------------------------------------------------------------------------------------------------------------ scripts
@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A student and a teacher whose heads vLLM's CPU attention knows, and problems."""
    folders = {}
    for name, config in {"student": {"seed": 1}, "teacher": {"seed": 2, "tied": False}}.items():
        folders[name] = str(tmp_path_factory.mktemp(name))
        random_model(head_dim=32, **config).save_pretrained(folders[name])
        toy.make_tokenizer().save_pretrained(folders[name])
    rows = [{"problem": f"{a}+{b}?", "answer": str((a + b) % 10)} for a in range(4) for b in range(3)]
    folders["data"] = write_jsonl(tmp_path_factory.mktemp("data") / "data.jsonl", rows)
    return folders


def command(script, tiny, out, **flags):
    models = {"grpo": {"model": tiny["student"]}, "eval_math": {"model": tiny["student"]}}
    models = models.get(script) or {"teacher": tiny["teacher"], "student": tiny["student"]}
    sizes = {
        "grpo": {"prompts_per_step": 4, "minibatch_prompts": 2, "group_size": 4},
        "opd": {"prompts_per_step": 4},
        "variants/opd_sampled": {"prompts_per_step": 4},
        "fkl_warmup": {"rollouts_per_step": 4},
        "eval_math": {"samples": 2, "benchmarks": tiny["data"]},
    }[script]
    if script != "eval_math":
        sizes |= {"train_data": tiny["data"], "eval_data": tiny["data"], "eval_every": 1, "max_steps": 2}
        sizes |= {"learning_rate": 0.01}
    named = models | sizes | {"out": out, "max_response_tokens": 16, "instruction": "", "sampler": "vllm"} | flags
    words = [word for name, value in named.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    return [ROOT / f"{script}.py", *words]


@pytest.mark.slow
@pytest.mark.parametrize("script", ["grpo", "opd", "variants/opd_sampled", "fkl_warmup"])
def test_trainers(tiny, tmp_path, script):
    flags = {"kl_coef": 0.1} if script == "grpo" else {}  # it trains every row, where no answer of a random model is right
    done = run(*command(script, tiny, tmp_path / "run", **flags))
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["finished"] and record["args"]["sampler"] == "vllm"
    rows = read_jsonl(tmp_path / "run" / "metrics.jsonl")
    assert [row["step"] for row in rows] == [0, 1, 2] and all("eval/accuracy" in row for row in rows)
    if script != "fkl_warmup":
        for row in rows[1:]:
            assert row["debug/sampler_logprob_diff_max"] < 1e-4 and 0 < row["debug/canary_logprob_diff"] < 1e-5
            assert row["debug/out_of_vocab"] == 0


@pytest.mark.slow
def test_eval_math(tiny, tmp_path):
    done = run(*command("eval_math", tiny, tmp_path))
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "data" / "summary.json").read_text())["problems"] == 12


@pytest.mark.slow
def test_the_learning_curve_changes_no_training(tiny, tmp_path):
    for every in (0, 1):
        assert run(*command("opd", tiny, tmp_path / str(every), eval_every=every)).returncode == 0
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("0", "1")]
    assert weights[0] == weights[1]


def patched(tmp_path, words, patch: str) -> list[str]:
    """The same command behind some lines of Python."""
    wrapper = tmp_path / "patched.py"
    lines = "import runpy, sys, time\nfrom infra.sampler_vllm import VLLMSampler\n", patch
    wrapper.write_text("".join(lines) + "\nsys.argv = sys.argv[1:]\nrunpy.run_path(sys.argv[0], run_name='__main__')\n")
    return [sys.executable, str(wrapper), *map(str, words)]


SYNC_ONCE = """
whole = VLLMSampler.update_weights
def once(self, model):
    if self.syncs:
        self.llm.collective_rpc = lambda *a, **kw: None
    whole(self, model)
VLLMSampler.update_weights = once
"""
SLOW_ENGINE = """
sample = VLLMSampler.sample
def slow(self, *a, **kw):
    step = type(self.llm.llm_engine).step
    def slow_step():
        print("ENGINE STEP", file=sys.stderr, flush=True)
        time.sleep(0.5)
        return step(self.llm.llm_engine)
    self.llm.llm_engine.step = slow_step
    return sample(self, *a, **kw)
VLLMSampler.sample = slow
"""
PYTHONPATH = {"PYTHONPATH": str(ROOT)}


@pytest.mark.slow
def test_a_run_whose_sync_is_skipped_stops_and_says_where(tiny, tmp_path):
    words = patched(tmp_path, command("opd", tiny, tmp_path / "run"), SYNC_ONCE)
    done = subprocess.run(words, capture_output=True, text=True, timeout=300, env=ENV | PYTHONPATH)
    assert done.returncode != 0 and "weight sync 1 (after step 1 of this run) failed" in done.stderr
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert not record["finished"] and "weight sync 1 (after step 1 of this run) failed" in record["stopped"]
    assert (tmp_path / "run" / "model.safetensors").exists(), "the trainer's weights are saved first"


# ----------------------------------------------------------------------------------------------------------- shutdown
def processes_of(mark: str) -> list[str]:
    """Command lines of the living processes that carry MARK in their environment: a script and all that it started."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            state = (folder / "stat").read_text().rsplit(")", 1)[1].split()[0]
            if state != "Z" and f"ENGINE_TEST_MARK={mark}\0".encode() in (folder / "environ").read_bytes():
                found.append((folder / "cmdline").read_bytes().replace(b"\0", b" ").decode())
    return found


@pytest.mark.slow
@pytest.mark.parametrize("script", ["opd", "grpo", "fkl_warmup", "eval_math"])
@pytest.mark.parametrize("how", ["success", "SIGINT", "SIGKILL"])
def test_no_process_is_left(tiny, tmp_path, script, how):
    """With a signal, the engine is slow enough to be stopped in the middle of a rollout."""
    mark = f"{os.getpid()}_{time.time()}"
    words = [sys.executable, *map(str, command(script, tiny, tmp_path / "run"))]
    if how != "success":
        words = patched(tmp_path, words[1:], SLOW_ENGINE)
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(
            words, stdout=log, stderr=log, env=ENV | PYTHONPATH | {"ENGINE_TEST_MARK": mark},
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # ignored where a shell runs the tests with &
        )  # fmt: skip
    if how != "success":
        deadline = time.time() + 120
        while "ENGINE STEP" not in (tmp_path / "log").read_text():
            assert process.poll() is None and time.time() < deadline, (tmp_path / "log").read_text()
            time.sleep(0.1)
        assert processes_of(mark)
        process.send_signal(getattr(signal, how))
    assert (process.wait(timeout=120) == 0) == (how == "success"), (tmp_path / "log").read_text()
    deadline = time.time() + 15  # the grader's workers notice the death of their parent
    while processes_of(mark) and time.time() < deadline:
        time.sleep(0.2)
    assert processes_of(mark) == []
