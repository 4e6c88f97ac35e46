"""What a loader skips, what a path hides, what a checkpoint shadows, what a kill or a full disk leaves: each was silent, or
a traceback at the worst moment. docs/resuming.md has the table."""

import contextlib
import errno
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, SCRIPTS, FakeGrader, load, random_model, read_jsonl, write_jsonl
from safetensors.torch import load_file, save_file
from test_bad_input import assert_refused, typed  # noqa: F401
from test_parallel import torchrun

import infra.cli
import toy
from infra import checkpoint, digest, files, models, run_folder
from infra.cli import UsageError
from infra.sampler import vocabulary_size
from infra.sampler_hf import HFSampler

MODEL_FLAGS = [("grpo", "model"), ("fkl_warmup", "teacher"), ("fkl_warmup", "student"), ("opd", "teacher"),
               ("opd", "student"), ("eval_math", "model")]  # fmt: skip
TRAINERS = ("grpo", "fkl_warmup", "opd")


@pytest.fixture
def damaged(tmp_path):
    """`damaged(weights=f, config={...}, generation={...})`: a checkpoint, its tensors passed through f and its configs
    changed."""
    made = []

    def make(weights=None, config=(), generation=(), **model):
        folder = tmp_path / f"damaged{len(made)}"
        made.append(folder)
        random_model(**{"seed": 1} | model).save_pretrained(folder)
        toy.make_tokenizer().save_pretrained(folder)
        path = folder / "model.safetensors"
        if weights:
            save_file(weights(load_file(path)), path, metadata={"format": "pt"})
        for name, changes in (("config.json", dict(config)), ("generation_config.json", dict(generation))):
            (folder / name).write_text(json.dumps(json.loads((folder / name).read_text()) | changes))
        return folder

    return make


def read(folder, dtype=torch.float32):
    return models.load_model(str(folder), "--model", torch.device("cpu"), dtype, trainable=True)


# ------------------------------------------------------------------------------------------- A1: what a loader skips
def prefixed(prefix):
    return lambda weights: {prefix + name: tensor for name, tensor in weights.items()}


def without(name):
    return lambda weights: {key: tensor for key, tensor in weights.items() if key != name}


def holding(value, name="model.layers.1.mlp.up_proj.weight"):
    def change(weights):
        weights[name][3, 5] = value
        return weights

    return change


@pytest.mark.parametrize("script, flag", MODEL_FLAGS)
def test_weights_under_other_names_are_refused_by_every_script(cli, typed, damaged, script, flag):  # noqa: F811
    folder = damaged(prefixed("_orig_mod."))
    assert_refused(
        cli(script, *typed(script, **{flag: folder})),
        f"--{flag} {folder}: lacks 2. weights, the first lm_head.weight and has 2. that the model does not, the first "
        r"_orig_mod\.model\.embed_tokens\.weight; the prefix _orig_mod\. is left from torch\.compile",
    )


@pytest.mark.parametrize("prefix, source", models.PREFIXES.items())
def test_a_prefix_is_traced_to_what_leaves_it(damaged, prefix, source):
    with pytest.raises(UsageError, match=f"the prefix {prefix} is left from {source[:4]}"):
        read(damaged(prefixed(prefix)))


@pytest.mark.parametrize("weights, config, message", [
    (without("model.norm.weight"), {}, "lacks 1 weights, the first model.norm.weight; the weights and config.json do not"),
    (None, {"tie_word_embeddings": False}, "lacks 1 weights, the first lm_head.weight"),
    (None, {"num_hidden_layers": 1, "layer_types": ["full_attention"]},
     "has 11 that the model does not, the first model.layers.1.input_layernorm.weight"),
    (lambda w: w | {"model.layers.0.self_attn.q_proj.bias": torch.ones(32)}, {}, "has 1 that .*q_proj.bias"),
    (lambda w: w | {"model.norm.weight": torch.ones(31)}, {}, r"has model.norm.weight in shape \[31\], not \[32\]"),
    (None, {"intermediate_size": 48}, r"has model.layers.0.mlp.down_proj.weight in shape \[32, 64\], not \[32, 48\]"),
])  # fmt: skip
def test_a_weight_that_is_missing_left_over_or_of_another_shape_is_refused(damaged, weights, config, message):
    with pytest.raises(UsageError, match=message):
        read(damaged(weights, config))


def test_what_is_computed_anew_or_tied_may_be_there_or_not(damaged):
    buffer = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}
    read(damaged(lambda w: w | buffer))
    tied = read(damaged(lambda w: w | {"lm_head.weight": w["model.embed_tokens.weight"].clone()}))
    assert tied.config.tie_word_embeddings and tied.lm_head.weight is tied.model.embed_tokens.weight


@pytest.mark.parametrize("script, flag", MODEL_FLAGS)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused_by_every_script(cli, typed, damaged, script, flag, value):  # noqa: F811
    folder = damaged(holding(value))
    message = f"--{flag} {folder}: model.layers.1.mlp.up_proj.weight holds nan or inf"
    assert_refused(cli(script, *typed(script, **{flag: folder})), message)


