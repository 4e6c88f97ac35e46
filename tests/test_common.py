"""Problems, prompts, micro-batches, run folders and checkpoints."""

import json
import os
import subprocess
import sys
import types
from dataclasses import replace

import pytest
import torch
from conftest import ROOT, load, random_model, read_jsonl, write_jsonl
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.import_utils import KERNELS_MIN_VERSION

import common
import toy
from infra import batches, dataset, models, run_folder
from infra.batches import micro_batches
from infra.cli import UsageError
from infra.dataset import Problem, load_problems, load_rows
from infra.prompts import render_prompt, render_prompts

GSM8K = {"question": "How many?", "answer": "Half of 2,000 is <<2000/2=1000>>1000.\n#### 1,000"}


# ------------------------------------------------------------------------------------------------- steps, learning rate
def rates(total_steps: int, **schedule) -> list[float]:
    """Learning rates of all steps."""
    flags = {"learning_rate": 2.0, "learning_rate_warmup_steps": 0, "learning_rate_decay": "none"} | schedule
    return [common.learning_rate(types.SimpleNamespace(**flags), step, total_steps) for step in range(1, total_steps + 1)]


def test_the_learning_rate_is_constant_unless_told_otherwise():
    assert rates(5) == [2.0] * 5


@pytest.mark.parametrize("decay, expected", [
    ("none", [0.5, 1.0, 1.5, 2.0, 2.0, 2.0, 2.0, 2.0]),
    ("linear", [0.5, 1.0, 1.5, 2.0, 2.0, 1.5, 1.0, 0.5]),
    ("cosine", [0.5, 1.0, 1.5, 2.0, 2.0, 1 + 0.5**0.5, 1.0, 1 - 0.5**0.5]),
])  # fmt: skip
def test_the_learning_rate_rises_in_a_line_and_falls_as_named(decay, expected):
    assert rates(8, learning_rate_warmup_steps=4, learning_rate_decay=decay) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("decay", ["none", "linear", "cosine"])
@pytest.mark.parametrize("warmup", [0, 1, 5, 9, 10, 12])
def test_the_learning_rate_is_0_at_no_step(decay, warmup):
    """Nor above the flag's, and it rises at no step behind the warmup; one as long as the run is all there is of it."""
    found = rates(10, learning_rate_warmup_steps=warmup, learning_rate_decay=decay)
    assert all(0 < rate <= 2.0 for rate in found)
    rising, falling = found[:warmup], found[warmup:]
    assert rising == sorted(rising) and falling == sorted(falling, reverse=True)
    assert warmup >= 10 or falling[0] == 2.0


@pytest.mark.parametrize("decay, expected", [("none", [2.0, 2.0, 2.0]), ("linear", [2.0, 1.0, 0.5]),
                                             ("cosine", [2.0, 1.0, 1 - 0.5**0.5])])  # fmt: skip
def test_the_learning_rate_falls_with_the_flops_where_they_end_the_run(decay, expected):
    """So a run of --max-flops decays as one of as many steps does, and not by its million of nominal ones."""
    flags = types.SimpleNamespace(learning_rate=2.0, learning_rate_warmup_steps=0, learning_rate_decay=decay)
    found = [common.learning_rate(flags, step, 10**6, spent) for step, spent in ((1, 0.0), (9, 0.5), (14, 0.75))]
    assert found == pytest.approx(expected, rel=1e-4)


def test_count_steps_wraps_the_last_one_around():
    flags = types.SimpleNamespace(learning_rate_warmup_steps=0, max_steps=None, epochs=3)
    assert [common.count_steps(flags, 10, per_step, "--prompts-per-step") for per_step in (1, 4, 5, 10)] == [30, 8, 6, 3]
    flags.max_steps = 2
    assert common.count_steps(flags, 10, 4, "--prompts-per-step") == 2


