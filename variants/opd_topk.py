# docs/variants.md
"""OPD from a teacher behind a server: opd.py with the top K of the teacher's distribution in place of all of it.

The teacher is not in this process. A server that speaks vLLM's OpenAI-compatible API scores the responses: at every token
the K likeliest ids and their log-probabilities. The rest of the teacher's distribution is one more outcome, "any other id",
for both. No weights of it are loaded: --plan and run.json count none, and in place of opd.py's preflight a few ids are
scored first. The teacher reads the student's rendering of the prompts.

    python variants/opd_topk.py --teacher-url http://host:8000/v1 --teacher-model Qwen/Qwen3-32B --student ckpt/warmup

The server: vllm serve Qwen/Qwen3-32B --max-logprobs 20 (or whatever --top-k is).
"""

import json
import sys
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Literal

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))  # the repository's root

import common
from infra import batches, cli, dataset, models, parallel, plan, run_folder, telemetry
from infra.cli import RunStopped, UsageError, require
from infra.hub import RETRY_WAITS, first_line
from infra.meter import Meter
from infra.prompts import render_prompts
from infra.reward import make_grader
from infra.samples_page import Samples
from kernels import TeacherTopK, fused_linear_divergence

SERVER_TIMEOUT = 600  # seconds for one response


@dataclass(kw_only=True)
class Args(common.RunArgs, common.RolloutArgs):
    teacher_url: str
    """where the teacher's server answers, up to and with /v1: http://host:8000/v1"""
    teacher_model: str
    """name under which it serves the teacher"""
    student: str
    """policy to train: hub id or local folder; same tokenizer as the teacher"""
    out: str = "ckpt/opd_topk"
    """output folder: Hugging Face checkpoint, metrics.jsonl, run.json"""
    teacher_requests: int = 16
    """responses at the server at a time"""

    # algorithm
    top_k: int = 20
    """ids of the teacher's distribution at every token; the server must allow as many (vllm serve --max-logprobs)"""
    prompts_per_step: int = 256
    """problems sampled per step, one response each"""
    epochs: int = 15
    """passes over the problems"""
    max_steps: int | None = None
    """stop after so many steps instead"""
    learning_rate: float | None = None
    """AdamW's; none: 1e-6, with --lora-rank 1e-5"""
    learning_rate_warmup_steps: int = 0
    """steps over which the learning rate rises to that"""
    learning_rate_decay: Literal["none", "linear", "cosine"] = "none"
    """how it falls from there towards 0 at the last step"""
    weight_decay: float = 0.1
    """AdamW's decoupled weight decay"""
    max_grad_norm: float = 1.0
    """gradient clipping"""
    loss: Literal["reverse_kl", "forward_kl", "jsd"] = "reverse_kl"
    """reverse_kl: KL(student || teacher); forward_kl: KL(teacher || student); jsd: between the two"""
    jsd_beta: float = 0.5
    """jsd's weight of the teacher in the mixture: 0 is forward_kl, 1 is reverse_kl"""