@pytest.mark.parametrize("weights", [prefixed("module."), holding(float("nan"))])
def test_an_engine_that_reads_the_checkpoint_itself_is_given_no_damaged_one(
    cli, typed, damaged, monkeypatch, weights  # noqa: F811
):  # fmt: skip
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: "installed")
    result = cli("eval_math", *typed("eval_math", model=damaged(weights), sampler="vllm"))
    assert_refused(result, "--model .*(the prefix module. is left from DDP|holds nan or inf)")


@pytest.mark.slow
@pytest.mark.parametrize("weights, message", [
    (prefixed("_orig_mod."), "the prefix _orig_mod. is left from torch.compile"),
    (holding(float("nan")), "model.layers.1.mlp.up_proj.weight holds nan or inf"),
])  # fmt: skip
def test_ranks_refuse_what_one_process_refuses(typed, damaged, weights, message):  # noqa: F811
    ranked = torchrun(2, "grpo.py", *typed("grpo", model=damaged(weights)))
    assert ranked.returncode and ranked.stderr.count(message) == 1, ranked.stderr
    assert ranked.stderr.startswith("rank 0: error: --model ") and "rank 1:" not in ranked.stderr, "torchrun has its own say"


# --------------------------------------------------------------------------- A5, A6, B1: configs against the weights
def test_a_head_of_its_own_is_kept_whatever_the_config_says(run_script, damaged, data):
    def own(weights):
        return weights | {"lm_head.weight": 1.5 * weights["model.embed_tokens.weight"]}

    args = {"train_data": data, "prompts_per_step": 4, "max_response_tokens": 6, "max_steps": 2, "learning_rate": 1e-3}
    teacher = str(damaged(seed=2))
    runs = [run_script("opd", student=str(folder), teacher=teacher, **args)
            for folder in (damaged(own), damaged(own, {"tie_word_embeddings": False}))]  # fmt: skip
    said, meant = (load_file(run.out / "model.safetensors") for run in runs)
    assert "lm_head.weight" in said and all(torch.equal(said[name], meant[name]) for name in meant)
    assert not json.loads((runs[0].out / "config.json").read_text())["tie_word_embeddings"]
    load(runs[0].out)


@pytest.mark.slow
def test_ranks_keep_a_head_of_its_own_too(run_script, damaged, data, tmp_path):
    folder = damaged(lambda weights: weights | {"lm_head.weight": 1.5 * weights["model.embed_tokens.weight"]})
    args = {"student": str(folder), "teacher": str(damaged(seed=2)), "train_data": data, "prompts_per_step": 4,
            "max_response_tokens": 6, "max_steps": 2, "learning_rate": 1e-3, "instruction": ""}  # fmt: skip
    single = load_file(run_script("opd", **args).out / "model.safetensors")
    ranked = torchrun(2, "tests/parallel_ranks.py", json.dumps([["opd", args | {"out": str(tmp_path / "ranked")}]]))
    assert ranked.returncode == 0, ranked.stderr[-2000:]
    whole = load_file(tmp_path / "ranked" / "model.safetensors")
    assert whole.keys() == single.keys() and all(torch.allclose(whole[k], single[k], atol=1e-5) for k in single)


@pytest.mark.parametrize("noise", [{"attention_dropout": 0.1}, {"attention_dropout": 0.3, "layerdrop": 0.5}])
def test_dropout_is_set_to_0_and_said(run_script, damaged, data, capsys, fake_grader, noise):
    fake_grader(FakeGrader.rule)
    args = {"train_data": data, "prompts_per_step": 4, "minibatch_prompts": 2, "group_size": 2, "max_response_tokens": 6,
            "max_steps": 2, "learning_rate": 1e-3, "gradient_checkpointing": True}  # fmt: skip
    plain = load_file(run_script("grpo", model=str(damaged()), **args).out / "model.safetensors")
    folder = damaged(config=noise)
    noisy = run_script("grpo", model=str(folder), **args)
    for name, value in noise.items():
        assert (
            f"--model {folder}: config.json's {name} {value} is set to 0" in capsys.readouterr().out or name == "layerdrop"
        )
    weights = load_file(noisy.out / "model.safetensors")
    assert all(torch.equal(plain[name], weights[name]) for name in plain)
    assert noisy.metrics[-1]["losses/approx_kl"] < 0.01