# ------------------------------------------------------------------------------------------------------------ problems
@pytest.mark.parametrize("row, text, answer", [
    ({"problem": "1+1?", "answer": "2"}, "1+1?", "2"),
    ({"problem": "1+1?", "answer": 2}, "1+1?", "2"),
    ({"problem": "1+1?", "answer": 0}, "1+1?", "0"),
    (GSM8K, "How many?", "1000"),
    ({"problem": "x", "solution": r"First \boxed{1}, then \boxed{\frac{1}{2}}."}, "x", r"\frac{1}{2}"),
    ({"prompt": "x", "reward_model": {"ground_truth": "7", "style": "rule"}}, "x", "7"),
    ({"problem": "the problem", "prompt": "another text", "answer": "1"}, "the problem", "1"),
    ({"problem": "x", "answer": "34", "solution": r"so \boxed{35}"}, "x", "34"),
])  # fmt: skip
def test_columns_are_recognised(tmp_path, row, text, answer):
    [problem] = load_problems(write_jsonl(tmp_path / "d.jsonl", [row]), "--train-data", True)
    assert problem == Problem(text, (), answer)


def test_chat_lists_keep_their_earlier_messages(tmp_path):
    """DAPO-Math-17k's layout, a one-message list, and one with a system prompt."""
    rows = [{"prompt": [{"role": "user", "content": "a"}], "reward_model": {"ground_truth": "1"}},
            {"prompt": [{"role": "system", "content": "be brief"}, {"role": "user", "content": "b"}],
             "reward_model": {"ground_truth": "2"}}]  # fmt: skip
    first, second = load_problems(write_jsonl(tmp_path / "d.jsonl", rows), "--train-data", True)
    assert first == Problem("a", (), "1")
    assert second == Problem("b", ({"role": "system", "content": "be brief"},), "2")


def test_duplicates_are_dropped_and_order_kept(tmp_path):
    rows = [{"problem": p, "answer": a} for p, a in [("b", "1"), ("a", "2"), ("b", "1"), ("c", "3"), ("a", "2")]]
    problems = load_problems(write_jsonl(tmp_path / "d.jsonl", rows), "--train-data", True)
    assert [p.text for p in problems] == ["b", "a", "c"]


def test_problems_without_answers_are_for_dense_stages_only(tmp_path, capsys):
    path = write_jsonl(
        tmp_path / "d.jsonl", [{"problem": "a"}, {"problem": "b", "answer": "2"}, {"problem": "c", "answer": None}]
    )
    assert [p.text for p in load_problems(path, "--train-data", False)] == ["a", "b", "c"]
    assert [p.text for p in load_problems(path, "--train-data", True)] == ["b"]
    assert "2 problems without an answer left out" in capsys.readouterr().out


def test_blank_lines_and_line_separators_inside_a_text(tmp_path):
    """U+2028 and U+0085 are line breaks to str.splitlines, but not to JSON lines."""
    path = tmp_path / "d.jsonl"
    rows = [{"problem": "one\u2028two", "answer": "1"}, {"problem": "three\x85four", "answer": "2"}]
    path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n\n  \n", encoding="utf-8")
    assert [p.text for p in load_problems(str(path), "--train-data", True)] == ["one\u2028two", "three\x85four"]


def test_parquet_and_json_files(tmp_path):
    pandas = pytest.importorskip("pandas")
    rows = [{"prompt": [{"role": "user", "content": "a"}], "reward_model": {"ground_truth": "1"}},
            {"prompt": [{"role": "user", "content": "b"}], "reward_model": {"ground_truth": "2"}}]  # fmt: skip
    pandas.DataFrame(rows).to_parquet(tmp_path / "d.parquet")
    (tmp_path / "d.json").write_text(json.dumps(rows))
    expected = [Problem("a", (), "1"), Problem("b", (), "2")]
    assert load_problems(str(tmp_path / "d.parquet"), "--train-data", True) == expected
    assert load_problems(str(tmp_path / "d.json"), "--train-data", True) == expected


@pytest.fixture
def hub(monkeypatch):
    """A stand-in for `datasets`, with the configs of three datasets; returns the calls of load_dataset."""
    calls = []
    configs = {"org/one": ["only"], "org/two": ["all", "en"], "org/many": ["default", "de"], "org/unclear": ["en", "de"]}

    def load_dataset(*args, **kwargs):
        calls.append((args, kwargs))
        return [{"problem": "x", "answer": "1"}]

    module = types.SimpleNamespace(load_dataset=load_dataset, get_dataset_config_names=lambda name: configs[name])
    module.config = types.SimpleNamespace(HF_HUB_OFFLINE=False)
    monkeypatch.setitem(sys.modules, "datasets", module)
    return calls


