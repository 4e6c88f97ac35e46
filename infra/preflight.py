# docs/preflight.md
"""Checks of a teacher and a student before anything expensive: a pair that does not fit trains without an error, and
what comes out is useless.

check_tokenizers   needs no weights: special tokens, vocabularies, ids of a probe set, end of turn, templates, thinking
check_models       a few short responses: the teacher on its own answers, KL(student || teacher) before the first step

An error names the flag and the fix and ends the run; --force makes a warning of it. Both are kept in run.json.
"""

import math
import tempfile
from dataclasses import dataclass, field
from types import SimpleNamespace

import torch
from transformers import AutoConfig, GenerationConfig

from infra import parallel
from infra.batches import response_hidden
from infra.cli import UsageError, require
from infra.dataset import Problem
from infra.hub import explain_missing, from_hub
from infra.models import autocast, device_and_dtype, try_save
from infra.prompts import apply_template, render_prompt, render_text
from infra.sampler import eos_token_ids
from infra.sampler_hf import HFSampler
from kernels import TeacherHead, fused_linear_divergence, fused_linear_logprob

PROBE = (
    "The answer is $\\frac{3}{4}$, so \\boxed{0.75}.",
    "  leading spaces,\ttabs\n\n\nand   runs of white space \r\n",
    "1234567890 3.14159 1,000,000 2^{10} 1e-7 0x1F",
    "x_{i+1} \\le \\sqrt{x_i^2 + 1} \\quad \\forall i \\in \\mathbb{N}",
    "don't we'll THEY'RE camelCase snake_case kebab-case",
    "def f(x):\n    return [i ** 2 for i in range(x)]  # comment",
    "naïve café Straße Ελληνικά Русский עברית العربية",
    "数学の問題を解く 한국어 ๙ १२३ ½ ² ∑ ≠ → ∞",
    "emoji 🙂👩‍👩‍👧 combining e\u0301 no-break\u00a0space zero\u200bwidth",
    "<think>\n\n</think> <|im_start|> <|im_end|> <|endoftext|> <s> </s> [INST] <|eot_id|>",
)
SAMPLES, SAMPLE_TOKENS = 8, 64  # responses and most tokens of each that check_models samples from either model
KL_WARNING = 1.0  # nats a token: the student's own tokens are then e times likelier to it than to the teacher
LOGPROB_WARNING = 1.0  # nats a token: a model that can read its prompt is surer than that of its greedy answers
LOGPROB_DROP_WARNING = 0.1  # nats a token, teacher behind the student's prompt instead of its own


@dataclass
class Report:
    """What was found. `errors` hold (name, message) and end the run at `settle` unless `force` is set."""

    force: bool
    errors: list = field(default_factory=list)
    forced: list = field(default_factory=list)  # errors that --force let pass
    warnings: list = field(default_factory=list)
    figures: dict = field(default_factory=dict)

    def error(self, name: str, message: str) -> None:
        self.errors.append((name, message))

    def warn(self, name: str, message: str) -> None:
        self.warnings.append(f"{name}: {message}")
        print(f"preflight warning, {name}: {message}", flush=True)

    def settle(self) -> None:
        """Raise UsageError with the first error and the names of the others; under --force print them all."""
        if self.errors and not self.force:
            others = ", ".join(dict.fromkeys(name for name, _ in self.errors[1:]))
            more = f" (next: {others})" if others else ""
            raise UsageError(f"preflight, {': '.join(self.errors[0])}; --force goes on all the same{more}")
        for name, message in self.errors:
            self.forced.append(f"{name}: {message}")
            print(f"preflight warning, forced, {name}: {message}", flush=True)
        self.errors.clear()


def check_tokenizers(args, teacher_tokenizer, student_tokenizer, problems) -> Report:
    """Everything that can be checked without weights. Prints the rendered prompts of the first of `problems`.

    Raises UsageError for the first check that fails, unless args.force."""
    report = Report(args.force)
    teacher = facts("--teacher", args.teacher, teacher_tokenizer, args.teacher_thinking)
    student = facts("--student", args.student, student_tokenizer, args.thinking)
    check_special_tokens(report, teacher, student)
    check_vocabulary(report, teacher, student, [problem.text for problem in problems[:64]])
    check_end_of_turn(report, teacher, student)
    check_thinking(report, teacher, student)

    prompts = [
        one.tokenizer.decode(render_prompt(one.tokenizer, problems[0], args.instruction, one.thinking, one.flag))
        for one in (teacher, student)
    ]
    if prompts[0] == prompts[1]:
        print(f"preflight: teacher and student read the same prompt, {shorten(prompts[0])}")
    else:
        print(f"preflight: teacher's prompt {shorten(prompts[0])}\npreflight: student's prompt {shorten(prompts[1])}")
        report.warn(
            "prompt",
            f"teacher and student render other prompts, from {shorten(difference(*prompts))} on: each reads its own",
        )
    report.settle()
    return report


