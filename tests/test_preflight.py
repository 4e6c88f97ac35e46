"""A teacher and a student that do not fit are refused by name before training; --force goes on and is recorded."""

import json

import pytest
from conftest import load, random_model, write_jsonl
from test_bad_input import assert_refused
from transformers import GenerationConfig

import fkl_warmup
import opd
import toy
from infra import cli, dataset, models, preflight

THINKING_TEMPLATE = toy.CHAT_TEMPLATE.replace(
    "{{ '<|assistant|>' }}", "{{ '<|assistant|>' }}{% if enable_thinking %}{{ '<think>' }}{% endif %}"
)


def checkpoint(folder, tokenizer=None, vocab_size=24, stops=None, seed=5, **config):
    """A checkpoint folder; `stops` are the ids of generation_config.json."""
    model = random_model(vocab_size=vocab_size, seed=seed, **config)
    if stops is not None:
        model.generation_config = GenerationConfig(eos_token_id=stops, pad_token_id=toy.ID["<|pad|>"])
    model.save_pretrained(folder)
    (tokenizer or toy.make_tokenizer()).save_pretrained(folder)
    return folder


def edited_tokenizer(folder, edit):
    """The toy's tokenizer, saved with another tokenizer.json: edit(its dict) in place."""
    from transformers import AutoTokenizer

    folder.mkdir()
    toy.make_tokenizer().save_pretrained(folder)
    path = folder / "tokenizer.json"
    contents = json.loads(path.read_text())
    edit(contents)
    path.write_text(json.dumps(contents))
    return AutoTokenizer.from_pretrained(folder)


def swap_ids(contents, a, b):
    vocab = contents["model"]["vocab"]
    vocab[a], vocab[b] = vocab[b], vocab[a]
    for token in contents["added_tokens"]:
        token["id"] = vocab[token["content"]]


def other_eos(folder):
    tokenizer = toy.make_tokenizer()
    tokenizer.eos_token = "<|unk|>"
    return checkpoint(folder, tokenizer)


def other_stop_id(folder):
    return checkpoint(folder, stops=[toy.ID["<|im_end|>"], toy.ID["7"]])


def base_model(folder):
    """As Qwen's: the same chat template, but everything else says <|endoftext|>, here <|unk|>."""
    tokenizer = toy.make_tokenizer()
    tokenizer.eos_token = "<|unk|>"
    return checkpoint(folder, tokenizer, stops=toy.ID["<|unk|>"])


def swapped_special_tokens(folder):
    return checkpoint(folder, edited_tokenizer(folder, lambda c: swap_ids(c, "<|system|>", "<|user|>")))


def swapped_digits(folder):
    return checkpoint(folder, edited_tokenizer(folder, lambda c: swap_ids(c, "7", "8")))


def further_tokens(folder):
    tokenizer = toy.make_tokenizer()
    tokenizer.add_tokens(["seven"])
    return checkpoint(folder, tokenizer, vocab_size=32)


def other_normalizer(folder):
    """The same vocabulary: only the text on its way there differs."""

    def edit(contents):
        contents["normalizer"] = {"type": "Replace", "pattern": {"String": "1"}, "content": "2"}

    return checkpoint(folder, edited_tokenizer(folder, edit))


def no_template(folder):
    tokenizer = toy.make_tokenizer()
    tokenizer.chat_template = None
    return checkpoint(folder, tokenizer)


def other_turn_end(folder):
    tokenizer = toy.make_tokenizer()
    tokenizer.chat_template = toy.CHAT_TEMPLATE.replace("{{ '<|im_end|>' }}", "{{ '<|pad|>' }}")
    return checkpoint(folder, tokenizer, stops=[toy.ID["<|im_end|>"], toy.ID["<|pad|>"]])


def too_few_embeddings(folder):
    return checkpoint(folder, vocab_size=len(toy.ID) - 2, pad_token_id=None)