@pytest.mark.parametrize("generation, kept", [
    ({"temperature": 0.6, "top_p": 0.95}, {"do_sample": True, "temperature": 0.6, "top_p": 0.95}),
    ({"temperature": 0.6, "early_stopping": True}, {}),
])  # fmt: skip
@pytest.mark.parametrize("script", TRAINERS)
def test_a_generation_config_that_could_not_be_saved_is_repaired_at_load(
    run_script, checkpoints, damaged, data, capsys, script, generation, kept
):
    flags = {"grpo": {"prompts_per_step": 2, "minibatch_prompts": 2, "group_size": 2}, "opd": {"prompts_per_step": 2}}
    flags = flags.get(script, {"rollouts_per_step": 2}) | {"train_data": data, "max_response_tokens": 4, "max_steps": 1}
    folder = str(damaged(generation=generation))
    flags |= {"model": folder} if script == "grpo" else {"student": folder, "teacher": checkpoints.wide}
    out = run_script(script, **flags).out
    saved = json.loads((out / "generation_config.json").read_text())
    assert saved["eos_token_id"] == toy.ID["<|im_end|>"] and kept.items() <= saved.items()
    assert "generation_config.json cannot be saved as it is" in capsys.readouterr().out


BREAKS = {
    "generation_config": lambda folder: (folder / "generation_config.json").write_text("{"),
    "generation_values": lambda folder: edit(folder / "generation_config.json", num_return_sequences=4),
    "config": lambda folder: (folder / "config.json").write_text("{"),
    "config_list": lambda folder: (folder / "config.json").write_text("[]"),
    "tokenizer": lambda folder: (folder / "tokenizer.json").write_text("{"),
    "tokenizer_model": lambda folder: (folder / "tokenizer.json").write_text('{"version": "1.0", "model": {"type": "BPE"}}'),
    "zeros": lambda folder: (folder / "model.safetensors").write_bytes(b"\0" * 100),
    "nothing": lambda folder: (folder / "model.safetensors").write_bytes(b""),
    "activation": lambda folder: edit(folder / "config.json", hidden_act="nothing"),
    "no_heads": lambda folder: edit(folder / "config.json", num_attention_heads=0),
    "text_for_a_number": lambda folder: edit(folder / "config.json", hidden_size="32"),
    "architecture": lambda folder: edit(folder / "config.json", model_type="nothing"),
    "negative": lambda folder: edit(folder / "config.json", vocab_size=-1),
}
BROKEN = [("grpo", how) for how in BREAKS]
BROKEN += [("opd", "tokenizer_model"), ("opd", "activation"), ("opd", "generation_values"),
           ("eval_math", "config_list"), ("eval_math", "zeros"), ("eval_math", "no_heads")]  # fmt: skip


@pytest.mark.parametrize("script, how", BROKEN)
def test_a_damaged_file_of_a_checkpoint_is_one_line(cli, typed, damaged, script, how):  # noqa: F811
    folder = damaged()
    BREAKS[how](folder)
    flag = "student" if script == "opd" else "model"
    assert_refused(cli(script, *typed(script, **{flag: folder})), f"--{flag} {folder}: ")


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_what_the_last_step_needs_is_tried_before_the_first(run_script, checkpoints, data, monkeypatch):
    def no(*args, **kwargs):
        raise ValueError("cannot be saved")

    monkeypatch.setattr(type(toy.make_tokenizer()), "save_pretrained", no)
    monkeypatch.setattr(HFSampler, "sample", no)
    with pytest.raises(UsageError, match="the trained model could not be saved .cannot be saved"):
        run_script("opd", student=checkpoints.student, teacher=checkpoints.wide, train_data=data, prompts_per_step=2)


@pytest.mark.parametrize("script", ["fkl_warmup", "opd"])
def test_the_preflight_tries_it_too(cli, typed, monkeypatch, script):  # noqa: F811
    monkeypatch.setattr(type(toy.make_tokenizer()), "save_pretrained", lambda *a, **k: [][0])
    assert_refused(cli(script, *typed(script), "--preflight-only"), "the trained model could not be saved")


def test_a_disk_without_room_for_the_weights_is_refused(run_script, checkpoints, data, monkeypatch, capsys):
    args = {"student": checkpoints.student, "teacher": checkpoints.wide, "train_data": data, "prompts_per_step": 2,
            "max_response_tokens": 4, "max_steps": 1}  # fmt: skip
    size = os.path.getsize(f"{checkpoints.student}/model.safetensors")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=size // 2))
    with pytest.raises(UsageError, match="--out .*GB free, and the weights at the end need .*make room"):
        run_script("opd", **args)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=3 * size))
    run_script("opd", **args)
    assert "warning: --out" in capsys.readouterr().out