@pytest.mark.parametrize("spec, config, split", [
    ("org/one", "only", "train"), ("org/two", "all", "train"), ("org/many", "default", "train"),
    ("org/unclear:de", "de", "train"), ("org/unclear:en:test", "en", "test"), ("org/one:only:test[:5]", "only", "test[:5]"),
])  # fmt: skip
def test_hub_specs(hub, spec, config, split):
    assert load_rows(spec, "--train-data") == [{"problem": "x", "answer": "1"}]
    assert hub == [((spec.split(":")[0], config), {"split": split})]


def test_a_hub_dataset_with_several_configs_asks_for_one(hub):
    with pytest.raises(UsageError, match=r"--train-data org/unclear: choose a config.*one of en, de"):
        load_rows("org/unclear", "--train-data")


def test_problem_stream_is_one_permutation_after_another():
    stream = dataset.ProblemStream(7, seed=1)
    epochs = [stream.take(7) for _ in range(3)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs) and epochs[0] != epochs[1]
    again, other = dataset.ProblemStream(7, seed=1), dataset.ProblemStream(7, seed=2)
    assert again.take(7) == epochs[0] != other.take(7)


def test_problem_stream_continues_from_a_position_and_takes_any_number_at_once():
    whole, parts = dataset.ProblemStream(7, seed=1).take(40), dataset.ProblemStream(7, seed=1)
    assert parts.take(3) + parts.take(4) + parts.take(20) == whole[:27] and parts.position == 27
    resumed = dataset.ProblemStream(7, seed=1)
    resumed.position = 27
    assert resumed.take(13) == whole[27:]


@pytest.mark.parametrize("spec, name", [("data/test.jsonl", "test"), ("a/b.parquet", "b"), ("math500", "math500"),
                                        ("org/set:config:test", "org_set_config_test")])  # fmt: skip
def test_benchmark_names_are_folder_names(spec, name):
    assert dataset.benchmark_name(spec) == name


# ------------------------------------------------------------------------------------------------------------- prompts
class RecordingTokenizer:
    name_or_path, unk_token_id = "recording", None

    def apply_chat_template(self, messages, **options):
        self.messages, self.options = messages, options
        return "".join(m["content"] for m in messages)

    def __call__(self, text, add_special_tokens):
        return {"input_ids": [ord(character) for character in text]}


def test_the_instruction_follows_the_problem_once():
    tokenizer = RecordingTokenizer()
    for text, expected in [("1+1?", "1+1?\nBox it."), (r"Put it in \boxed{}.", r"Put it in \boxed{}.")]:
        render_prompt(tokenizer, Problem(text, (), None), "Box it.", False)
        assert tokenizer.messages == [{"role": "user", "content": expected}]
    render_prompt(tokenizer, Problem("1+1?", ({"role": "system", "content": "s"},), None), "", False)
    assert tokenizer.messages == [{"role": "system", "content": "s"}, {"role": "user", "content": "1+1?"}]


@pytest.mark.parametrize("thinking", [True, False])
def test_the_thinking_flag_reaches_the_template(thinking):
    tokenizer = RecordingTokenizer()
    render_prompt(tokenizer, Problem("1+1?", (), None), "", thinking)
    assert tokenizer.options["enable_thinking"] is thinking and tokenizer.options["add_generation_prompt"] is True


def test_a_prompt_ends_where_the_response_begins():
    ids = render_prompt(toy.make_tokenizer(), Problem("1+2?", (), None), "", False)
    assert ids == [toy.ID[t] for t in ("<|user|>", "1", "+", "2", "?", "<|assistant|>")]


def test_long_prompts_are_dropped_for_both_and_counted(capsys):
    short, long = toy.make_tokenizer(), toy.make_tokenizer()
    long.chat_template = "<|system|>777" + toy.CHAT_TEMPLATE
    problems = [Problem(text, (), None) for text in ("1?", "1+2?", "1+2*3?")]  # 4, 6 and 8 tokens; 4 more in the second
    args = common.RolloutArgs(instruction="", max_prompt_tokens=10)
    kept, [a, b] = render_prompts(args, problems, [short, long], [False, False])
    assert kept == problems[:2] and [len(p) for p in a] == [4, 6] and [len(p) for p in b] == [8, 10]
    assert "--train-data: 1 of 3 problems dropped, longer than --max-prompt-tokens 10" in capsys.readouterr().out
    with pytest.raises(
        UsageError, match=r"--train-data: all 3 prompts are longer than --max-prompt-tokens 7 \(shortest 8\)"
    ):
        render_prompts(replace(args, max_prompt_tokens=7), problems, [short, long], [False, False])


