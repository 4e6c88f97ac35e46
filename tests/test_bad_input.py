"""What a user may get wrong: each ends with exit code 2 and one line on stderr that names the flag and the fix."""

import json
import os
import re
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT, random_model, write_jsonl

import common
import toy
from infra import cli

TRAINERS = ("grpo", "fkl_warmup", "opd")


@pytest.fixture
def typed(checkpoints, data, tmp_path):
    """`typed(script, **changes)`: the flags of a command that would work, with some of them changed."""

    def flags(script, **changes):
        models = {"grpo": {"model": checkpoints.student}, "eval_math": {"model": checkpoints.student}}
        models = models.get(script) or {"teacher": checkpoints.wide, "student": checkpoints.student}
        sizes = {
            "grpo": {"prompts_per_step": 4, "minibatch_prompts": 2, "group_size": 2},
            "fkl_warmup": {"rollouts_per_step": 4},
            "opd": {"prompts_per_step": 4},
            "eval_math": {"samples": 1},
            "variants/opd_sampled": {"prompts_per_step": 4},
        }[script]
        rest = {"benchmarks": data} if script == "eval_math" else {"train_data": data, "max_steps": 1}
        named = models | sizes | rest | {"out": tmp_path / "out", "max_response_tokens": 4, "instruction": ""} | changes
        return [part for name, value in named.items() for part in ("--" + name.replace("_", "-"), str(value))]

    return flags


def assert_refused(result, *patterns):
    code, _, err = result
    assert code == 2, f"exit code {code}: {err}"
    assert "Traceback" not in err and err.startswith("error: ") and err.count("\n") == 1, err
    for pattern in patterns:
        assert re.search(pattern, err), f"{pattern!r} is not in {err}"


@pytest.mark.parametrize("script", [*TRAINERS, "eval_math"])
def test_the_unchanged_command_works(cli, typed, script):
    assert cli(script, *typed(script))[0] == 0


# -------------------------------------------------------------------------------------------------------------- sizes
BAD_VALUES = [(script, name, value) for script, names in {
    "grpo": {"group_size": (1, 0, -2), "prompts_per_step": (0, -4), "minibatch_prompts": (0, -2), "learning_rate": (-1,)},
    "fkl_warmup": {"rollouts_per_step": (0, -4), "rollouts_per_prompt": (0, -1), "learning_rate": (-1,)},
    "opd": {"prompts_per_step": (0, -4), "learning_rate": (-1,), "jsd_beta": (-0.1, 1.5)},
    "eval_math": {"samples": (0, -1), "limit": (0, -1), "top_p": (0, 1.5), "top_k": (-1,), "temperature": (-1,),
                  "max_response_tokens": (0,)},
}.items() for name, values in names.items() for value in values]  # fmt: skip
BAD_VALUES += [(script, name, value) for script in TRAINERS for name, value in (
    ("top_p", 0.9), ("temperature", 0), ("temperature", -1), ("max_response_tokens", 0), ("max_response_tokens", -5),
    ("max_steps", 0), ("max_steps", -1), ("micro_batch_tokens", 0), ("max_prompt_tokens", 0), ("stop_patience", 0),
    ("learning_rate_warmup_steps", -1), ("stop_truncated_frac", -0.1), ("stop_truncated_frac", 1.5))]  # fmt: skip


@pytest.mark.parametrize("script, name, value", BAD_VALUES)
def test_an_impossible_value_names_its_flag(cli, typed, script, name, value):
    assert_refused(cli(script, *typed(script, **{name: value})), "--" + name.replace("_", "-"))


@pytest.mark.parametrize("script", TRAINERS)
def test_zero_epochs(cli, typed, script):
    flags = typed(script, epochs=0)
    del flags[flags.index("--max-steps") : flags.index("--max-steps") + 2]
    assert_refused(cli(script, *flags), "--epochs")


def test_sizes_that_do_not_divide(cli, typed):
    assert_refused(
        cli("grpo", *typed("grpo", prompts_per_step=4, minibatch_prompts=3)),
        "--prompts-per-step 4 is not divisible by --minibatch-prompts 3",
        "choose a divisor",
    )


LARGE = {"grpo": {"prompts_per_step": 14, "minibatch_prompts": 7}, "opd": {"prompts_per_step": 14}}


