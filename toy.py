# docs/toy.md
"""A small world in which the whole recipe runs on a CPU: two base models and four sets of problems in a minute.

Problems are chains of arithmetic modulo 10, left to right: "3+4*2-5?" has the answer 9 (7, then 14 -> 4, then -1 -> 9).
The base models are pretrained on demonstrations that mix two behaviours:
  - a worked chain, rare (0.3), right unless a step slips (0.05 each; the chain goes on from its wrong value):
        3+4=7,7*2=4,4-5=9,\\boxed{9}<|im_end|>
  - a guess straight away, common (0.7), right 40 % of the time in the demonstrations; the models cannot do the sum
    in their heads, so about 11 % of their own guesses are right:
        \\boxed{4}<|im_end|>
The good behaviour is inside the base model but rare: a sparse 0/1 reward can find it, a raw teacher passes on the mix.
A perfect imitator would get 0.3 * 0.81 + 0.7 * 0.11 = 0.32 of the problems right at temperature 1.

Factors are drawn from 2-9: a factor 0 would make 0 the answer of many problems and guessing good, 1 does nothing.
Answers come out as 0 15 %, 5 10 %, other even digits 11 %, other odd digits 8 % of the time each.
The four sets share no problem; a demonstration shows one of their problems now and then, as any of its kind.

Lengths, end of turn included: n operations take 2n+4 prompt tokens and 6n+4 response tokens as a chain (4 as a guess),
so at most 16 + 40 at the default 6 operations. Now and then a base model repeats a step and runs a little longer;
--max-response-tokens 64 leaves room for that. The models know no words: run them with --instruction "".

    python toy.py --out runs/toy
    python toy.py --out runs/toy_llama --arch llama
"""

import json
import os
import re
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

import common
from common import require

SYMBOLS = [*"0123456789", *"+-*", "=", "?", ",", "\\boxed{", "}"]
SPECIAL = ["<|pad|>", "<|unk|>", "<|im_end|>", "<|system|>", "<|user|>", "<|assistant|>"]
ID = {token: i for i, token in enumerate(SYMBOLS + SPECIAL)}  # a digit's id is its value, + - * are 10 11 12
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] }}"
    "{% if m['role'] == 'assistant' %}{{ '<|im_end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


@dataclass
class Args:
    out: str = "runs/toy"
    """folder to write"""
    arch: Literal["qwen3", "llama"] = "qwen3"
    """architecture of both models"""
    seed: int = 1
    """seed of problems, demonstrations, initial weights and order"""

    train_size: int = 512
    """labeled problems for GRPO on the teacher, and prompts of the bridge"""
    heldout_size: int = 512
    """labeled problems kept back for GRPO on the student"""
    dev_size: int = 256
    """problems to look at while developing"""
    test_size: int = 512
    """problems for the final figures"""
    min_ops: int = 3
    """fewest operations in a problem"""
    max_ops: int = 6
    """most operations in a problem"""

    chain_prob: float = 0.3
    """how often a demonstration is a worked chain; else it is a guess"""
    step_error: float = 0.05
    """how often a step of a chain is wrong"""
    guess_right: float = 0.4
    """how often a guess is right"""

    teacher_hidden: int = 96
    """width of the teacher"""
    teacher_layers: int = 3
    """depth of the teacher"""
    teacher_steps: int = 300
    """pretraining steps of the teacher"""
    student_hidden: int = 64
    """width of the student"""
    student_layers: int = 2
    """depth of the student"""
    student_steps: int = 700
    """most pretraining steps of the student"""
    student_skill: float = 0.8
    """the student's pretraining stops at this mean probability of the demonstrated results (0.9 is the most, given the
    slips): steps alone would leave it anywhere between hopeless and as good as the teacher, depending on the seed"""
    batch_size: int = 128
    """demonstrations in a step, half of them chains (reweighted: see `pretrain`)"""
    learning_rate: float = 4e-3
    """peak learning rate"""