def main(args: Args) -> None:
    # ---- what was typed, and whether it fits this machine
    common.check(args, positive="prompts_per_step top_k teacher_requests")
    require(args.temperature == 1, f"--temperature {args.temperature}: the server's log-probabilities are at 1; use that")
    require(0 <= args.jsd_beta <= 1, f"--jsd-beta {args.jsd_beta}: must lie between 0 and 1")
    student = plan.Sizes.read(args.student, "--student")
    plan.check(args, plan.Workload(student, {}, student, args.prompts_per_step))

    # ---- problems and prompts
    grader = make_grader(args.grader)  # for --eval-data and the samples
    problems = dataset.load_problems(args.train_data, "--train-data", need_answers=False, **dataset.columns(args))
    tokenizer = models.load_tokenizer(args.student, "--student")
    problems, [prompts] = render_prompts(args, problems, [tokenizer], [args.thinking])
    check_teacher(args, tokenizer, student.config.vocab_size, max(map(len, prompts)))
    eval_set = common.load_eval(args, tokenizer, problems, grader.uses_labels)
    total_steps = common.count_steps(args, len(problems), args.prompts_per_step, "--prompts-per-step")

    # ---- models, sampler, optimizer
    run = run_folder.Run(args, total_steps, problems)
    cli.seed_everything(args.seed)
    device, dtype = models.device_and_dtype(args.dtype)
    model = models.load_policy(args, args.student, "--student", device, dtype)
    if args.gradient_checkpointing:
        models.enable_gradient_checkpointing(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate, weight_decay=args.weight_decay, fused=True)
    stream = dataset.ProblemStream(len(problems), args.seed)
    start = run.resume(model, optimizer, stream)
    sampler = common.make_sampler(args, model, args.student, tokenizer, dtype, max(map(len, prompts + eval_set[1])))
    samples = Samples(run.out, tokenizer, args.sample_every, colour_by="reverse_kl")
    stop = run_folder.StopRules(args, run, model, tokenizer, dtype)
    stop.watch(sampler)
    [params] = models.count_params(model)

    if start == 0 and args.eval_every:
        run.log(0, common.evaluate(args, 0, False, sampler, tokenizer, grader, eval_set))
    for step in range(start + 1, total_steps + 1):
        optimizer.param_groups[0]["lr"] = common.learning_rate(args, step, total_steps)
        meter = Meter()

        # ---- rollout: the student answers
        batch = stream.take(args.prompts_per_step)
        responses = sampler.sample([prompts[i] for i in batch], 1, seed=(args.seed, step))
        sampler.sleep()
        out_of_vocab = sum(r.out_of_vocab for r in responses)
        answered = [(i, r) for i, r in zip(batch, responses, strict=True) if r.ids]
        if not answered:
            stop.stop(f"step {step}: every response begins with an id that no token has; look at --student's head")
        batch, responses = zip(*answered, strict=True)
        response_ids = [r.ids for r in responses]
        tokens = sum(map(len, response_ids))
        meter.lap("rollout")

        # ---- this rank's rows; it scores and trains on the same
        lengths = [len(prompts[i]) + len(r) for i, r in zip(batch, response_ids, strict=True)]
        micro_batches = parallel.share(batches.micro_batches(lengths, args.micro_batch_tokens))

        # ---- score: the teacher reads the answers, several at a time
        mine = [k for rows in micro_batches for k in rows]
        ends = [(prompts[batch[k]], response_ids[k]) for k in mine]
        try:
            with ThreadPoolExecutor(args.teacher_requests) as pool:
                top_k = pool.map(lambda pair: score(args, student.config.vocab_size, *pair), ends)
                scored = dict(zip(mine, top_k, strict=True))  # of each response (R, K)
        except UsageError as error:  # no rank saves alone: what there is to go on from is the last checkpoint
            run.note(stopped=f"step {step}: {error}")
            raise RunStopped(f"step {step}: {error}. Then run the same command with --resume") from None
        meter.lap("score")

        # ---- train: one optimizer step, gradients accumulated over micro-batches
        for rows in micro_batches:
            chosen_ids = [response_ids[k] for k in rows]
            with models.autocast(device, dtype):
                hidden, head, ids = batches.response_hidden(model, [prompts[batch[k]] for k in rows], chosen_ids)
                parts = zip(no_tokens(args.top_k), *(scored[k] for k in rows), strict=True)
                target = TeacherTopK(*(torch.cat(part).to(device) for part in parts))  # (N, K), (N, K)
                loss, stats = fused_linear_divergence(  # sum_n w_n D_n
                    hidden,  # (N, H)
                    head,  # (V, H)
                    target,
                    kind=args.loss,
                    jsd_beta=args.jsd_beta,
                    weight=torch.full(ids.shape, 1 / tokens, dtype=torch.float64, device=device),  # a mean over all tokens
                    temperature=args.temperature,
                    target_ids=ids,
                )
            meter.sum("losses/policy_loss", loss)
            telemetry.add_divergences(meter, stats, "reverse_kl", [len(r) for r in chosen_ids])
            meter.add("debug/teacher_tail", 1 - target.logprobs.exp().sum(1))
            reported = torch.tensor([lp for k in rows for lp in responses[k].sampler_logprobs], device=device)  # (N,)
            telemetry.add_sampler_difference(meter, stats.student_logprob, reported)
            samples.keep(step, rows, chosen_ids, **stats._asdict())
            # last: FSDP2's backward frees the head that was gathered. It averages over the ranks, hence the factor
            (loss * parallel.world_size()).backward()
        grad_norm = models.clip_gradients(model, args.max_grad_norm)
        stop.unless_finite(step, policy_loss=meter.total("losses/policy_loss"), grad_norm=grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        meter.lap("train")
        sampler.update_weights(model)
        meter.lap("sync")

        # ---- log
        read = tokens + sum(len(prompts[i]) for i in batch)  # by the student when it samples and trains
        flops = read * (2 * params + models.train_flops(model))
        run.spend(updates=1, sampled_tokens=tokens, flops=flops)
        metrics = meter.metrics() | telemetry.of_responses(responses)
        metrics |= {
            "charts/learning_rate": optimizer.param_groups[0]["lr"],
            "charts/tokens_per_sec": tokens / meter.laps["time/step"],
            "losses/grad_norm": grad_norm,
            "debug/canary_logprob_diff": sampler.canary_logprob_diff,
            "debug/out_of_vocab": out_of_vocab,
        }
        metrics |= common.evaluate(args, step, step == total_steps, sampler, tokenizer, grader, eval_set)
        run.log(step, metrics, "losses/reverse_kl")
        samples.write(step, [problems[i] for i in batch], responses, grader)
        stop.if_truncated(step, metrics["charts/truncated_frac"])
        run.checkpoint(step, model, optimizer, stream)

    grader.close()
    run.finish(model, tokenizer, dtype)


def check_teacher(args, tokenizer, vocabulary: int, longest_prompt: int) -> None:
    """Raise UsageError unless the server has the model, positions for the longest response, K log-probabilities, and, as far
    as some ids from all over the vocabulary can show, the student's tokenizer."""
    served = {model["id"]: model.get("max_model_len") for model in ask(args, "/models").get("data", [])}
    flag = f"--teacher-model {args.teacher_model}"
    require(args.teacher_model in served, f"{flag}: the server has {', '.join(served)}")
    limit = served[args.teacher_model]
    require(
        limit is None or longest_prompt + args.max_response_tokens < limit,
        f"--max-response-tokens {args.max_response_tokens}: with the longest prompt ({longest_prompt} tokens) and the one "
        f"that the server adds it exceeds the teacher's {limit} positions; lower it, or raise vllm serve's --max-model-len",
    )
    last = len(tokenizer) - 1
    probe = [*range(0, last, last // 50 + 1), last]
    for i, entry in zip(probe[1:], prompt_logprobs(args, vocabulary, probe[:1], probe[1:]), strict=True):
        texts = [(text or "").strip() for text in (entry[str(i)].get("decoded_token"), tokenizer.decode([i]))]
        require(
            texts[0] == texts[1] or "\ufffd" in "".join(texts),  # a part of a character, which is shown in other ways
            f"{flag}: its id {i} is {texts[0]!r}, --student's is {texts[1]!r}: token-level distillation needs one "
            f"tokenizer; choose both from one model family",
        )
    print(f"teacher: {args.teacher_model} answers, and {len(probe)} ids mean the same to it and to the student")


def no_tokens(K: int) -> TeacherTopK:
    return TeacherTopK(torch.zeros((0, K), dtype=torch.long), torch.zeros((0, K), dtype=torch.float64))


def score(args, vocabulary: int, prompt: list[int], response: list[int]) -> TeacherTopK:
    """The teacher's K likeliest ids at each token of `response`, (R, K) int64, and their log-probabilities, float64."""
    entries = prompt_logprobs(args, vocabulary, prompt, response)
    # the token itself comes on top of the K where it is not one of them
    rows = [sorted(entry.items(), key=lambda item: item[1]["rank"])[: args.top_k] for entry in entries]
    ids = torch.tensor([[int(i) for i, _ in row] for row in rows])
    return TeacherTopK(ids, torch.tensor([[one["logprob"] for _, one in row] for row in rows], dtype=torch.float64))


def prompt_logprobs(args, vocabulary: int, prompt: list[int], response: list[int]) -> list[dict]:
    """At each token of `response`, {id as a string: {"logprob", "rank", "decoded_token"}} of the K likeliest ids and of the
    token itself. Raises UsageError for an answer that does not fit."""
    body = {"model": args.teacher_model, "prompt": prompt + response, "max_tokens": 1, "temperature": 1}
    answer = ask(args, "/completions", body | {"prompt_logprobs": args.top_k})
    entries = (answer.get("choices", [{}])[0].get("prompt_logprobs") or [])[len(prompt) :]
    require(
        len(entries) == len(response) and all(len(entry) >= args.top_k for entry in entries),
        f"--teacher-url {args.teacher_url}: its answer lacks {args.top_k} prompt_logprobs a token; it must be vLLM's",
    )
    largest = max(int(i) for entry in entries for i in entry)
    require(
        largest < vocabulary,
        f"--teacher-model {args.teacher_model}: has an id {largest}, --student only {vocabulary} of them: token-level "
        f"distillation needs one tokenizer; choose both from one model family",
    )
    return entries


def ask(args, path: str, body: dict | None = None) -> dict:
    """The server's answer to a GET, or with `body` to a POST; asked again where a failure may pass. Raises UsageError."""
    flag = f"--teacher-url {args.teacher_url}"
    fix = f"--top-k {args.top_k} needs vllm serve --max-logprobs {args.top_k}" if body else "it should end in /v1"
    require(args.teacher_url.startswith(("http://", "https://")), f"{flag}: write it as http://host:8000/v1")
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(args.teacher_url.rstrip("/") + path, data, {"Content-Type": "application/json"})
    for wait in (*RETRY_WAITS, None):
        try:
            with urllib.request.urlopen(request, timeout=SERVER_TIMEOUT) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as error:
            text = " ".join(error.read().decode(errors="replace").split())[:300]
            require(error.code == 429 or error.code >= 500, f"{flag}: refuses {path} ({error.code} {text}); {fix}")
            failure = f"{error.code} {text}"
        except (OSError, HTTPException, ValueError) as error:  # no connection, one that breaks off, no JSON
            failure = first_line(error)
        if wait is not None:
            time.sleep(wait)
    raise UsageError(f"{flag}: no answer to {path} ({failure}); start the server, or give the address that it has")


if __name__ == "__main__":
    cli.run(main, Args)