# ------------------------------------------------------------------------------- A2: inputs known by what they hold
@pytest.fixture
def killed(run_script, checkpoints, data, tmp_path, monkeypatch, fake_grader):
    """`killed(script, **changes)`: the arguments of a run that was killed behind its checkpoint of step 2, of 4 steps."""
    fake_grader(FakeGrader.rule)

    def start(script, **changes):
        folders = {}
        for name in ("student", "wide"):
            folders[name] = shutil.copytree(getattr(checkpoints, name), tmp_path / name, dirs_exist_ok=True)
        args = {"grpo": {"model": folders["student"], "prompts_per_step": 4, "minibatch_prompts": 4, "group_size": 2},
                "fkl_warmup": {"teacher": folders["wide"], "student": folders["student"], "rollouts_per_step": 4},
                "opd": {"teacher": folders["wide"], "student": folders["student"], "prompts_per_step": 4}}  # fmt: skip
        args = args[script]
        args |= {"train_data": data, "out": str(tmp_path / "out"), "max_response_tokens": 6, "max_steps": 4, "save_every": 1,
                 "keep_last": 2, "learning_rate": 1e-3}  # fmt: skip
        args = {name: str(value) if isinstance(value, Path) else value for name, value in (args | changes).items()}
        log = run_folder.Run.log
        with monkeypatch.context() as patch:
            patch.setattr(run_folder.Run, "log", lambda run, step, *rest: log(run, step, *rest) if step < 3 else stop())
            with pytest.raises(KeyboardInterrupt):
                run_script(script, **args)
        return args | {"resume": True}

    return start


def stop(*_, **__):
    raise KeyboardInterrupt


def replace_problems(path, text="8+8?"):
    rows = read_jsonl(Path(path))
    write_jsonl(Path(path), [*rows[:3], rows[3] | {"problem": text}, *rows[4:]])