def facts(flag: str, path: str, tokenizer, thinking: bool) -> SimpleNamespace:
    """What the checks need of one model: ids that end its responses, what its template puts where."""
    try:
        config = from_hub(lambda: AutoConfig.from_pretrained(path, trust_remote_code=False), path)
    except Exception as error:  # of whatever kind: what a config that makes no sense makes a library raise
        raise explain_missing(flag, path, error) from None
    try:
        generation_config = from_hub(lambda: GenerationConfig.from_pretrained(path), path)
    except OSError:  # there is no generation_config.json: transformers takes the model's config
        generation_config = GenerationConfig.from_model_config(config)
    except ValueError as error:
        raise explain_missing(flag, path, error) from None
    stops = eos_token_ids(generation_config.eos_token_id, tokenizer)

    probe = Problem("12+34?", (), None, "a short problem")
    turns = [{"role": role, "content": probe.text} for role in ("user", "assistant")]
    try:
        behind_answer = apply_template(tokenizer, turns, enable_thinking=thinking).rpartition(probe.text)[2]
    except Exception:  # a template may refuse what it is never asked for in training
        behind_answer = ""
    turn_end = tokenizer(behind_answer.strip(), add_special_tokens=False)["input_ids"][:1]
    special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    prompts = {choice: render_text(tokenizer, probe, "", choice, flag) for choice in (False, True)}
    openings = {choice: prompt.rpartition(probe.text)[2] for choice, prompt in prompts.items()}
    return SimpleNamespace(
        flag=flag,
        path=path,
        tokenizer=tokenizer,
        thinking=thinking,
        vocab=tokenizer.get_vocab(),
        special={tokenizer.convert_ids_to_tokens(i) for i in special},
        vocab_size=config.get_text_config().vocab_size,
        stops=stops,
        turn_end=turn_end[0] if turn_end and turn_end[0] in special else None,
        opening=openings[thinking],  # between the end of the user's message and the response
        heeds_thinking=openings[False] != openings[True],
    )


def check_special_tokens(report, teacher, student) -> None:
    """The tokens that end turns and open messages have one id each."""
    for token in sorted(teacher.special | student.special):
        ids = teacher.vocab.get(token), student.vocab.get(token)
        if None not in ids and ids[0] != ids[1]:
            report.error(
                "special_token",
                f"{token!r} is id {ids[0]} for --teacher and {ids[1]} for --student; choose both from one model family",
            )
            return


def check_vocabulary(report, teacher, student, texts) -> None:
    """One mapping from ids to text, the same ids for the same text, and an embedding for every id."""
    both = teacher.vocab.keys() & student.vocab.keys()
    differing = sorted(token for token in both if teacher.vocab[token] != student.vocab[token])
    missing = sorted(teacher.vocab.keys() ^ student.vocab.keys())
    if differing or missing:
        what = f"map {len(differing)} tokens to different ids (for example {differing[0]!r})" if differing else ""
        lacking = f"one has {len(missing)} tokens that the other lacks (for example {missing[0]!r})" if missing else ""
        report.error(
            "vocabulary",
            f"--teacher and --student {what}{' and ' * bool(what and lacking)}{lacking}: token-level distillation needs "
            f"one tokenizer; choose both from one model family",
        )
    else:
        for text in (*PROBE, *texts):
            ids = [one.tokenizer(text, add_special_tokens=False)["input_ids"] for one in (teacher, student)]
            if ids[0] != ids[1]:
                report.error(
                    "probe_text",
                    f"--teacher and --student split {shorten(text)} into different ids, {ids[0][:6]}... and "
                    f"{ids[1][:6]}...: their tokenizers normalise or merge differently; give both folders the same "
                    f"tokenizer.json",
                )
                break
    for one in (teacher, student):
        if max(one.vocab.values()) >= one.vocab_size:
            report.error(
                "vocabulary_size",
                f"{one.flag} {one.path}: its tokenizer has ids up to {max(one.vocab.values())}, its model only "
                f"{one.vocab_size} embeddings; give the folder the tokenizer that belongs to the model",
            )
    if teacher.vocab_size != student.vocab_size:
        print(
            f"preflight: vocabulary sizes {teacher.vocab_size} (teacher) and {student.vocab_size} (student) differ by "
            f"padding; the ids that both have are compared"
        )