def always_thinks(folder):
    tokenizer = toy.make_tokenizer()
    tokenizer.chat_template = toy.CHAT_TEMPLATE.replace("{{ '<|assistant|>' }}", "{{ '<|assistant|><think>' }}")
    return checkpoint(folder, tokenizer)


MISMATCHES = {  # student: (name of the check, what the message says)
    other_eos: (
        "eos",
        r"--teacher ends a turn with '<\|im_end\|>' and --student with '<\|unk\|>' or '<\|im_end\|>'.*eos_token",
    ),
    other_stop_id: ("eos", r"--student with '7' or '<\|im_end\|>'.*generation_config.json"),
    base_model: ("base_against_instruct", r"--student .* looks like a base checkpoint.*use the instruct checkpoint"),
    swapped_special_tokens: ("special_token", r"'<\|system\|>' is id 21 for --teacher and 22 for --student"),
    swapped_digits: ("vocabulary", r"map 2 tokens to different ids \(for example '7'\).*one model family"),
    further_tokens: ("vocabulary", r"1 tokens that the other lacks \(for example 'seven'\)"),
    other_normalizer: ("probe_text", "--teacher and --student split .* into different ids.*same tokenizer.json"),
    no_template: (None, "--student .*no chat template; use an instruct checkpoint"),
    other_turn_end: ("eos", r"--student with '<\|pad\|>' or '<\|im_end\|>'"),
    too_few_embeddings: ("vocabulary_size", "ids up to 23, its model only 22 embeddings"),
    always_thinks: ("thinking", "thinking is on for one of the two.*--thinking and --teacher-thinking or neither"),
}


@pytest.fixture
def typed(checkpoints, data, tmp_path):
    """`typed(student=, teacher=, *flags)`: flags of a distillation that fits, but for what is changed."""

    def flags(*more, teacher=checkpoints.wide, student=checkpoints.student):
        fixed = ["--train-data", data, "--instruction", "", "--max-response-tokens", "4", "--max-steps", "1"]
        return ["--teacher", str(teacher), "--student", str(student), *fixed, "--out", str(tmp_path / "out"), *more]

    return flags


STEP = {"opd": ("--prompts-per-step", "4"), "fkl_warmup": ("--rollouts-per-step", "4")}


@pytest.mark.parametrize("mismatch", MISMATCHES, ids=lambda f: f.__name__)
def test_a_mismatch_is_refused_by_name_before_any_weights_are_read(cli, typed, tmp_path, monkeypatch, mismatch):
    name, message = MISMATCHES[mismatch]
    monkeypatch.setattr(models, "load_model", lambda *_, **__: pytest.fail("weights were read"))
    result = cli("opd", *typed("--preflight-only", *STEP["opd"], student=mismatch(tmp_path / "student")))
    assert_refused(result, message, *([f"error: preflight, {name}: "] if name else []))
    assert not (tmp_path / "out").exists()


def test_templates_that_end_a_turn_differently(cli, typed, tmp_path):
    """Both models stop at both ids, so only what their templates write is different."""
    stops = [toy.ID["<|im_end|>"], toy.ID["<|pad|>"]]
    result = cli("opd", *typed(*STEP["opd"], teacher=checkpoint(tmp_path / "teacher", stops=stops),
                               student=other_turn_end(tmp_path / "student")))  # fmt: skip
    assert_refused(result, r"preflight, chat_template: .*--teacher ends a turn with '<\|im_end\|>', that of --student")


def test_the_teacher_may_be_the_one_that_is_off(cli, typed, tmp_path):
    result = cli("fkl_warmup", *typed(*STEP["fkl_warmup"], teacher=base_model(tmp_path / "teacher")))
    assert_refused(result, "preflight, base_against_instruct: --teacher .* looks like a base checkpoint")