def replace_weights(folder):
    weights = load_file(Path(folder) / "model.safetensors")
    weights["model.norm.weight"][0] += 1
    save_file(weights, Path(folder) / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("script, flag", [
    ("grpo", "train_data"), ("grpo", "model"), ("grpo", "eval_data"), ("grpo", "label_split"), ("fkl_warmup", "train_data"),
    ("fkl_warmup", "teacher"), ("opd", "train_data"), ("opd", "teacher"), ("opd", "student"),
])  # fmt: skip
def test_an_input_that_holds_something_else_is_refused(killed, run_script, data, tmp_path, script, flag):
    more = {}
    if flag in ("eval_data", "label_split"):
        more = {flag: shutil.copy(data, tmp_path / "more.jsonl")} | ({"eval_every": 2} if flag == "eval_data" else {})
    args = killed(script, **more)
    assert json.loads((tmp_path / "out/run.json").read_text())["inputs"][flag] == digest.digest_of(args[flag])
    replace = replace_weights if Path(args[flag]).is_dir() else replace_problems
    replace(args[flag])
    name = flag.replace("_", "-")
    with pytest.raises(UsageError, match=f"--resume: --{name} {args[flag]} holds something else than when the run"):
        run_script(script, **args)


@pytest.mark.parametrize("script, flag", [("grpo", "train_data"), ("grpo", "model"), ("opd", "teacher")])
def test_an_input_that_moved_is_the_same(killed, run_script, tmp_path, script, flag):
    args = killed(script)
    shutil.move(args[flag], tmp_path / "elsewhere.jsonl")
    assert run_script(script, **args | {flag: str(tmp_path / "elsewhere.jsonl")}).record["finished"]


def test_other_problems_of_the_same_file_are_refused(killed, run_script):
    args = killed("opd")
    with pytest.raises(UsageError, match="--resume: --train-data .*its problems, or what --max-prompt-tokens"):
        run_script("opd", **args | {"max_prompt_tokens": 8})


@pytest.mark.parametrize("flag, value", [
    ("rollouts_per_prompt", 1), ("temperature", 0.5), ("max_response_tokens", 5), ("instruction", "Think."),
    ("dtype", "float64"), ("seed", 2),
])  # fmt: skip
def test_rollouts_that_other_flags_made_are_not_gone_on_with(
    run_script, checkpoints, data, tmp_path, monkeypatch, flag, value
):
    args = {"teacher": checkpoints.wide, "student": checkpoints.student, "train_data": data, "rollouts_per_prompt": 2,
            "rollouts_per_step": 4, "max_response_tokens": 6, "max_steps": 2, "out": str(tmp_path / "out")}  # fmt: skip
    monkeypatch.setattr(SCRIPTS["fkl_warmup"], "PROBLEMS_PER_PART", 4)
    sample, calls = HFSampler.sample, []

    def twice(self, *rest, **kw):
        calls.append(1)
        return sample(self, *rest, **kw) if len(calls) < 3 else stop()

    with monkeypatch.context() as patch:
        patch.setattr(HFSampler, "sample", twice)
        with pytest.raises(KeyboardInterrupt):
            run_script("fkl_warmup", **args)
    aside = tmp_path / "out/rollouts.partial.jsonl"
    assert len(read_jsonl(aside)) == 16
    name = flag.replace("_", "-")
    with pytest.raises(UsageError, match=f"--resume: --{name} was .*, now {value}: repeat the flags"):
        run_script("fkl_warmup", **args | {flag: value, "resume": True})
    with aside.open("a") as file:
        file.write('{"problem": "torn')
    whole = run_script("fkl_warmup", **args | {"out": str(tmp_path / "whole")})
    resumed = run_script("fkl_warmup", **args | {"resume": True})
    assert (resumed.out / "rollouts.jsonl").read_text() == (whole.out / "rollouts.jsonl").read_text()


def test_a_digest_is_of_contents_not_of_times_or_names(tmp_path, damaged):
    folder = damaged()
    first = digest.digest_of(folder)
    copy = shutil.copytree(folder, tmp_path / "copy", copy_function=shutil.copy)
    (copy / "run.json").write_text("{}")  # what a run writes beside its weights
    assert digest.digest_of(copy) == first and first is not None
    edit(copy / "config.json", rms_norm_eps=1e-5)
    assert digest.digest_of(copy) != first
    assert digest.digest_of("nobody/nothing") is None and digest.digest_of("") is None


def test_a_large_file_is_known_by_pieces_from_end_to_end(tmp_path, monkeypatch):
    monkeypatch.setattr(digest, "WHOLE", 1000)
    monkeypatch.setattr(digest, "PIECE", 10)
    path, found = tmp_path / "model.safetensors", set()
    contents = bytearray(os.urandom(64 * 50))
    for at in (None, 0, 5, -1, 64 * 25 - 25):  # the last of them lies in a piece
        changed = bytearray(contents)
        if at is not None:
            start = at if at != 64 * 25 - 25 else (len(contents) - 10) * 31 // 63
            changed[start] ^= 1
        path.write_bytes(changed)
        found.add(digest.digest_of(tmp_path))
    path.write_bytes(contents + b"x")
    assert len(found | {digest.digest_of(tmp_path)}) == 6


# ------------------------------------------------------------------------------- A3: flags over what is restored
@pytest.mark.parametrize("script", TRAINERS)
@pytest.mark.parametrize("flag, key, value", [("learning_rate", "lr", 1e-9), ("weight_decay", "weight_decay", 0.0)])
def test_a_flag_counts_over_the_checkpoint(killed, run_script, monkeypatch, script, flag, key, value):
    args, seen, step = killed(script), [], torch.optim.AdamW.step

    def watched(optimizer, *rest, **kwargs):
        seen.append(float(optimizer.param_groups[0][key]))
        return step(optimizer, *rest, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", watched)
    run_script(script, **args | {flag: value})
    assert len(seen) == 3 and set(seen[1:]) == {value}, "the first is torch's own, to have a state to restore into"


def test_every_setting_of_the_optimizer_is_the_command_lines(tmp_path):
    settings = {"lr": 1e-3, "weight_decay": 0.1, "betas": (0.8, 0.9), "eps": 1e-6, "amsgrad": False, "maximize": False}
    model = random_model()
    for own in ({}, settings):
        optimizer = torch.optim.AdamW(model.parameters(), **own)
        before = {key: optimizer.param_groups[0][key] for key in settings}
        if own:
            checkpoint.restore(checkpoint.latest(tmp_path), model, optimizer)
            assert {key: optimizer.param_groups[0][key] for key in settings} == before == settings
            assert optimizer.state[model.lm_head.weight]["step"] == 1
        else:
            model(torch.tensor([[1, 2, 3]])).logits.sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            checkpoint.save(tmp_path, model, optimizer, {"step": 1}, 1)


def test_labels_outside_a_bound_that_is_new_on_resume_are_refused(killed, run_script, tmp_path):
    args = killed("grpo")
    split = write_jsonl(tmp_path / "split.jsonl", [{"problem": "77?", "answer": "7"}])
    with pytest.raises(UsageError, match="--label-split .*the run has consulted labels outside of it already"):
        run_script("grpo", **args | {"label_split": split})


# ------------------------------------------------------------------------------------------------ A9: ids with holes
@pytest.fixture
def holes(tmp_path):
    """A checkpoint whose special ids lie 6 above where they would follow the others."""
    tokenizer = toy.make_tokenizer()
    special = sorted(tokenizer.all_special_ids + [i for i in tokenizer.added_tokens_decoder])
    state, text = json.loads(tokenizer.backend_tokenizer.to_str()), {}
    moved = {i: i + 6 + len(toy.ID) for i in special}
    state["model"]["vocab"] = {token: moved.get(i, i) for token, i in state["model"]["vocab"].items()}
    for token in state["added_tokens"]:
        token["id"] = moved[token["id"]]
    folder = tmp_path / "holes"
    text = json.dumps(state)
    size = max(moved.values()) + 1
    model = random_model(vocab_size=size, eos_token_id=moved[toy.ID["<|im_end|>"]], pad_token_id=moved[toy.ID["<|pad|>"]])
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "tokenizer.json").write_text(text)
    return folder, moved[toy.ID["<|im_end|>"]]


def test_an_id_above_the_count_of_tokens_is_in_the_vocabulary(holes, run_script, data, tmp_path):
    folder, eos = holes
    tokenizer = models.load_tokenizer(str(folder), "--model")
    assert tokenizer.eos_token_id == eos >= len(tokenizer) and vocabulary_size(tokenizer) > eos
    model = read(folder)
    with torch.no_grad():
        model.model.embed_tokens.weight[eos] *= 3
    responses = HFSampler(model, tokenizer, torch.float32, max_response_tokens=30).sample([[1, 2, 3]] * 20, 2, (1,))
    assert any(r.ids and r.ids[-1] == eos and not r.truncated and not r.out_of_vocab for r in responses)
    rollouts = write_jsonl(
        tmp_path / "rollouts.jsonl",
        [{"problem": row["problem"], "response_ids": [1, eos], "truncated": False} for row in read_jsonl(Path(data))],
    )
    run = run_script("fkl_warmup", teacher=str(folder), student=str(folder), rollouts=rollouts, train_data=data,
                     rollouts_per_step=4, max_steps=1)  # fmt: skip
    assert run.record["finished"]


# --------------------------------------------------------------------------------- B2: files that are read again
@pytest.mark.parametrize("torn", ["", "{", '{"finished": fal'])
@pytest.mark.parametrize("script", TRAINERS)
def test_a_torn_record_is_taken_from_the_checkpoint(killed, run_script, capsys, script, torn):
    args = killed(script)
    record = Path(args["out"]) / "run.json"
    record.write_text(torn)
    with pytest.raises(UsageError, match="--seed was 1, now 2"):
        run_script(script, **args | {"seed": 2})
    assert run_script(script, **args).record["finished"] and "run.json cannot be read: taken from" in capsys.readouterr().out


def test_torn_rows_for_human_eyes_are_cut_and_said(killed, run_script, capsys):
    args = killed("opd", sample_every=1)
    out = Path(args["out"])
    for name in ("metrics.jsonl", "samples.jsonl"):
        with (out / name).open("a") as file:
            file.write('{"step": 2, "los')
    run = run_script("opd", **args)
    said = capsys.readouterr().out
    assert [row["step"] for row in run.metrics] == [1, 2, 3, 4]
    assert sorted({row["step"] for row in read_jsonl(out / "samples.jsonl")}) == [1, 2, 3, 4]
    assert all(f"{out / name}: 1 torn rows left out" in said for name in ("metrics.jsonl", "samples.jsonl"))


@pytest.mark.parametrize("moment", ["write_bytes", "replace"])
def test_a_kill_or_a_full_disk_while_a_file_is_written_leaves_the_old_one(tmp_path, monkeypatch, moment):
    path = tmp_path / "run.json"
    files.write_aside(path, "old")

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(*((Path, "write_bytes") if moment == "write_bytes" else (os, "replace")), full)
    with pytest.raises(OSError):
        files.write_aside(path, "new")
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["run.json"]


def test_every_file_that_is_read_again_is_written_aside():
    """Where a file of ours is written in place, it is for human eyes, or its folder is renamed when it is whole."""
    in_place = {"checkpoint.py": 1, "report.py": 2, "pilot.py": 1}
    for path in [*ROOT.glob("*.py"), *ROOT.glob("infra/*.py")]:
        assert path.read_text().count(".write_text(") <= in_place.get(path.name, 0), path


# ------------------------------------------------------------------------------------------------- B3: a full disk
@contextlib.contextmanager
def small_disk(folder: Path, size: int):
    folder.mkdir(exist_ok=True)
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], capture_output=True)
    if mounted.returncode:
        pytest.skip("needs the permission to mount a tmpfs")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