@pytest.mark.parametrize("script, sizes", LARGE.items())
def test_a_step_larger_than_the_data_passes_over_it_again(cli, typed, script, sizes):
    """Few labels are no reason for small steps: the responses are sampled anew."""
    code, out, _ = cli(script, *typed(script, max_steps=1, **sizes))
    assert code == 0 and "--prompts-per-step 14: a step passes over the 12 problems 1.2 times, sampling anew" in out


def test_more_rollouts_per_step_than_there_are(cli, typed):
    assert_refused(
        cli("fkl_warmup", *typed("fkl_warmup", rollouts_per_step=25, rollouts_per_prompt=2)),
        "--rollouts-per-step 25 is more than the 24 rollouts",
        "raise --rollouts-per-prompt",
    )


# --------------------------------------------------------------------------------------------------------------- data
DATA_FLAG = {"grpo": "train_data", "fkl_warmup": "train_data", "opd": "train_data", "eval_math": "benchmarks"}


@pytest.mark.parametrize(
    "text, patterns",
    [
        ("", ["the dataset is empty"]),
        ("\n\n", ["the dataset is empty"]),
        ('{"text": "1+1?", "answer": "2"}\n', ["needs a column problem, question or prompt", "it has answer, text"]),
        ('{"problem": "1+1?", "answer": "2"}\n{"problem": \n', ["line 2 is not a JSON object"]),
        ('["1+1?", "2"]\n', ["object"]),
        ('{"problem": "1+1?", "answer": "2"}\n{"question": "1+2?", "answer": "3"}\n', ["problem"]),
        ('{"problem": null, "answer": "2"}\n', ["problem"]),
        ('{"problem": 5, "answer": "2"}\n', ["problem"]),
        ('{"prompt": [], "answer": "2"}\n', ["prompt"]),
        ('{"prompt": ["1+1?"], "answer": "2"}\n', ["prompt"]),
    ],
    ids=[
        "empty",
        "blank",
        "no_column",
        "malformed",
        "not_an_object",
        "missing_later",
        "null",
        "number",
        "empty_chat",
        "chat_of_strings",
    ],
)
@pytest.mark.parametrize("script", ["opd", "eval_math"])
def test_unusable_data(cli, typed, tmp_path, script, text, patterns):
    path = tmp_path / "bad.jsonl"
    path.write_text(text)
    flag = DATA_FLAG[script]
    assert_refused(cli(script, *typed(script, **{flag: path})), "--" + flag.replace("_", "-"), *patterns)


@pytest.mark.parametrize("script", [*TRAINERS, "eval_math"])
@pytest.mark.parametrize("name", ["nothing.jsonl", "nothing.parquet"])
def test_a_missing_data_file(cli, typed, tmp_path, script, name):
    flag = DATA_FLAG[script]
    assert_refused(
        cli(script, *typed(script, **{flag: tmp_path / name})), "--" + flag.replace("_", "-"), name, "Check the path"
    )


@pytest.mark.parametrize(
    "row", [{"problem": "1+1?"}, {"problem": "1+1?", "reward_model": "rule"}, {"problem": "1+1?", "answer": ""}]
)
@pytest.mark.parametrize("script", ["grpo", "eval_math"])
def test_answers_are_needed_for_rewards(cli, typed, tmp_path, script, row):
    path = write_jsonl(tmp_path / "unlabeled.jsonl", [row])
    assert_refused(
        cli(script, *typed(script, **{DATA_FLAG[script]: path})), "needs a column answer, solution or reward_model"
    )


@pytest.mark.parametrize("script", TRAINERS)
def test_every_prompt_too_long(cli, typed, script):
    assert_refused(
        cli(script, *typed(script, max_prompt_tokens=3)), "--train-data", "longer than --max-prompt-tokens 3", "raise it"
    )


@pytest.mark.parametrize("script", TRAINERS)
def test_some_prompts_too_long_are_dropped_and_counted(cli, typed, script):
    code, out, _ = cli(script, *typed(script, max_prompt_tokens=7))
    assert code == 0 and "--train-data: 7 of 12 problems dropped, longer than --max-prompt-tokens 7" in out


@pytest.mark.parametrize("script", TRAINERS)
def test_evaluation_without_data(cli, typed, script):
    assert_refused(cli(script, *typed(script, eval_every=1)), "--eval-every needs --eval-data")