def make_tokenizer() -> transformers.PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.WordLevel(ID, unk_token="<|unk|>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"\\boxed\{|[\s\S]"), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<|pad|>", unk_token="<|unk|>", eos_token="<|im_end|>",
        additional_special_tokens=SPECIAL[3:], padding_side="left", model_max_length=1024,
        clean_up_tokenization_spaces=False,
    )  # fmt: skip
    fast.chat_template = CHAT_TEMPLATE
    assert len(fast) == len(ID) and all(fast.convert_tokens_to_ids(token) == i for token, i in ID.items())
    return fast


def draw_problems(rng, size, args):
    """first (N,), ops (N, K) in 10..12, digits (N, K), n_ops (N,): the operations at or beyond n_ops are unused."""
    n_ops = rng.integers(args.min_ops, args.max_ops + 1, size)
    first = rng.integers(0, 10, size)
    ops = rng.integers(10, 13, (size, args.max_ops))
    digits = np.where(ops == ID["*"], rng.integers(2, 10, ops.shape), rng.integers(0, 10, ops.shape))
    return first, ops, digits, n_ops


def apply(op, a, b):
    return np.select([op == ID["+"], op == ID["-"]], [a + b, a - b], a * b) % 10


def render(rng, problems, args, chain):
    """Token rows (N, W) padded on the right: prompt and response, each response a chain or each a guess."""
    first, ops, digits, n_ops = problems
    size, pad = len(first), ID["<|pad|>"]
    column = lambda token: np.full(size, ID[token])  # noqa: E731
    true, value = [first], first
    prompt, steps = [column("<|user|>"), first], []
    for k in range(args.max_ops):
        used = k < n_ops
        op, digit = ops[:, k], digits[:, k]
        slip = rng.random(size) < args.step_error
        result = (apply(op, value, digit) + slip * rng.integers(1, 10, size)) % 10
        step = [value, op, digit, column("="), result, column(",")]
        steps += [np.where(used, t, pad) for t in step]
        prompt += [np.where(used, op, pad), np.where(used, digit, pad)]
        value = np.where(used, result, value)
        true.append(np.where(used, apply(op, true[-1], digit), true[-1]))
    prompt += [column("?"), column("<|assistant|>")]
    if not chain:
        wrong = rng.random(size) >= args.guess_right
        steps, value = [], (true[-1] + wrong * rng.integers(1, 10, size)) % 10
    rows = np.stack([*prompt, *steps, column("\\boxed{"), value, column("}"), column("<|im_end|>")], 1)  # (N, W)
    order = np.argsort(rows == pad, axis=1, kind="stable")  # unused slots go to the end
    return np.take_along_axis(rows, order, 1), true[-1]


def pretrain(model, args, role, rng):
    """Next-token loss on the response tokens.

    Half of a batch are chains, for they are what takes long to learn. The two behaviours part at the first response
    token and nowhere else, so weighting that one token's loss by (wanted / drawn) gives back the demonstrations' mix.
    """
    half, steps, start = args.batch_size // 2, getattr(args, f"{role}_steps"), time.time()
    groups = []
    for chain in (True, False):
        rows, _ = render(rng, draw_problems(rng, steps * half, args), args, chain)
        rows = torch.from_numpy(rows).view(steps, half, -1)  # (steps, B/2, W)
        in_response = (rows == ID["<|assistant|>"]).cumsum(-1)
        weight = (in_response[..., :-1] * (rows[..., 1:] != ID["<|pad|>"])).float()  # of predicting rows[..., 1:]
        mix = args.chain_prob if chain else 1 - args.chain_prob
        weight[rows[..., :-1] == ID["<|assistant|>"]] = mix / 0.5
        groups.append((rows, weight))
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), weight_decay=0.01, fused=True)
    warmup = max(1, steps // 20)
    skill, stop_at = 0.0, args.student_skill if role == "student" else 1.0
    for step in range(steps):
        denominator = sum(weight[step].sum() for _, weight in groups)
        loss = 0.0
        for rows, weight in groups:
            logits = model(rows[step, :, :-1], use_cache=False).logits  # (B/2, W-1, V); causal, so no mask
            token_loss = F.cross_entropy(logits.flatten(0, 1), rows[step, :, 1:].flatten(), reduction="none")
            loss = loss + (token_loss * weight[step].flatten()).sum() / denominator
            if rows is groups[0][0]:  # chains: the probability of each result, seen for the first time
                results = rows[step, :, :-1].flatten() == ID["="]
                skill = 0.9 * skill + 0.1 * (-token_loss.detach()[results]).exp().mean().item()
        model.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scale = min((step + 1) / warmup, (steps - step) / max(1, steps - warmup))  # linear up, then linear to zero
        optimizer.param_groups[0]["lr"] = scale * args.learning_rate
        optimizer.step()
        if (step + 1) % 50 == 0 or step + 1 == steps or skill >= stop_at:
            print(f"{role} step {step + 1}/{steps}  skill {skill:.3f}  {time.time() - start:.0f} s", flush=True)
        if skill >= stop_at:
            break


@torch.no_grad()
def measure(model, tokenizer, rows, samples=4):
    """Accuracy at temperature 1, and where it comes from."""
    chats = [[{"role": "user", "content": row["problem"]}] for row in rows]
    prompts = tokenizer.apply_chat_template(
        chats, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
    )
    out = model.generate(
        **{k: v.repeat_interleave(samples, 0) for k, v in prompts.items() if k != "token_type_ids"},
        do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=64,
    )[:, prompts["input_ids"].shape[1] :]  # fmt: skip
    texts = tokenizer.batch_decode(out, skip_special_tokens=True)
    answers = [row["answer"] for row in rows for _ in range(samples)]
    right = np.array([re.findall(r"\\boxed\{(\d)\}", t)[-1:] == [a] for t, a in zip(texts, answers, strict=True)])
    chain = np.array(["=" in t for t in texts])
    mean = lambda x: round(float(x.mean()), 4) if x.size else None  # noqa: E731
    return {
        "accuracy": mean(right),
        "chain_frac": mean(chain),
        "chain_accuracy": mean(right[chain]),
        "guess_accuracy": mean(right[~chain]),
        "response_length": mean((out != tokenizer.pad_token_id).sum(1).float().numpy()),
        "response_length_max": int((out != tokenizer.pad_token_id).sum(1).max()),
    }


def make_model(args, hidden, layers):
    sizes = dict(
        vocab_size=len(ID), hidden_size=hidden, intermediate_size=3 * hidden, num_hidden_layers=layers,
        num_attention_heads=hidden // 32, num_key_value_heads=hidden // 32, head_dim=32, max_position_embeddings=1024,
        tie_word_embeddings=True, initializer_range=0.05, bos_token_id=None,
        eos_token_id=ID["<|im_end|>"], pad_token_id=ID["<|pad|>"],
    )  # fmt: skip
    if args.arch == "qwen3":
        model = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**sizes))
    else:
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes))
    model.generation_config = transformers.GenerationConfig(eos_token_id=ID["<|im_end|>"], pad_token_id=ID["<|pad|>"])
    return model