def assert_stopped(result, *patterns):
    code, _, err = result
    assert code == 3 and "Traceback" not in err and err.rstrip().splitlines()[-1].startswith("error: "), (code, err)
    assert err.count("error: ") == 1 and "No space left on device" in err, err
    for pattern in patterns:
        assert pattern in err, err


@pytest.mark.parametrize("script, room", [("opd", 1), ("opd", 40), ("opd", 90), ("opd", 200), ("opd", 400), ("opd", 600),
                                          ("grpo", 90), ("grpo", 500), ("fkl_warmup", 60), ("fkl_warmup", 300)])  # fmt: skip
def test_a_disk_that_fills_up_is_one_line_whatever_is_being_written(cli, typed, tmp_path, script, room):  # noqa: F811
    """Room in KB above the weights: from the copy of the script to the checkpoints, samples and the final save."""
    with small_disk(tmp_path / "disk", (40 + room) * 1024) as disk:
        flags = typed(script, out=disk / "out", max_steps=3, save_every=1, sample_every=1)
        code, out, err = cli(script, *flags)
        if code == 2:
            assert "GB free" in err or "cannot write there" in err
        elif code:
            assert code == 3 and err.count("error: ") == 1, (code, err)
            assert "GB free there" in err and ("No space left" in err or "could not be written" in err), err
        assert "Traceback" not in err and "Exception ignored" not in err and not list(disk.glob("out/*.partial"))