@pytest.mark.parametrize("flag", ["--thinking", "--teacher-thinking"])
def test_thinking_for_one_of_the_two(cli, typed, tmp_path, flag):
    tokenizer = toy.make_tokenizer()
    tokenizer.chat_template = THINKING_TEMPLATE
    student, teacher = (checkpoint(tmp_path / name, tokenizer) for name in ("student", "teacher"))
    result = cli("opd", *typed(flag, *STEP["opd"], student=student, teacher=teacher))
    assert_refused(result, "preflight, thinking: thinking is on for one of the two")
    both = typed("--thinking", "--teacher-thinking", *STEP["opd"], student=student, teacher=teacher)
    assert cli("opd", *both)[0] == 0


@pytest.mark.parametrize("script", ["opd", "fkl_warmup"])
def test_force_goes_on_and_is_recorded(cli, typed, tmp_path, script):
    code, out, err = cli(script, *typed("--force", *STEP[script], student=base_model(tmp_path / "student")))
    assert code == 0, err
    assert "preflight warning, forced, base_against_instruct: --student" in out
    record = json.loads((tmp_path / "out" / "run.json").read_text())
    assert record["preflight"].keys() == {"forced", "warnings", "teacher_logprob", "teacher_logprob_student_prompt",
                                          "self_kl", "reverse_kl"}  # fmt: skip
    assert record["finished"] and [line.split(":")[0] for line in record["preflight"]["forced"]] == ["base_against_instruct"]


def test_all_failures_are_named_at_once(cli, typed, tmp_path):
    tokenizer = edited_tokenizer(tmp_path / "student", lambda c: swap_ids(c, "7", "8"))
    tokenizer.eos_token = "<|unk|>"
    result = cli("opd", *typed(*STEP["opd"], student=checkpoint(tmp_path / "student", tokenizer)))
    assert_refused(result, r"preflight, vocabulary: .*\(next: eos\)")


@pytest.mark.parametrize("script", ["opd", "fkl_warmup"])
def test_preflight_only_reads_both_models_and_writes_nothing(cli, typed, tmp_path, script):
    code, out, _ = cli(script, *typed("--preflight-only", *STEP[script]))
    assert code == 0 and "KL(student || teacher)" in out and "nothing stands in the way" in out
    assert not (tmp_path / "out").exists()


def test_the_prompts_are_shown_and_a_difference_is_a_warning(cli, typed, tmp_path):
    tokenizer = toy.make_tokenizer()
    tokenizer.chat_template = "<|system|>3" + toy.CHAT_TEMPLATE
    code, out, _ = cli("opd", *typed("--preflight-only", *STEP["opd"], teacher=checkpoint(tmp_path / "t", tokenizer)))
    assert code == 0
    assert (
        "teacher's prompt '<|system|>3<|user|>1+2?<|assistant|>'" in out
        and "student's prompt '<|user|>1+2?<|assistant|>'" in out
    )
    assert "preflight warning, prompt:" in out
    code, out, _ = cli("opd", *typed("--preflight-only", *STEP["opd"]))
    assert "read the same prompt, '<|user|>1+2?<|assistant|>'" in out and "warning" not in out.replace("reverse_kl", "")[:80]


def test_two_base_checkpoints_fit_with_a_warning(cli, typed, tmp_path):
    models = {"teacher": base_model(tmp_path / "teacher"), "student": base_model(tmp_path / "student")}
    code, out, _ = cli("opd", *typed("--preflight-only", *STEP["opd"], **models))
    assert code == 0 and "preflight warning, end_of_turn: --student" in out


def test_vocabularies_that_differ_by_padding_fit(cli, typed, tmp_path):
    code, out, _ = cli("opd", *typed("--preflight-only", *STEP["opd"], teacher=checkpoint(tmp_path / "t", vocab_size=32)))
    assert code == 0 and "vocabulary sizes 32 (teacher) and 24 (student) differ by padding" in out


def test_a_thinking_flag_without_effect_is_a_warning(cli, typed):
    code, out, _ = cli("opd", *typed("--preflight-only", "--thinking", *STEP["opd"]))
    assert code == 0 and "preflight warning, thinking: --thinking changes nothing" in out