def names(one) -> str:
    return " or ".join(repr(one.tokenizer.convert_ids_to_tokens(i)) for i in one.stops)


def never_ends(one) -> bool:
    return one.turn_end is not None and one.turn_end not in one.stops


def warn_of_end(report, one) -> None:
    """What may keep a single model's responses from ending."""
    if never_ends(one):
        end = one.tokenizer.convert_ids_to_tokens(one.turn_end)
        report.warn(
            "end_of_turn",
            f"{one.flag} {one.path} stops at {names(one)} while its chat template ends a turn with {end!r}, as a base "
            f"checkpoint does: watch charts/truncated_frac",
        )
    if one.turn_end is None:
        report.warn(
            "end_of_turn", f"{one.flag} {one.path}: its chat template puts no special token behind an answer to check"
        )


def warn_of_base(flag: str, path: str, tokenizer, thinking: bool, prompts: list[list[int]]) -> None:
    """For a script of one model: print whether its responses may not end, as a base checkpoint's. Raises UsageError where
    the model lacks an embedding for an id in one of the `prompts`."""
    one, largest = facts(flag, path, tokenizer, thinking), max(max(ids) for ids in prompts)
    require(
        largest < one.vocab_size,
        f"{flag} {path}: a prompt has the id {largest}, its model only {one.vocab_size} embeddings; give the folder the "
        f"tokenizer that belongs to the model",
    )
    warn_of_end(Report(force=True), one)


def check_end_of_turn(report, teacher, student) -> None:
    """Responses of both end with the same ids, and with what the chat template puts behind an answer."""
    for one, other in ((student, teacher), (teacher, student)):
        end = one.tokenizer.convert_ids_to_tokens(one.turn_end) if one.turn_end is not None else None
        if never_ends(one) and one.stops != other.stops:
            report.error(
                "base_against_instruct",
                f"{one.flag} {one.path} looks like a base checkpoint beside an instruct {other.flag}: it stops at "
                f"{names(one)}, its chat template ends a turn with {end!r}, and {other.flag} stops at {names(other)}; use "
                f"the instruct checkpoint, or set eos_token in tokenizer_config.json and eos_token_id in "
                f"generation_config.json to {end!r}",
            )
            return
        warn_of_end(report, one)
    eos = teacher.tokenizer.eos_token_id, student.tokenizer.eos_token_id
    if teacher.stops != student.stops or eos[0] != eos[1]:
        report.error(
            "eos",
            f"--teacher ends a turn with {names(teacher)} and --student with {names(student)}: use two instruct "
            f"checkpoints, or set the same eos_token in tokenizer_config.json and eos_token_id in generation_config.json",
        )
    elif None not in (teacher.turn_end, student.turn_end) and teacher.turn_end != student.turn_end:
        ends = [one.tokenizer.convert_ids_to_tokens(one.turn_end) for one in (teacher, student)]
        report.error(
            "chat_template",
            f"the template of --teacher ends a turn with {ends[0]!r}, that of --student with {ends[1]!r}; give both the "
            f"same chat_template.jinja",
        )


def check_thinking(report, teacher, student) -> None:
    """The response starts inside a thinking block for both models or for neither."""
    opens = [one.opening.rfind("<think>") > one.opening.rfind("</think>") for one in (teacher, student)]
    flags_differ = teacher.thinking != student.thinking and (teacher.heeds_thinking or student.heeds_thinking)
    if flags_differ or opens[0] != opens[1]:
        openings = " and ".join(repr(one.opening[-60:]) for one in (teacher, student))
        report.error(
            "thinking",
            f"thinking is on for one of the two: a response follows {openings} (teacher and student); give both "
            f"--thinking and --teacher-thinking or neither, or choose checkpoints whose templates agree",
        )
    for one in (teacher, student):
        flag = "--thinking" if one is student else "--teacher-thinking"
        if one.thinking and not one.heeds_thinking:
            report.warn("thinking", f"{flag} changes nothing: the chat template of {one.flag} knows no enable_thinking")


