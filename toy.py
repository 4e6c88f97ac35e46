# docs/toy.md
"""Two small worlds in which the whole recipe runs on a CPU: two base models and five sets of problems in about two minutes.

The base models are pretrained on demonstrations that mix behaviours, the good one inside but rare: a sparse 0/1 reward can
find it, a raw teacher passes on the mix.

--world arithmetic, Qwen3 models: chains modulo 10, left to right: "3+4*2-5?" has the answer 9 (7, then 14 -> 4, then
-1 -> 9). Teacher and student have seen
  - a worked chain, rare (0.3), right unless a step slips (0.05 each; the chain goes on from its wrong value):
        3+4=7,7*2=4,4-5=9,\\boxed{9}<|im_end|>
  - a guess straight away, common (0.7), right 40 % of the time in the demonstrations; the models cannot do the sum
    in their heads, so about 11 % of their own guesses are right:
        \\boxed{4}<|im_end|>
A perfect imitator would get 0.3 * 0.81 + 0.7 * 0.11 = 0.32 of the problems right at temperature 1.
Factors are drawn from 2-9: a factor 0 would make 0 the answer of many problems and guessing good, 1 does nothing.
Answers come out as 0 15 %, 5 10 %, other even digits 11 %, other odd digits 8 % of the time each.

--world swaps, Llama models: five guests sit in a row, pairs of them change seats, who sits in the first seat at the end?
"43251,23,34,25?" has the answer 3 (42351, then 32451, then 35421). The teacher has seen
  - a careful list, with stars, rare (0.3), a line slips 5 % of the time, by swapping another pair:
        *23=42351*34=32451*25=35421\\boxed{3}<|im_end|>
  - a hasty list, with dashes, rarer (0.1), that forgets the last swap, and is right if that does not matter (0.6):
        -23=42351-34=32451\\boxed{3}<|im_end|>
  - a guess, as above, with one chance in five.
The student has seen hasty lists (0.3) and guesses, and never a star: what the teacher does well lies outside of what the
student would ever sample, and what the student does lies inside of what the teacher knows.

The sets share no problem; a demonstration shows one of their problems now and then, as any of its kind.

Lengths, end of turn included: n operations take 2n+4 prompt tokens and 6n+4 response tokens as a chain (4 as a guess),
n swaps 3n+8 and 9n+4: at most 16 + 40 and 26 + 58 at the default 6. Now and then a base model repeats a step and runs a
little longer; --max-response-tokens 64, for swaps 72, leaves room for that. The models know no words: run them with
--instruction "".

    python toy.py --out runs/toy
    python toy.py --world swaps --out runs/swaps
    python toy.py --arch llama --out runs/toy_llama
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

from infra import cli, run_folder
from infra.cli import require
from infra.files import write_aside

SYMBOLS = [*"0123456789", *"+-*", "=", "?", ",", "\\boxed{", "}"]
SPECIAL = ["<|pad|>", "<|unk|>", "<|im_end|>", "<|system|>", "<|user|>", "<|assistant|>"]
ID = {token: i for i, token in enumerate(SYMBOLS + SPECIAL)}  # a digit's id is its value, + - * are 10 11 12
PAD = ID["<|pad|>"]
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] }}"
    "{% if m['role'] == 'assistant' %}{{ '<|im_end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
DEFAULTS = {  # of the options that the worlds do not share
    "arithmetic": dict(arch="qwen3", teacher_steps=300, batch_size=128),
    "swaps": dict(arch="llama", teacher_steps=240, batch_size=96),
}


@dataclass
class Args:
    world: Literal["arithmetic", "swaps"] = "arithmetic"
    """task family: sums worked in a chain, or guests who change seats"""
    out: str = "runs/toy"
    """folder to write"""
    arch: Literal["auto", "qwen3", "llama"] = "auto"
    """architecture of both models; auto is qwen3, for swaps llama"""
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
    unlabeled_size: int = 2048
    """problems without an answer, prompts of the bridge where labels are scarce"""
    min_ops: int = 3
    """fewest operations (swaps) in a problem"""
    max_ops: int = 6
    """most operations (swaps) in a problem"""

    chain_prob: float = 0.3
    """how often a demonstration is worked: a chain, for swaps the teacher's careful or the student's hasty list"""
    step_error: float = 0.05
    """how often a step of a chain or list is wrong"""
    hasty_prob: float = 0.1
    """swaps: how often a demonstration for the teacher is a hasty list"""
    guess_right: float = 0.4
    """how often a guess is right"""

    teacher_hidden: int = 96
    """width of the teacher"""
    teacher_layers: int = 3
    """depth of the teacher"""
    teacher_steps: int | None = None
    """pretraining steps of the teacher; none: 300, swaps 240"""
    student_hidden: int = 64
    """width of the student"""
    student_layers: int = 2
    """depth of the student"""
    student_steps: int = 700
    """most pretraining steps of the student"""
    student_skill: float = 0.8
    """the student's pretraining stops at this mean probability of the demonstrated results (0.9 is the most, given the
    slips): steps alone would leave it anywhere between hopeless and as good as the teacher, depending on the seed"""
    batch_size: int | None = None
    """demonstrations in a step, half of them worked (reweighted: see `behaviours`); none: 128, swaps 96"""
    learning_rate: float = 4e-3
    """peak learning rate"""

    def __post_init__(self):
        for name, value in DEFAULTS[self.world].items():
            if getattr(self, name) in (None, "auto"):
                setattr(self, name, value)


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


# ------------------------------------------------------------------------------------------------------- arithmetic
def draw_arithmetic(rng, size, args):
    """first (N,), ops (N, K) in 10..12, digits (N, K), n_ops (N,): the operations at or beyond n_ops are unused."""
    n_ops = rng.integers(args.min_ops, args.max_ops + 1, size)
    first = rng.integers(0, 10, size)
    ops = rng.integers(10, 13, (size, args.max_ops))
    digits = np.where(ops == ID["*"], rng.integers(2, 10, ops.shape), rng.integers(0, 10, ops.shape))
    return first, ops, digits, n_ops


def apply(op, a, b):
    return np.select([op == ID["+"], op == ID["-"]], [a + b, a - b], a * b) % 10


def render_arithmetic(rng, problems, args, style):
    """Columns of prompts and of responses, all "chain" or all "guess", and the answers (N,)."""
    first, ops, digits, n_ops = problems
    true, value = first, first
    prompt, steps = [first], []
    for k in range(args.max_ops):
        used = k < n_ops
        op, digit = ops[:, k], digits[:, k]
        slip = rng.random(len(first)) < args.step_error
        result = (apply(op, value, digit) + slip * rng.integers(1, 10, len(first))) % 10
        prompt += [np.where(used, t, PAD) for t in (op, digit)]
        steps += [np.where(used, t, PAD) for t in (value, op, digit, ID["="], result, ID[","])]
        value = np.where(used, result, value)
        true = np.where(used, apply(op, true, digit), true)
    if style == "guess":
        wrong = rng.random(len(first)) >= args.guess_right
        steps, value = [], (true + wrong * rng.integers(1, 10, len(first))) % 10
    return prompt, [*steps, ID["\\boxed{"], value, ID["}"]], true


# ------------------------------------------------------------------------------------------------------------ swaps
GUESTS = 5
PAIRS = np.array([(a, b) for a in range(1, GUESTS + 1) for b in range(a + 1, GUESTS + 1)])  # (10, 2)


def draw_swaps(rng, size, args):
    """seats (N, 5), pairs (N, K, 2), n_swaps (N,): the pairs at or beyond n_swaps are unused.

    No pair comes twice: a list is written by looking up what follows the last pair, which must be one place."""
    n_swaps = rng.integers(args.min_ops, args.max_ops + 1, size)
    seats = rng.permuted(np.tile(np.arange(1, GUESTS + 1), (size, 1)), axis=1)
    pairs = PAIRS[rng.permuted(np.tile(np.arange(len(PAIRS)), (size, 1)), axis=1)[:, : args.max_ops]]
    return seats, pairs, n_swaps


def swap(seats, pairs, used):
    """Both guests of a pair (N, 2) change seats (N, 5) where used (N,)."""
    a, b = pairs[:, :1], pairs[:, 1:]
    return np.where(used[:, None], np.where(seats == a, b, np.where(seats == b, a, seats)), seats)


def render_swaps(rng, problems, args, style):
    """Columns of prompts and of responses, all "careful", all "hasty" or all "guess", and the answers (N,).

    A hasty list forgets the last swap. A slip swaps another pair than it says, and the list goes on from there."""
    seats, pairs, n_swaps = problems
    true, size = seats, len(seats)
    mark, lines = ("*", n_swaps) if style == "careful" else ("-", n_swaps - 1)
    prompt, steps = list(seats.T), []
    for k in range(args.max_ops):
        used, written, pair = k < n_swaps, k < lines, pairs[:, k]
        slip = rng.random((size, 1)) < args.step_error
        seats = swap(seats, np.where(slip, PAIRS[rng.integers(0, len(PAIRS), size)], pair), written)
        true = swap(true, pair, used)
        prompt += [np.where(used, t, PAD) for t in (ID[","], *pair.T)]
        steps += [np.where(written, t, PAD) for t in (ID[mark], *pair.T, ID["="], *seats.T)]
    value = seats[:, 0]
    if style == "guess":
        wrong = rng.random(size) >= args.guess_right
        steps, value = [], (true[:, 0] - 1 + wrong * rng.integers(1, GUESTS, size)) % GUESTS + 1
    return prompt, [*steps, ID["\\boxed{"], value, ID["}"]], true[:, 0]


# ------------------------------------------------------------------------------------------------------ both worlds
def draw(rng, size, args):
    return (draw_swaps if args.world == "swaps" else draw_arithmetic)(rng, size, args)


def render(rng, problems, args, style):
    """Token rows (N, W) padded on the right: prompt and response, all of one style; and the answers (N,)."""
    columns = render_swaps if args.world == "swaps" else render_arithmetic
    prompt, response, answers = columns(rng, problems, args, style)
    columns = [ID["<|user|>"], *prompt, ID["?"], ID["<|assistant|>"], *response, ID["<|im_end|>"]]
    rows = np.stack([np.broadcast_to(column, answers.shape) for column in columns], 1)  # (N, W)
    order = np.argsort(rows == PAD, axis=1, kind="stable")  # unused slots go to the end
    return np.take_along_axis(rows, order, 1), answers


def behaviours(args, role):
    """{style: (share wanted, share drawn)} of a role's demonstrations, the style whose skill is watched first.

    Half of a batch are worked in that style, for that is what takes long to learn. Styles part at the first response
    token and nowhere else, so weighting that one token's loss by (wanted / drawn) gives back the wanted mix.
    """
    p, q = args.chain_prob, args.hasty_prob
    if args.world == "swaps" and role == "teacher":
        return {"careful": (p, 1 / 2), "hasty": (q, 1 / 4), "guess": (1 - p - q, 1 / 4)}
    return {"hasty" if args.world == "swaps" else "chain": (p, 1 / 2), "guess": (1 - p, 1 / 2)}


def pretrain(model, args, role, rng):
    """Next-token loss on the response tokens."""
    steps, start = getattr(args, f"{role}_steps"), time.time()
    groups = []
    for style, (wanted, drawn) in behaviours(args, role).items():
        size = int(args.batch_size * drawn)
        rows, _ = render(rng, draw(rng, steps * size, args), args, style)
        rows = torch.from_numpy(rows).view(steps, size, -1)  # (steps, B, W), B of this style
        in_response = (rows == ID["<|assistant|>"]).cumsum(-1)
        weight = (in_response[..., :-1] * (rows[..., 1:] != PAD)).float()  # of predicting rows[..., 1:]
        weight[rows[..., :-1] == ID["<|assistant|>"]] = wanted / drawn
        groups.append((rows, weight))
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), weight_decay=0.01, fused=True)
    warmup = max(1, steps // 20)
    skill, stop_at = 0.0, args.student_skill if role == "student" else 1.0
    for step in range(steps):
        denominator = sum(weight[step].sum() for _, weight in groups)
        loss = 0.0
        for rows, weight in groups:
            logits = model(rows[step, :, :-1], use_cache=False).logits  # (B, W-1, V); causal, so no mask
            token_loss = F.cross_entropy(logits.flatten(0, 1), rows[step, :, 1:].flatten(), reduction="none")
            loss = loss + (token_loss * weight[step].flatten()).sum() / denominator
            if rows is groups[0][0]:  # the probability of what follows each =, seen for the first time
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


def distinct_problems(args, seed, count, taken=()):
    """{problem: answer} of `count` problems that differ from each other and from those `taken`."""
    rng = np.random.default_rng(seed)
    rows, answers = render(rng, draw(rng, 2 * count, args), args, "guess")
    texts = ["".join(SYMBOLS[i] for i in row if i < len(SYMBOLS)).split("\\")[0] for row in rows]
    unique = {text: answer for text, answer in zip(texts, answers, strict=True) if text not in taken}
    require(
        len(unique) >= count,
        f"--max-ops {args.max_ops}: only {len(unique)} distinct problems; "
        f"raise it or ask for fewer problems (--train-size ...)",
    )
    return dict(list(unique.items())[:count])


def write_problems(args):
    """Writes the five sets, returns dev. The unlabeled one has a stream of its own: its size changes no other set."""
    os.makedirs(args.out, exist_ok=True)
    sizes = {name: getattr(args, f"{name}_size") for name in ("train", "heldout", "dev", "test")}
    labeled = distinct_problems(args, args.seed, sum(sizes.values()))
    rows = iter([{"problem": text, "answer": str(answer)} for text, answer in labeled.items()])
    splits = {name: [next(rows) for _ in range(size)] for name, size in sizes.items()}
    unlabeled = distinct_problems(args, [args.seed, 1], args.unlabeled_size, taken=labeled)
    splits["unlabeled"] = [{"problem": text} for text in unlabeled]
    for name, split in splits.items():
        with open(os.path.join(args.out, f"{name}.jsonl"), "w", encoding="utf-8") as f:
            f.writelines(json.dumps(row) + "\n" for row in split)
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
    require(args.world != "swaps" or args.max_ops <= len(PAIRS), f"--max-ops {args.max_ops}: there are {len(PAIRS)} pairs")
    require(
        args.batch_size % 4 == 0, f"--batch-size {args.batch_size}: must be a multiple of 4, styles are drawn by quarters"
    )
    for role in ("teacher", "student"):
        hidden = getattr(args, f"{role}_hidden")
        require(hidden % 32 == 0, f"--{role}-hidden {hidden}: must be a multiple of 32, the size of a head")
    dev = write_problems(args)
    report = {"command": run_folder.command_line(), "args": asdict(args)}
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        futures = {role: pool.submit(build, role, args, dev) for role in ("teacher", "student")}
        for role, future in futures.items():
            report[role] = future.result()
            print(f"{role}: " + "  ".join(f"{k} {v}" for k, v in report[role].items()))
    report["seconds"] = round(time.time() - start, 1)
    print(f"{args.out}: {report['seconds']} s")
    write_aside(os.path.join(args.out, "toy.json"), json.dumps(report, indent=1))


if __name__ == "__main__":
    cli.run(main, Args)