def write_problems(args):
    """Writes the four sets, returns dev."""
    os.makedirs(args.out, exist_ok=True)

    sizes = {name: getattr(args, f"{name}_size") for name in ("train", "heldout", "dev", "test")}
    rng = np.random.default_rng(args.seed)
    rows, answers = render(rng, draw_problems(rng, 2 * sum(sizes.values()), args), args, chain=False)
    texts = ["".join(SYMBOLS[i] for i in row if i < len(SYMBOLS)).split("\\")[0] for row in rows]
    unique = list(dict(zip(texts, answers, strict=True)).items())
    require(
        len(unique) >= sum(sizes.values()),
        f"--max-ops {args.max_ops}: only {len(unique)} distinct problems; "
        f"raise it or ask for fewer problems (--train-size ...)",
    )
    splits = {}
    for name, size in sizes.items():
        splits[name], unique = [{"problem": p, "answer": str(a)} for p, a in unique[:size]], unique[size:]
        with open(os.path.join(args.out, f"{name}.jsonl"), "w") as f:
            f.writelines(json.dumps(row) + "\n" for row in splits[name])
    return splits["dev"]


def build(role, args, dev):
    """Pretrain, measure and save one base model, on one thread: two processes keep two cores busy with no barriers
    between them, and the files do not depend on the number of cores."""
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    seed = [args.seed, ("teacher", "student").index(role)]
    torch.manual_seed(seed[0] * 2 + seed[1])
    tokenizer = make_tokenizer()
    model = make_model(args, getattr(args, f"{role}_hidden"), getattr(args, f"{role}_layers"))
    pretrain(model, args, role, np.random.default_rng(seed))
    path = os.path.join(args.out, f"{role}_base")
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return measure(model.eval(), tokenizer, dev)


def main(args: Args):
    start = time.time()
    require(1 <= args.min_ops <= args.max_ops, f"--min-ops {args.min_ops} --max-ops {args.max_ops}: need 1 <= min <= max")
    require(args.batch_size % 2 == 0, f"--batch-size {args.batch_size}: must be even, half of it are chains")
    for role in ("teacher", "student"):
        hidden = getattr(args, f"{role}_hidden")
        require(hidden % 32 == 0, f"--{role}-hidden {hidden}: must be a multiple of 32, the size of a head")
    dev = write_problems(args)
    report = {"command": common.command_line(), "args": asdict(args)}
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        futures = {role: pool.submit(build, role, args, dev) for role in ("teacher", "student")}
        for role, future in futures.items():
            report[role] = future.result()
            print(f"{role}: " + "  ".join(f"{k} {v}" for k, v in report[role].items()))
    report["seconds"] = round(time.time() - start, 1)
    print(f"{args.out}: {report['seconds']} s")
    with open(os.path.join(args.out, "toy.json"), "w") as f:
        json.dump(report, f, indent=1)


if __name__ == "__main__":
    common.run(main, Args)