# ------------------------------------------------------------------------------------------------------- micro-batches
@pytest.mark.parametrize("budget", [1, 12, 13, 100, 10**9])
def test_micro_batches_hold_every_row_once_within_the_budget(budget):
    lengths = [3, 50, 7, 7, 1, 13, 12, 6, 6, 6]
    groups = micro_batches(lengths, budget)
    assert sorted(i for group in groups for i in group) == list(range(10))
    for group in groups:
        assert len(group) == 1 or len(group) * max(lengths[i] for i in group) <= budget
    order = [lengths[i] for group in groups for i in group]
    assert order == sorted(lengths, reverse=True), "similar lengths go together"
    assert (len(groups) == 1) == (budget >= 500)


def test_micro_batches_of_nothing():
    assert micro_batches([], 100) == []


@pytest.mark.parametrize("arch, tied", [("qwen3", True), ("llama", False)])
def test_response_hidden_predicts_the_response_tokens(arch, tied):
    model = random_model(arch, tied).double()
    prompts, responses = [[22, 1, 23], [22, 1, 10, 2, 16, 23]], [[3, 4, 20], [5]]
    with torch.no_grad():
        hidden, _, ids = batches.response_hidden(model, prompts, responses)
        logits = hidden @ model.get_output_embeddings().weight.T
        for row, (start, end) in enumerate([(0, 3), (3, 4)]):
            alone = model(input_ids=torch.tensor([prompts[row] + responses[row]])).logits[0, len(prompts[row]) - 1 : -1]
            assert torch.allclose(logits[start:end], alone, atol=1e-12)
    assert ids.tolist() == [3, 4, 20, 5]


# ---------------------------------------------------------------------------------------------------------- run folder
@pytest.mark.parametrize("script", ["grpo", "fkl_warmup", "opd"])
def test_a_run_folder_describes_itself(run_script, checkpoints, data, fake_grader, script):
    fake_grader(lambda answer, j: float(j % 2))
    models = (
        {"model": checkpoints.student} if script == "grpo" else {"teacher": checkpoints.wide, "student": checkpoints.student}
    )
    sizes = {"grpo": {"prompts_per_step": 4, "minibatch_prompts": 4, "group_size": 2}, "opd": {"prompts_per_step": 4},
             "fkl_warmup": {"rollouts_per_step": 4}}[script]  # fmt: skip
    run = run_script(script, checked=True, **models, **sizes, train_data=data, max_response_tokens=8, max_steps=2)
    files = {path.name for path in run.out.iterdir()}
    assert files >= {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja",
                     "generation_config.json", "metrics.jsonl", "run.json", f"{script}.py"}  # fmt: skip
    assert ("rollouts.jsonl" in files) == (script == "fkl_warmup")
    assert [row["step"] for row in run.metrics] == [1, 2]
    assert (run.out / f"{script}.py").read_text() == (ROOT / f"{script}.py").read_text()
    record = run.record
    assert set(record) == {
        "inputs",
        "steps",
        "finished",
        "command",
        "args",
        "preflight",
        "stopped",
        "git_revision",
        "packages",
        "hardware",
        "wall_time_s",
        "labels_used",
        "updates",
        "sampled_tokens",
        "flops",
    }
    assert record["stopped"] is None and (record["preflight"] is None) == (script == "grpo")
    assert record["finished"] is True and record["command"] == f"python {script}.py --as-typed"
    assert record["args"]["train_data"] == data and record["args"]["max_steps"] == 2 and record["args"]["seed"] == 1
    assert record["packages"]["torch"] == torch.__version__.split("+")[0] or record["packages"]["torch"] == torch.__version__
    assert record["wall_time_s"] > 0 and record["hardware"]["cpu_threads"] == torch.get_num_threads()
    assert run_folder.finished(run.out) == record
    tokenizer = AutoTokenizer.from_pretrained(run.out)
    assert tokenizer.chat_template == toy.CHAT_TEMPLATE and tokenizer.get_vocab() == toy.make_tokenizer().get_vocab()