# ------------------------------------------------------------------------------------------------------ with the models
def models_report(script, typed, capsys, monkeypatch, *flags, **models):
    """Report of the checks that read the models, through the script's own main."""
    reports, check = [], preflight.check_models

    def keep(args, report, *a, **kw):
        reports.append(report)
        check(args, report, *a, **kw)

    monkeypatch.setattr(preflight, "check_models", keep)
    module = {"opd": opd, "fkl_warmup": fkl_warmup}[script]
    import tyro

    with pytest.raises(SystemExit) as end:
        module.main(tyro.cli(module.Args, args=typed("--preflight-only", *STEP[script], *flags, **models)))
    assert end.value.code == 0
    return reports[0], capsys.readouterr().out


def test_a_student_that_is_its_teacher_has_kl_0(typed, capsys, monkeypatch, checkpoints):
    report, _ = models_report("opd", typed, capsys, monkeypatch, teacher=checkpoints.student)
    assert abs(report.figures["reverse_kl"]) < 1e-5 and abs(report.figures["self_kl"]) < 1e-6


def test_figures_equal_the_formula(typed, capsys, monkeypatch, checkpoints, data):
    """Greedy answers, their log-probability and the KL, from transformers' own logits."""
    import torch
    from conftest import next_token_logits

    seen = {}
    sample = preflight.HFSampler.sample

    def keep(self, prompts, n, *seed):
        responses = sample(self, prompts, n, *seed)
        seen["greedy" if self.greedy else "sampled"] = prompts, responses
        return responses

    monkeypatch.setattr(preflight.HFSampler, "sample", keep)
    report, _ = models_report("opd", typed, capsys, monkeypatch, "--dtype", "float64", "--temperature", "0.7")
    teacher, student = load(checkpoints.wide), load(checkpoints.student)
    logprobs, kls = [], []
    with torch.no_grad():
        for prompt, response in zip(*seen["greedy"], strict=True):
            log_p = torch.log_softmax(next_token_logits(teacher, prompt, response.ids), -1)
            assert log_p.argmax(-1).tolist() == response.ids
            logprobs += log_p.max(-1).values.tolist()
        for prompt, response in zip(*seen["sampled"], strict=True):
            ps, pt = (torch.log_softmax(next_token_logits(m, prompt, response.ids) / 0.7, -1) for m in (student, teacher))
            kls += (ps.exp() * (ps - pt)).sum(-1).tolist()
    assert len(seen["greedy"][0]) == preflight.SAMPLES
    assert report.figures["teacher_logprob"] == pytest.approx(sum(logprobs) / len(logprobs), rel=1e-5)
    assert report.figures["teacher_logprob_student_prompt"] == pytest.approx(report.figures["teacher_logprob"], rel=1e-9)
    assert report.figures["reverse_kl"] == pytest.approx(sum(kls) / len(kls), rel=1e-6)


def test_a_far_student_is_told_to_warm_up_unless_this_is_the_warmup(typed, capsys, monkeypatch):
    """Two unrelated random models."""
    report, out = models_report("opd", typed, capsys, monkeypatch)
    assert report.figures["reverse_kl"] > preflight.KL_WARNING
    assert "preflight warning, reverse_kl: " in out and "run fkl_warmup.py first" in out
    monkeypatch.undo()
    report, out = models_report("fkl_warmup", typed, capsys, monkeypatch)
    assert report.figures["reverse_kl"] > preflight.KL_WARNING and "warning, reverse_kl" not in out


def test_a_damaged_checkpoint_is_refused(cli, typed, tmp_path):
    """Weights that are finite, as others are refused at load (tests/test_faults.py), and whose logits are not."""
    import torch

    model = random_model(seed=9)
    with torch.no_grad():
        model.model.norm.weight[3] = 3e38
    model.save_pretrained(tmp_path / "broken")
    toy.make_tokenizer().save_pretrained(tmp_path / "broken")
    result = cli("opd", *typed(*STEP["opd"], teacher=tmp_path / "broken"))
    assert_refused(result, "preflight, weights: a model gives nan or inf", "--teacher or --student")