@pytest.mark.parametrize(
    "row",
    [
        {"problem": "99?", "response_ids": [1]},
        {"problem": "1+2?"},
        {"problem": "1+2?", "response_ids": []},
        {"problem": "1+2?", "response_ids": [1]},
        {"problem": "1+2?", "response_ids": [10**6], "truncated": False},
    ],
    ids=["another_problem", "no_ids", "empty", "no_truncated", "unknown_id"],
)
def test_rollouts_of_something_else(cli, typed, tmp_path, row):
    path = write_jsonl(tmp_path / "rollouts.jsonl", [row])
    assert_refused(cli("fkl_warmup", *typed("fkl_warmup", rollouts=path, rollouts_per_step=1)), "--rollouts")


# -------------------------------------------------------------------------------------------------------------- models
MODEL_FLAG = {"grpo": "model", "fkl_warmup": "teacher", "opd": "student", "eval_math": "model"}


@pytest.mark.parametrize("script", [*TRAINERS, "eval_math"])
def test_a_missing_model_folder(cli, typed, tmp_path, script):
    start = time.time()
    flag = MODEL_FLAG[script]
    assert_refused(cli(script, *typed(script, **{flag: tmp_path / "nothing"})), f"--{flag}", "Check the path")
    assert time.time() - start < 10


def break_checkpoint(folder, how):
    random_model().save_pretrained(folder)
    tokenizer = toy.make_tokenizer()
    if how == "no_chat_template":
        tokenizer.chat_template = None
    if how == "no_eos":
        tokenizer.eos_token = None
    if how != "no_tokenizer":
        tokenizer.save_pretrained(folder)
    if how == "no_weights":
        (folder / "model.safetensors").unlink()
    if how == "cut_weights":
        weights = (folder / "model.safetensors").read_bytes()
        (folder / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    if how == "empty":
        for path in folder.iterdir():
            path.unlink()


@pytest.mark.parametrize("how, pattern", [
    ("empty", "cannot load it"), ("no_weights", "cannot load it"), ("cut_weights", "cannot load it"),
    ("no_tokenizer", "has no tokenizer.json"), ("no_chat_template", "no chat template"), ("no_eos", "no eos_token"),
])  # fmt: skip
def test_an_incomplete_checkpoint(cli, typed, tmp_path, how, pattern):
    folder = tmp_path / "model"
    break_checkpoint(folder, how)
    assert_refused(cli("grpo", *typed("grpo", model=folder)), "--model", pattern)


def save_with_tokenizer(folder, tokenizer):
    random_model().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("script", ["fkl_warmup", "opd"])
def test_tokenizers_that_differ(cli, typed, tmp_path, script):
    swapped = toy.make_tokenizer().backend_tokenizer.to_str().replace('"7": 7', '"7": 8').replace('"8": 8', '"8": 7')
    swapped = swapped.replace('"7":7', '"7":8').replace('"8":8,"9"', '"8":7,"9"')
    other = toy.make_tokenizer()
    other.backend_tokenizer.model = type(other.backend_tokenizer).from_str(swapped).model
    assert other.convert_tokens_to_ids("7") == 8
    result = cli(script, *typed(script, teacher=save_with_tokenizer(tmp_path / "other", other)))
    assert_refused(result, "--teacher and --student map 2 tokens to different ids", "choose both from one model family")


@pytest.mark.parametrize("script", ["fkl_warmup", "opd"])
def test_turns_that_end_differently(cli, typed, tmp_path, script):
    """A base student and an instruct teacher: without the check, responses never end."""
    other = toy.make_tokenizer()
    other.eos_token = "<|unk|>"
    result = cli(script, *typed(script, student=save_with_tokenizer(tmp_path / "base", other)))
    assert_refused(result, r"--teacher ends a turn with '<\|im_end\|>' and --student with '<\|unk\|>'")


# ------------------------------------------------------------------------------------------------------- output folder
@pytest.mark.parametrize("script", TRAINERS)
def test_a_finished_run_is_not_overwritten(cli, typed, tmp_path, script):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "run.json").write_text(json.dumps({"finished": True}))
    assert_refused(cli(script, *typed(script)), "--out .*holds a finished run", "choose another folder or delete it")