def test_an_interrupted_run_is_not_finished_and_is_done_again(run_script, checkpoints, data, tmp_path, monkeypatch):
    args = {"teacher": checkpoints.wide, "student": checkpoints.student, "train_data": data, "prompts_per_step": 4,
            "max_response_tokens": 4, "max_steps": 2, "out": tmp_path / "run"}  # fmt: skip
    with monkeypatch.context() as patch:
        patch.setattr(run_folder, "save_model", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run_script("opd", **args)
    assert run_folder.finished(tmp_path / "run") is None
    assert json.loads((tmp_path / "run" / "run.json").read_text())["finished"] is False
    run = run_script("opd", **args)
    assert run_folder.finished(run.out) and len(run.metrics) == 2


@pytest.mark.parametrize("arch, tied", [("qwen3", True), ("qwen3", False), ("llama", True), ("llama", False)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_saved_checkpoint_loads_with_equal_weights(tmp_path, arch, tied, dtype):
    model = random_model(arch, tied).to(torch.float64 if dtype == torch.float64 else torch.float32)
    with torch.no_grad():
        for p in model.parameters():  # so that a stale copy of any of them would be seen
            p.add_(torch.randn_like(p))
    models.save_model(model, toy.make_tokenizer(), tmp_path, dtype)
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    state = loaded.state_dict()
    assert state.keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(state[name], tensor.to(dtype)), name
    assert (loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight) == tied
    assert loaded.generation_config.eos_token_id == toy.ID["<|im_end|>"]
    assert {p.dtype for p in model.parameters()} == {torch.float64 if dtype == torch.float64 else torch.float32}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_saved_config_names_the_dtype_of_the_weights(tmp_path, dtype):
    """Transformers and vLLM load a checkpoint in its config's dtype unless told otherwise."""
    models.save_model(random_model(), toy.make_tokenizer(), tmp_path, dtype)
    assert {p.dtype for p in load(tmp_path, "auto").parameters()} == {dtype}


def test_saving_keeps_the_model_trainable(tmp_path):
    model = random_model()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    models.save_model(model, toy.make_tokenizer(), tmp_path, torch.bfloat16)
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())


def test_the_last_steps_weights_are_saved(run_script, checkpoints, data):
    """The gradient recorded before step 2's update is taken at step 1's weights; the folder holds step 2's."""
    args = {"teacher": checkpoints.wide, "student": checkpoints.student, "train_data": data, "prompts_per_step": 4,
            "max_response_tokens": 4, "dtype": "float64", "learning_rate": 0.01}  # fmt: skip
    one, two = run_script("opd", **args, max_steps=1), run_script("opd", **args, max_steps=2)
    saved = load(one.out).state_dict()
    assert all(torch.equal(saved[name], p) for name, p in two.updates[1][0].items())


def test_metrics_are_one_object_a_step(run_script, checkpoints, data):
    run = run_script(
        "opd",
        teacher=checkpoints.wide,
        student=checkpoints.student,
        train_data=data,
        prompts_per_step=6,
        max_response_tokens=4,
        epochs=2,
    )
    rows = read_jsonl(run.out / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3, 4] and len({frozenset(row) for row in rows}) == 1


def test_optional_loggers_name_the_install_command(run_script, checkpoints, data, monkeypatch):
    for flag, module in (("tensorboard", "torch.utils.tensorboard"), ("wandb", "wandb")):
        monkeypatch.setitem(sys.modules, module, None)
        with pytest.raises(UsageError, match=f"--{flag} needs a package: pip install {flag}"):
            run_script(
                "opd",
                teacher=checkpoints.wide,
                student=checkpoints.student,
                train_data=data,
                prompts_per_step=4,
                **{flag: True},
            )


def test_hugging_faces_kernels_package_beside_ours_breaks_nothing(tmp_path):
    installed = tmp_path / f"kernels-{KERNELS_MIN_VERSION}.dist-info"
    installed.mkdir()
    (installed / "METADATA").write_text(f"Metadata-Version: 2.1\nName: kernels\nVersion: {KERNELS_MIN_VERSION}\n")
    code = "import common, transformers; assert not transformers.utils.is_kernels_available(); transformers.Qwen3ForCausalLM"
    env = {**os.environ, "PYTHONPATH": str(tmp_path)}
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