@torch.no_grad()
def check_models(
    args, report, run, model, teacher, tokenizer, teacher_tokenizer, prompts, teacher_prompts, warmup=False
) -> None:
    """Short responses to the first of `prompts`, greedy ones of the teacher and sampled ones of the student. What was found
    goes into the run.json of `run`; under --preflight-only there is none, and this is the end.

    warmup: the run is itself the warmup, so a large KL is no warning. Draws from generators of its own, so training is
    the same with and without. Raises UsageError unless args.force where a model is broken or disagrees with itself."""
    device, dtype = device_and_dtype(args.dtype)
    prompts, teacher_prompts = prompts[:SAMPLES], teacher_prompts[:SAMPLES]
    sampling = {
        "max_response_tokens": min(args.max_response_tokens, SAMPLE_TOKENS),
        "batch_tokens": args.rollout_batch_tokens,
    }
    greedy = HFSampler(teacher, teacher_tokenizer, dtype, temperature=0, **sampling).sample(teacher_prompts, 1)
    sampled = HFSampler(model, tokenizer, dtype, temperature=args.temperature, **sampling).sample(prompts, 1, (args.seed,))

    def hidden(one, prompts, responses):
        with autocast(device, dtype):
            return response_hidden(one, prompts, [r.ids for r in responses])  # (N, H), (V, H), (N,)

    def teacher_logprob(prompts):
        states, head, ids = hidden(teacher, prompts, greedy)
        with autocast(device, dtype):
            return float(fused_linear_logprob(states, head, ids)[0].mean())

    def divergence(states, head, target):
        with autocast(device, dtype):
            _, stats = fused_linear_divergence(states, head, target, temperature=args.temperature)
        return float(stats.reverse_kl.mean())

    states, teacher_head, _ = hidden(teacher, teacher_prompts, sampled)
    target = TeacherHead(states, teacher_head)
    student_states, head, _ = hidden(model, prompts, sampled)
    figures = {
        "teacher_logprob": teacher_logprob(teacher_prompts),
        "teacher_logprob_student_prompt": teacher_logprob(prompts),
        "self_kl": divergence(states, teacher_head, target),
        "reverse_kl": divergence(student_states, head, target),
    }
    report.figures |= figures
    parallel.reshard(model)
    parallel.reshard(teacher)
    own, behind_student, self_kl, reverse_kl = figures.values()
    print(
        f"preflight: teacher's greedy answers have logprob {own:.3f} a token, {behind_student:.3f} behind the student's "
        f"prompt; KL(student || teacher) {reverse_kl:.4f} a token on {sum(len(r.ids) for r in sampled)} tokens",
        flush=True,
    )

    tolerance = 1e-2 if dtype == torch.bfloat16 else 1e-4
    if not all(map(math.isfinite, figures.values())):
        report.error(
            "weights", f"a model gives nan or inf ({figures}); look for a damaged checkpoint of --teacher or --student"
        )
    elif abs(self_kl) > tolerance:
        report.error("self_kl", f"the teacher differs from itself by {self_kl:.2g} nats a token; try --dtype float32")
    elif args.teacher == args.student and prompts == teacher_prompts and abs(reverse_kl) > tolerance:
        report.error(
            "self_kl", f"--teacher is --student, yet they differ by {reverse_kl:.2g} nats a token; try --dtype float32"
        )
    if own < -LOGPROB_WARNING:
        report.warn(
            "teacher_logprob",
            f"--teacher gives its own greedy answers {own:.2f} nats a token: it may not know its chat template; "
            f"use an instruct checkpoint",
        )
    if behind_student < own - LOGPROB_DROP_WARNING:
        report.warn(
            "teacher_logprob",
            f"--teacher finds its own answers {own - behind_student:.2f} nats a token less likely behind the student's "
            f"prompt: the templates mean different things to it; compare the two prompts above",
        )
    if reverse_kl > KL_WARNING and not warmup:
        report.warn(
            "reverse_kl",
            f"KL(student || teacher) is {reverse_kl:.2f} nats a token before the first step, above {KL_WARNING}: run "
            f"fkl_warmup.py first and give its checkpoint as --student",
        )
    report.settle()
    if parallel.rank() == 0:
        with tempfile.TemporaryDirectory() as folder:
            try_save(model, tokenizer, folder, dtype)
    if args.preflight_only:
        print("preflight: nothing stands in the way" if not report.forced else "preflight: goes on by --force alone")
        raise SystemExit(0)
    run.note(preflight={"forced": report.forced, "warnings": report.warnings, **figures})


def shorten(text: str, most: int = 300) -> str:
    """`text` quoted on one line, its middle left out where it is longer than `most` characters."""
    return repr(text if len(text) <= most else f"{text[: most // 2]} [...] {text[-most // 2 :]}")


def difference(a: str, b: str) -> str:
    """The rest of `b` (or of `a`, where b is its beginning) from the first character that differs."""
    start = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    return (b[start:] or a[start:])[:60]