WRITES = {"run.json": "write_aside", "labels.json": "write_aside", "metrics.jsonl": "append", "samples.jsonl": "write_aside"}


@pytest.mark.parametrize("name", WRITES)
def test_what_is_whole_is_named(cli, typed, tmp_path, monkeypatch, name):  # noqa: F811
    real = getattr(files, WRITES[name])

    def full(path, content):
        if Path(path).name == name and list(tmp_path.glob("out/checkpoints/step_*[0-9]")):
            raise OSError(errno.ENOSPC, "No space left on device")
        real(path, content)

    for module in ("infra.run_folder", "infra.samples_page"):
        if hasattr(sys.modules[module], WRITES[name]):
            monkeypatch.setattr(sys.modules[module], WRITES[name], full)
    flags = typed("opd", max_steps=4, save_every=1, sample_every=1)
    assert_stopped(cli("opd", *flags), f"{tmp_path}/out/checkpoints/step_00000", "is whole: make room", "--resume")
    monkeypatch.undo()


def test_a_final_save_without_room_leaves_no_half_of_it(cli, typed, tmp_path, monkeypatch):  # noqa: F811
    write = models._write

    def full(model, tokenizer, folder, state, dtype):
        write(model, tokenizer, folder, state, dtype)
        if "trial" not in state:
            (folder / "model.safetensors").write_bytes(b"half")
            raise ValueError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(models, "_write", full)
    result = cli("opd", *typed("opd", max_steps=3, save_every=1))
    assert_stopped(result, "checkpoints/step_000002 is whole")
    assert not list(tmp_path.glob("out/model*"))


def test_rollouts_without_room_are_gone_on_with(cli, typed, tmp_path, monkeypatch):  # noqa: F811
    class Full:
        def __init__(self, path, lines):
            self.file = open(path, "w")

        def writelines(self, lines):
            raise OSError(errno.ENOSPC, "No space left on device")

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.file.close()

    monkeypatch.setattr(run_folder, "rank_zero_file", Full)
    assert_stopped(cli("fkl_warmup", *typed("fkl_warmup")), f"--out {tmp_path}/out")


@pytest.mark.parametrize("cause", [OSError(errno.EDQUOT, "x"), ValueError("I/O error: No space (os error 28)")])
def test_a_full_disk_is_known_through_what_a_library_makes_of_it(monkeypatch, capfd, tmp_path, cause):
    def full(args):
        raise RuntimeError("a library's") from cause

    full.__module__ = toy.__name__
    monkeypatch.setattr(sys, "argv", ["toy.py", "--out", str(tmp_path)])
    with pytest.raises(SystemExit) as stopped:
        infra.cli.run(full, toy.Args)
    err = capfd.readouterr().err
    assert stopped.value.code == 3 and err.startswith(f"error: --out {tmp_path}: ") and err.count("\n") == 1
    assert "No space left on device" in err or "Disk quota exceeded" in err


@pytest.mark.slow
@pytest.mark.parametrize("size", [20, 200])  # KB: its problems, its models
def test_toy_without_room_is_one_line(tmp_path, size):
    with small_disk(tmp_path / "disk", size * 1024) as disk:
        command = [sys.executable, ROOT / "toy.py", "--out", disk, "--teacher-steps", "1", "--student-steps", "1"]
        run = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert_stopped((run.returncode, run.stdout, run.stderr), f"--out {disk}: No space left on device (")


# ------------------------------------------------------------------------------------ B4, B7: checkpoints on the disk
def cut(folder):
    [path] = folder.glob("*.distcp")
    path.write_bytes(path.read_bytes()[:-1000])