def test_a_student_that_should_be_its_teacher_and_is_not(cli, typed, monkeypatch, checkpoints):
    """Something between the folder and the loss changed its weights: a dtype, an adapter, a broken load."""
    import torch

    load_model = models.load_model

    def broken_load(*a, **kw):
        model = load_model(*a, **kw)
        if next(model.parameters()).requires_grad:  # the student
            with torch.no_grad():
                model.get_input_embeddings().weight.mul_(1.1)
        return model

    monkeypatch.setattr(models, "load_model", broken_load)
    result = cli("opd", *typed(*STEP["opd"], teacher=checkpoints.student))
    assert_refused(result, "preflight, self_kl: --teacher is --student, yet they differ by")


def test_a_teacher_unsure_of_its_own_answers_is_a_warning(typed, capsys, monkeypatch, tmp_path):
    tokenizer = toy.make_tokenizer()
    tokenizer.chat_template = "<|system|>3" + toy.CHAT_TEMPLATE
    teacher = checkpoint(tmp_path / "teacher", tokenizer)
    monkeypatch.setattr(preflight, "LOGPROB_WARNING", 0.0)
    monkeypatch.setattr(preflight, "LOGPROB_DROP_WARNING", 0.0)
    report, _ = models_report("opd", typed, capsys, monkeypatch, teacher=teacher)
    own, behind_student = report.figures["teacher_logprob"], report.figures["teacher_logprob_student_prompt"]
    names = [line.split(":")[0] for line in report.warnings]
    assert own < 0 and names.count("teacher_logprob") == 1 + (behind_student < own)
    assert behind_student < own, "greedy answers are likeliest behind the prompt they were given to"
    monkeypatch.undo()
    report, _ = models_report("opd", typed, capsys, monkeypatch)
    assert report.figures["teacher_logprob"] == report.figures["teacher_logprob_student_prompt"], "one prompt for both"


def test_training_is_the_same_with_and_without_the_checks(run_script, checkpoints, data):
    """They draw from generators of their own."""
    args = dict(teacher=checkpoints.wide, student=checkpoints.student, train_data=data, prompts_per_step=6, max_steps=2,
                max_response_tokens=8)  # fmt: skip
    with_checks, without = run_script("opd", checked=True, **args), run_script("opd", **args)
    assert with_checks.record["preflight"] and len(with_checks.samples) == len(without.samples) + 2
    for a, b in zip(with_checks.updates, without.updates, strict=True):
        assert all((a[1][name] == b[1][name]).all() for name in a[1])


def test_shorten_quotes_and_cuts_the_middle():
    assert preflight.shorten("a\nb") == r"'a\nb'"
    text = preflight.shorten("x" * 500 + "y" * 500, 100)
    assert "[...]" in text and len(text) < 120 and text.endswith("y'")


def test_problem_texts_are_probed_too(tmp_path, checkpoints):
    """A pattern that none of the fixed probes holds."""

    def edit(contents):
        contents["normalizer"] = {"type": "Replace", "pattern": {"String": "9*9?"}, "content": "8*8?"}

    student = checkpoint(tmp_path / "student", edited_tokenizer(tmp_path / "student", edit))
    args = opd.Args(teacher=checkpoints.wide, student=str(student))
    tokenizers = models.load_tokenizer(args.teacher, "--teacher"), models.load_tokenizer(args.student, "--student")
    problem = dataset.load_problems(write_jsonl(tmp_path / "d.jsonl", [{"problem": "9*9?"}]), "--train-data", False)
    preflight.check_tokenizers(args, *tokenizers, dataset.load_problems(
        write_jsonl(tmp_path / "e.jsonl", [{"problem": "1+1?"}]), "--train-data", False))  # fmt: skip
    with pytest.raises(cli.UsageError, match="probe_text: .*9\\*9"):
        preflight.check_tokenizers(args, *tokenizers, problem)
