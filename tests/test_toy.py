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
    """arithmetic and swaps as the command makes them; both, and arithmetic with Llama models, again in this process (no
    start-up of two more processes)."""
    root, threads = tmp_path_factory.mktemp("toy"), torch.get_num_threads()
    toy.main(toy.Args(out=str(root / "command"), **TINY))
    toy.main(toy.Args(out=str(root / "swaps_command"), world="swaps", **TINY))
    for folder, options in {"qwen3": {}, "llama": dict(arch="llama"), "swaps": dict(world="swaps")}.items():
        args = toy.Args(out=str(root / folder), **options, **TINY)
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


def change_seats(problem):
    """Every swap in turn, on a dictionary of seats; returns the order after each as a string, the first one included."""
    order, *pairs = problem.removesuffix("?").split(",")
    seats, orders = dict(enumerate(order)), [order]
    for a, b in pairs:
        seat = {guest: number for number, guest in seats.items()}
        seats[seat[a]], seats[seat[b]] = b, a
        orders.append("".join(seats.values()))
    return orders


@pytest.mark.parametrize("folder, command", [("qwen3", "command"), ("swaps", "swaps_command")])
def test_same_command_same_bytes(worlds, folder, command):
    names = sorted(p.relative_to(worlds / folder) for p in (worlds / folder).rglob("*") if p.is_file())
    assert len(names) >= 4 + 2 * 5
    for name in names:
        assert (worlds / folder / name).read_bytes() == (worlds / command / name).read_bytes(), name


def test_both_worlds_write_the_same_kind_of_files(worlds):
    names = [{p.relative_to(worlds / c) for p in (worlds / c).rglob("*")} for c in ("command", "swaps_command")]
    assert names[0] == names[1]
    tokenizers = [(worlds / c / "student_base" / "tokenizer.json").read_bytes() for c in ("command", "swaps_command")]
    assert tokenizers[0] == tokenizers[1]


def test_report(worlds):
    report = json.loads((worlds / "command" / "toy.json").read_text())
    assert report["args"]["teacher_steps"] == 3 and report["seconds"] > 0
    assert 0 <= report["teacher"]["accuracy"] <= 1 and 0 <= report["student"]["chain_frac"] <= 1


@pytest.mark.parametrize("command", ["command", "swaps_command"])
def test_problems(worlds, command):
    splits = {name: rows(worlds / command / f"{name}.jsonl") for name in ("train", "heldout", "dev", "test")}
    assert {name: len(split) for name, split in splits.items()} == dict(train=24, heldout=12, dev=8, test=16)
    problems = [row["problem"] for split in splits.values() for row in split]
    assert len(set(problems)) == len(problems) == 60
    for row in (row for split in splits.values() for row in split):
        if command == "command":
            assert re.fullmatch(r"\d([-+]\d|\*[2-9]){3,6}\?", row["problem"])
            assert row["answer"] == solve(row["problem"])
        else:
            order, *pairs = re.fullmatch(r"([1-5]{5}(,[1-5]{2}){3,6})\?", row["problem"])[1].split(",")
            assert sorted(order) == list("12345") and all(a < b for a, b in pairs) and len(set(pairs)) == len(pairs)
            assert row["answer"] == change_seats(row["problem"])[-1][0]
    assert solve("3+4*2-5?") == "9" and change_seats("43251,23,34,25?")[1:] == ["42351", "32451", "35421"]


@pytest.mark.parametrize("folder", ["qwen3", "llama", "swaps"])
@pytest.mark.parametrize("role", ["teacher", "student"])
def test_checkpoint(worlds, folder, role):
    path = worlds / folder / f"{role}_base"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(path), AutoTokenizer.from_pretrained(path)
    assert type(model).__name__ == ("Qwen3ForCausalLM" if folder == "qwen3" else "LlamaForCausalLM")
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
    chains, answers = toy.render(rng, toy.draw(rng, 200, args), args, "chain")
    assert chains.shape[1] == 16 + 40
    for text, answer in zip(tokenizer.batch_decode(chains), answers, strict=True):
        problem, response = re.fullmatch(r"<\|user\|>(.*)<\|assistant\|>(.*)<\|im_end\|>(?:<\|pad\|>)*", text).groups()
        assert solve(problem) == str(answer) and response.endswith(f"\\boxed{{{answer}}}")
        steps = response.split(",")[:-1]
        assert len(steps) == len(re.findall(r"[-+*]", problem))
        assert all(solve(left) == right for left, right in (step.split("=") for step in steps))
    guesses, answers = toy.render(rng, toy.draw(rng, 4000, args), args, "guess")
    boxes = guesses[:, :-1] == toy.ID["\\boxed{"]
    assert abs((guesses[:, 1:][boxes] == answers).mean() - 0.4) < 0.04


@pytest.mark.parametrize("style, mark, forgotten", [("careful", "*", 0), ("hasty", "-", 1)])
def test_swap_demonstrations(style, mark, forgotten):
    """Without slips a careful list is the swaps carried out; a hasty one is it without the last, right 60 % of the time."""
    tokenizer, rng = toy.make_tokenizer(), toy.np.random.default_rng(3)
    args = toy.Args(world="swaps", step_error=0.0)
    lists, answers = toy.render(rng, toy.draw(rng, 200, args), args, style)
    assert lists.shape[1] == 26 + 58
    right = []
    for text, answer in zip(tokenizer.batch_decode(lists), answers, strict=True):
        problem, response = re.fullmatch(r"<\|user\|>(.*)<\|assistant\|>(.*)<\|im_end\|>(?:<\|pad\|>)*", text).groups()
        orders, pairs = change_seats(problem), problem[:-1].split(",")[1:]
        written = range(1, len(orders) - forgotten)
        steps = "".join(f"{mark}{pairs[k - 1]}={orders[k]}" for k in written)
        assert str(answer) == orders[-1][0] and response == f"{steps}\\boxed{{{orders[written[-1]][0]}}}"
        right.append(response.endswith(f"{{{answer}}}"))
    assert sum(right) == 200 if style == "careful" else 100 < sum(right) < 140


def test_swap_slips_and_guesses():
    rng, args = toy.np.random.default_rng(3), toy.Args(world="swaps", min_ops=1, max_ops=1)

    def right(style):
        responses, answers = toy.render(rng, toy.draw(rng, 4000, args), args, style)
        return (responses[:, 1:][responses[:, :-1] == toy.ID["\\boxed{"]] == answers).mean()

    # a slip swaps a pair drawn from all ten: it leaves the first seat right 0.6 * 0.6 + 4 * 0.1 * 0.1 = 0.4 of the time
    assert abs(right("careful") - (1 - 0.05 * 0.6)) < 0.02
    assert abs(right("guess") - 0.4) < 0.04


def test_the_student_never_sees_the_careful_style():
    args = toy.Args(world="swaps")
    assert list(toy.behaviours(args, "teacher")) == ["careful", "hasty", "guess"]
    assert list(toy.behaviours(args, "student")) == ["hasty", "guess"]
    for world, role in ((args, "teacher"), (args, "student"), (toy.Args(), "teacher")):
        wanted, drawn = zip(*toy.behaviours(world, role).values(), strict=True)
        assert sum(wanted) == pytest.approx(1) and sum(drawn) == 1
