"""The embedded world: files, tokenizer, chat template, answers, determinism."""

import json
import re
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import toy

TINY = dict(
    train_size=24, heldout_size=12, dev_size=8, test_size=16, teacher_steps=3, student_steps=2, batch_size=8,
    teacher_hidden=32, student_hidden=32, student_layers=1,
)  # fmt: skip


@pytest.fixture(scope="module")
def worlds(tmp_path_factory):
    """qwen3 as the command makes it; both architectures again in this process (no start-up of two more processes)."""
    root, threads = tmp_path_factory.mktemp("toy"), torch.get_num_threads()
    toy.main(toy.Args(out=str(root / "command"), **TINY))
    for arch in ("qwen3", "llama"):
        args = toy.Args(out=str(root / arch), arch=arch, **TINY)
        dev = toy.write_problems(args)
        for role in ("teacher", "student"):
            toy.build(role, args, dev)
    torch.set_num_threads(threads)
    torch.set_flush_denormal(False)
    return root


def rows(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def solve(problem):
    """Left to right, modulo 10, by Python's own arithmetic."""
    value = int(problem[0])
    for op, digit in re.findall(r"([-+*])(\d)", problem[1:]):
        value = eval(f"{value}{op}{digit}") % 10
    return str(value)


def test_same_command_same_bytes(worlds):
    names = sorted(p.relative_to(worlds / "qwen3") for p in (worlds / "qwen3").rglob("*") if p.is_file())
    assert len(names) >= 4 + 2 * 5
    for name in names:
        assert (worlds / "qwen3" / name).read_bytes() == (worlds / "command" / name).read_bytes(), name


def test_report(worlds):
    report = json.loads((worlds / "command" / "toy.json").read_text())
    assert report["args"]["teacher_steps"] == 3 and report["seconds"] > 0
    assert 0 <= report["teacher"]["accuracy"] <= 1 and 0 <= report["student"]["chain_frac"] <= 1


def test_problems(worlds):
    splits = {name: rows(worlds / "command" / f"{name}.jsonl") for name in ("train", "heldout", "dev", "test")}
    assert {name: len(split) for name, split in splits.items()} == dict(train=24, heldout=12, dev=8, test=16)
    problems = [row["problem"] for split in splits.values() for row in split]
    assert len(set(problems)) == len(problems) == 60
    for row in (row for split in splits.values() for row in split):
        assert re.fullmatch(r"\d([-+]\d|\*[2-9]){3,6}\?", row["problem"])
        assert row["answer"] == solve(row["problem"])
    assert solve("3+4*2-5?") == "9"


@pytest.mark.parametrize("arch", ["qwen3", "llama"])
@pytest.mark.parametrize("role", ["teacher", "student"])
def test_checkpoint(worlds, arch, role):
    folder = worlds / arch / f"{role}_base"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert type(model).__name__ == {"qwen3": "Qwen3ForCausalLM", "llama": "LlamaForCausalLM"}[arch]
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.config.vocab_size == len(tokenizer) == 24
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id != tokenizer.pad_token_id
    assert model.generation_config.pad_token_id == tokenizer.pad_token_id

    text = "3+4=7,7*2=4,4-5=9,\\boxed{9}"
    ids = tokenizer(text)["input_ids"]
    assert len(ids) == 21 and tokenizer.decode(ids) == text
    assert tokenizer.decode([*ids, tokenizer.eos_token_id, tokenizer.pad_token_id], skip_special_tokens=True) == text
    assert tokenizer.encode("\\boxed{") == [tokenizer.convert_tokens_to_ids("\\boxed{")]

    chat = [{"role": "user", "content": "3+4?"}]
    prompt = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True, enable_thinking=False)
    assert prompt == "<|user|>3+4?<|assistant|>"
    ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
    assert ids == tokenizer(prompt)["input_ids"] and ids[-1] == tokenizer.convert_tokens_to_ids("<|assistant|>")
    strange = [{"role": "system", "content": "Be good.\n"}, *chat, {"role": "assistant", "content": "\\boxed{7}"}]
    text = tokenizer.apply_chat_template(strange, tokenize=False)
    assert text == "<|system|>Be good.\n<|user|>3+4?<|assistant|>\\boxed{7}<|im_end|>"
    assert tokenizer(text)["input_ids"].count(tokenizer.unk_token_id) == len("Be good.\n")

    out = model.generate(torch.tensor([ids]), max_new_tokens=4, do_sample=True)
    assert out.shape[0] == 1 and out.max() < 24


def test_demonstrations():
    """Without slips every chain is the sum worked out; a guess is right as often as asked."""
    args = toy.Args(step_error=0.0)
    tokenizer, rng = toy.make_tokenizer(), toy.np.random.default_rng(3)
    chains, answers = toy.render(rng, toy.draw_problems(rng, 200, args), args, chain=True)
    assert chains.shape[1] == 16 + 40
    for text, answer in zip(tokenizer.batch_decode(chains), answers, strict=True):
        problem, response = re.fullmatch(r"<\|user\|>(.*)<\|assistant\|>(.*)<\|im_end\|>(?:<\|pad\|>)*", text).groups()
        assert solve(problem) == str(answer) and response.endswith(f"\\boxed{{{answer}}}")
        steps = response.split(",")[:-1]
        assert len(steps) == len(re.findall(r"[-+*]", problem))
        assert all(solve(left) == right for left, right in (step.split("=") for step in steps))
    guesses, answers = toy.render(rng, toy.draw_problems(rng, 4000, args), args, chain=False)
    boxes = guesses[:, :-1] == toy.ID["\\boxed{"]
    assert abs((guesses[:, 1:][boxes] == answers).mean() - 0.4) < 0.04