@pytest.mark.parametrize("damage", [
    cut, lambda folder: (folder / ".metadata").unlink(), lambda folder: (folder / "state.json").unlink(),
    lambda folder: (folder / "state.json").write_text("{"), lambda folder: [p.unlink() for p in folder.glob("*.distcp")],
])  # fmt: skip
def test_a_checkpoint_copied_half_gives_way_to_the_whole_one_before_it(killed, run_script, capsys, damage):
    args = killed("opd")
    whole = run_script("opd", **args | {"out": f"{args['out']}_whole", "resume": False})
    damage(Path(args["out"]) / "checkpoints/step_000002")
    resumed = run_script("opd", **args)
    said = capsys.readouterr().out
    assert "step_000002 is not whole (" in said and "the newest whole one is" in said and "resumed from" in said
    weights = [load_file(run.out / "model.safetensors") for run in (whole, resumed)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert [row["step"] for row in resumed.metrics] == [1, 2, 3, 4]


def test_a_damaged_checkpoint_alone_is_one_line(killed, run_script):
    args = killed("opd", keep_last=1)
    cut(Path(args["out"]) / "checkpoints/step_000002")
    with pytest.raises(UsageError, match="step_000002 is not whole .*distcp is missing or cut.; copy it again"):
        run_script("opd", **args)


def test_a_checkpoint_of_the_right_size_that_cannot_be_read_is_one_line(killed, run_script):
    args = killed("opd")
    [path] = Path(args["out"]).glob("checkpoints/step_000002/*.distcp")
    path.write_bytes(b"\0" * path.stat().st_size)
    with pytest.raises(
        infra.cli.RunStopped, match="step_000002: cannot be read .*delete it: --resume then goes on from .*1"
    ):
        run_script("opd", **args)
    shutil.rmtree(path.parent)
    assert run_script("opd", **args).record["finished"]


def test_the_newest_checkpoint_is_that_of_the_largest_number(tmp_path):
    model = random_model()
    optimizer = torch.optim.AdamW(model.parameters())
    for step in (999980, 1000000, 1000020):
        checkpoint.save(tmp_path, model, optimizer, {"step": step}, keep_last=2)
    assert [checkpoint.step(one) for one in checkpoint.whole(tmp_path)] == [1000000, 1000020]
    assert checkpoint.latest(tmp_path).name == "step_1000020"


# --------------------------------------------------------------------------------------- B5, B6, B8: around the run
def test_a_side_tool_in_trouble_is_null(monkeypatch, tmp_path):
    for script in ("exit 1", "printf '\\377\\376'", "kill -9 $$"):
        (tmp_path / "git").write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / "git").chmod(0o755)
        monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
        assert run_folder.git_revision() is None
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: (_ for _ in ()).throw(subprocess.TimeoutExpired("git", 5)))
    assert run_folder.git_revision() is None


def test_the_copy_of_a_read_only_script_can_be_written_again(run_script, checkpoints, data, tmp_path, monkeypatch):
    args = {"student": checkpoints.student, "teacher": checkpoints.wide, "train_data": data, "prompts_per_step": 2,
            "max_response_tokens": 4, "max_steps": 1}  # fmt: skip
    out = tmp_path / "out"
    out.mkdir()
    (out / "opd.py").write_text("old")
    (out / "opd.py").chmod(0o444)
    run_script("opd", out=str(out), **args)
    assert (out / "opd.py").read_text() == (ROOT / "opd.py").read_text() and os.access(out / "opd.py", os.W_OK)
    assert (out / "opd.py").stat().st_mode & 0o200


def test_the_scripts_own_folder_can_be_the_output(cli, typed, tmp_path, monkeypatch):  # noqa: F811
    install = tmp_path / "install"
    install.mkdir()
    shutil.copy(ROOT / "opd.py", install)
    monkeypatch.chdir(install)
    run = subprocess.run([sys.executable, "opd.py", *typed("opd", out=".")], capture_output=True, text=True,
                         env=os.environ | {"PYTHONPATH": str(ROOT)}, timeout=120)  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert (install / "opd.py").read_text() == (ROOT / "opd.py").read_text() and (install / "run.json").exists()


@pytest.mark.parametrize("script", ["grpo", "eval_math"])
def test_a_base_checkpoint_is_warned_of_by_scripts_of_one_model(cli, typed, damaged, script):  # noqa: F811
    folder = damaged(generation={"eos_token_id": toy.ID["<|unk|>"]})
    tokenizer = toy.make_tokenizer()
    tokenizer.eos_token = "<|unk|>"
    tokenizer.save_pretrained(folder)
    code, out, err = cli(script, *typed(script, model=folder))
    assert code == 0, err
    assert f"preflight warning, end_of_turn: --model {folder} stops at '<|unk|>' while its chat template ends a turn" in out


@pytest.mark.parametrize("script", TRAINERS)
def test_more_steps_of_a_finished_run_are_refused_with_a_way_out(run_script, killed, script):
    args = killed(script)
    assert run_script(script, **args).record["steps"] == 4
    with pytest.raises(UsageError, match="is finished, with 4 steps, and now 9 are asked for.*start a new run"):
        run_script(script, **args | {"max_steps": 9})
    with pytest.raises(SystemExit) as stopped:
        run_script(script, **args)
    assert stopped.value.code == 0


def test_fewer_steps_than_the_checkpoint_has_are_refused(run_script, killed):
    args = killed("opd")
    with pytest.raises(UsageError, match="step_000002 is beyond the 1 steps asked for; raise --max-steps"):
        run_script("opd", **args | {"max_steps": 1})


@pytest.mark.parametrize("flags", [["--help"], []])
def test_a_reader_that_leaves_ends_the_command_without_a_word(typed, flags):  # noqa: F811
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, ROOT / "eval_math.py", *(flags or typed("eval_math"))]
    run = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True, timeout=120)
    os.close(write)
    assert run.returncode == 141 and "Traceback" not in run.stderr and "BrokenPipe" not in run.stderr, run.stderr


def test_another_broken_pipe_keeps_its_traceback(monkeypatch):
    with pytest.raises(BrokenPipeError), infra.cli.quiet_without_reader():
        raise BrokenPipeError