@pytest.mark.parametrize("script", [*TRAINERS, "eval_math"])
def test_an_output_folder_that_cannot_be_written(cli, typed, tmp_path, script):
    (tmp_path / "file").write_text("")
    assert_refused(cli(script, *typed(script, out=tmp_path / "file" / "out")), "--out", "choose another folder")


# ---------------------------------------------------------------------------------------------------------- eval_math
def test_eval_needs_a_model_or_a_comparison(cli):
    assert_refused(cli("eval_math"), "--model: give a checkpoint to measure, or --compare A B")


def test_comparing_what_is_not_there(cli, tmp_path):
    assert_refused(cli("eval_math", "--compare", tmp_path / "a", tmp_path / "b"), "--compare .*no generations.jsonl")


# -------------------------------------------------------------------------------------- the command itself, end to end
def command(*parts, **environment):
    start = time.time()
    result = subprocess.run([sys.executable, *map(str, parts)], cwd=ROOT, capture_output=True, text=True, timeout=300,
                            env=os.environ | environment)  # fmt: skip
    return (result.returncode, result.stdout, result.stderr), time.time() - start


def test_the_command_exits_with_code_2_and_one_line(typed):
    result, seconds = command("grpo.py", *typed("grpo", group_size=1))
    assert_refused(result, "--group-size 1: a group of one has no baseline; use 2 or more")
    assert seconds < 60


@pytest.mark.parametrize("changes", [{"train_data": "nobody/nothing"}, {"teacher": "nobody/nothing"}], ids=["data", "model"])
def test_a_hub_id_without_network_ends_within_seconds(typed, tmp_path, changes):
    """Nobody listens on port 9. The hub's clients would retry for minutes, a warning at a time."""
    [flag] = changes
    no_network = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path)}
    result, seconds = command("opd.py", *typed("opd", **changes), **no_network)
    assert_refused(result, "--" + flag.replace("_", "-"), "nobody/nothing", "network")
    assert seconds < 40, "most of that is imports on a slow machine"


@pytest.mark.parametrize("script", [*TRAINERS, "eval_math"])
def test_a_sampler_that_cannot_work(cli, typed, monkeypatch, script):
    monkeypatch.setattr(common.importlib.util, "find_spec", lambda name: None)
    assert_refused(cli(script, *typed(script, sampler="vllm")), "--sampler vllm: vllm is not installed; pip install")
    monkeypatch.setattr(common.importlib.util, "find_spec", lambda name: "installed")
    vllm = {"sampler": "vllm"}
    assert_refused(cli(script, *typed(script, dtype="float64", **vllm)), "--dtype float64", "--sampler hf")
    for value in (0, 1.5):
        flags = typed(script, vllm_gpu_memory_utilization=value, **vllm)
        assert_refused(cli(script, *flags), "--vllm-gpu-memory-utilization")
    assert_refused(cli(script, *typed(script, vllm_tp=0, **vllm)), "--vllm-tp 0")
    assert_refused(
        cli(script, *typed(script, max_response_tokens=600, **vllm)), "--max-response-tokens 600", "512 positions"
    )
    if script != "eval_math":
        assert_refused(cli(script, *typed(script, vllm_tp=2, **vllm)), "--vllm-tp 2", "torchrun")
        monkeypatch.setenv("WORLD_SIZE", "3")
        assert_refused(cli(script, *typed(script, vllm_tp=2, **vllm)), "--vllm-tp 2", "here 3")


@pytest.mark.parametrize("script", ["grpo", "variants/opd_sampled"])
@pytest.mark.parametrize("cap", [0.5, -1])
def test_an_impossible_importance_cap(cli, typed, script, cap):
    assert_refused(cli(script, *typed(script, tis_cap=cap)), "--tis-cap")


def test_an_unknown_flag_is_refused_by_the_parser(cli):
    code, _, err = cli("opd", "--no-such-flag", "1")
    assert code == 2 and "no-such-flag" in err


def test_only_usage_errors_are_one_line(monkeypatch):
    """A bug must keep its traceback."""
    monkeypatch.setattr(sys, "argv", [str(ROOT / "grpo.py")])
    args_class = __import__("dataclasses").make_dataclass("Args", [])

    def main(args):
        raise ValueError("a bug")

    with pytest.raises(ValueError, match="a bug"):
        cli.run(main, args_class)
    assert torch.is_grad_enabled()
