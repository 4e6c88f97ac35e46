# docs: docs/kernels.md
"""Time, memory and gradient error of the fused linear divergence beside naive torch, Liger, TRL and bare products.

    python benchmarks/kernels.py                         the sizes for this machine: a GPU's, or a small CPU run
    python benchmarks/kernels.py --tokens 512 --vocab 151936 --student-hidden 256 --teacher-hidden 256 --out FILE

Correctness first: each contestant's gradients against float64 on a few tokens. Then time: one round runs every
contestant once, `--rounds` rounds, medians; a ratio is the median over rounds of the ratio within a round, so a machine
that slows down for a while does not decide it. Then memory: the peak of one loss + backward beyond the inputs, after one
that loaded and compiled what there is to, on a CPU in a process of its own; and what of it is not the gradients, which
every implementation must return. Prints a table and one line of JSON; `--out` appends both to a Markdown file.
"""

import ctypes
import gc
import json
import platform
import shlex
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
from kernels import TeacherHead, TeacherLogits, divergence_from_logits, fused_linear_divergence
from kernels.divergence_torch import reference_divergence
from kernels.linear import empty_logits, operand_dtype, project, reduce_grads, rows_per_chunk

BETA = {"forward_kl": 0.0, "reverse_kl": 1.0, "jsd": 0.5}  # the generalised JSD of TRL and Liger ends in the KLs


@dataclass
class Args:
    tokens: int | None = None
    """N; default 8192 on a GPU, 256 on a CPU"""
    vocab: int | None = None
    """V; default 151936 on a GPU, 32768 on a CPU"""
    student_hidden: int | None = None
    """default 2048 (Qwen3-1.7B) on a GPU, 256 on a CPU"""
    teacher_hidden: int | None = None
    """default 4096 (Qwen3-8B) on a GPU, 256 on a CPU"""
    kinds: tuple[str, ...] = ("forward_kl", "reverse_kl", "jsd")
    """divergences to run"""
    contestants: tuple[str, ...] = (
        "ours", "naive", "naive compiled", "liger fused", "liger chunked", "trl", "products",
    )  # fmt: skip
    """what to run; a missing package is reported, not an error"""
    rounds: int = 7
    """timed rounds, after one that is not counted"""
    closeness: float = 0.3
    """standard deviation of the teacher's logits around the student's, whose own is 3"""
    workspace_mb: int | None = None
    """our workspace; default the library's"""
    equal_workspace: bool = True
    """on a CPU: give ours the workspace that TRL's two tiles take"""
    frozen_head: bool = False
    """no gradient for the student's head"""
    memory: bool = True
    """measure peak memory"""
    seed: int = 0
    out: str | None = None
    """append the table and the JSON line to this Markdown file"""
    title: str = ""
    """heading of the entry in that file"""
    # filled in at runtime
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    """cuda (bf16) or cpu (fp32)"""
    memory_of: tuple[str, ...] = ()
    """internal: print the peak memory of (contestant, kind) and stop"""

    def __post_init__(self):
        gpu = self.device == "cuda"
        sizes = dict(tokens=(8192, 256), vocab=(151936, 32768), student_hidden=(2048, 256), teacher_hidden=(4096, 256))
        for name, (large, small) in sizes.items():
            if getattr(self, name) is None:
                setattr(self, name, large if gpu else small)
        if self.teacher_hidden < self.student_hidden:
            raise ValueError("--teacher-hidden must be at least --student-hidden: the teacher extends the student")
        if self.workspace_mb is None and self.equal_workspace and not gpu:
            self.workspace_mb = -(-2 * 4 * min(self.tokens, 4096) * min(self.vocab, 32768) >> 20)

    @property
    def workspace_bytes(self):
        return None if self.workspace_mb is None else self.workspace_mb << 20


# ---------------------------------------------------------------------------------------------------------------------
# Contestants: each gives a function (student_hidden, student_weight, teacher_hidden, teacher_weight) -> mean divergence
# ---------------------------------------------------------------------------------------------------------------------


def ours(kind, args):
    def loss(x, head, target, teacher_head):
        weight = torch.full((len(x),), 1 / len(x), device=x.device)
        return fused_linear_divergence(
            x, head, TeacherHead(target, teacher_head), kind=kind, weight=weight, workspace_bytes=args.workspace_bytes
        )[0]

    return loss


def naive(kind, args):
    def loss(x, head, target, teacher_head):
        log_ps = torch.log_softmax((x @ head.T).float(), -1)
        with torch.no_grad():
            log_pt = torch.log_softmax((target @ teacher_head.T).float(), -1)
        if kind == "forward_kl":
            return (log_pt.exp() * (log_pt - log_ps)).sum(-1).mean()
        if kind == "reverse_kl":
            return (log_ps.exp() * (log_ps - log_pt)).sum(-1).mean()
        log_m = torch.logaddexp(log_ps, log_pt) - 0.6931471805599453
        kl_student, kl_teacher = log_ps.exp() * (log_ps - log_m), log_pt.exp() * (log_pt - log_m)
        return (0.5 * kl_student + 0.5 * kl_teacher).sum(-1).mean()

    return loss


def naive_compiled(kind, args):
    return torch.compile(naive(kind, args), dynamic=False)


def liger_fused(kind, args):
    from liger_kernel.transformers.fused_linear_jsd import LigerFusedLinearJSD

    loss = LigerFusedLinearJSD(jsd_beta=BETA[kind])
    return lambda x, head, target, teacher_head: loss(x, head, target, teacher_head, None)


def liger_chunked(kind, args):
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    # the defaults add a cross-entropy to labels: off
    loss = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=BETA[kind])
    return lambda x, head, target, teacher_head: loss(
        x, head, target, teacher_head, torch.zeros(len(x), dtype=torch.long, device=x.device)
    )


def trl(kind, args):
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    return lambda x, head, target, teacher_head: ChunkedDivergenceFunction.apply(
        x, head, None, target, teacher_head, None, BETA[kind]
    )[0].mean()


class Products(torch.autograd.Function):
    """The four products alone, with our chunks, buffers and dtypes: what no fused loss can go below."""

    @staticmethod
    def forward(ctx, x, head, target, teacher_head, workspace_bytes):
        operand, V = operand_dtype(x), len(head)
        in_place = x.device.type == "cpu"
        C = rows_per_chunk(len(x), V * (8 + (0 if in_place else operand.itemsize)), workspace_bytes, x.device)
        zs, zt = (empty_logits(C, V, torch.float32, x.device) for _ in range(2))
        dz = zs if in_place else empty_logits(C, V, operand, x.device).zero_()
        dx, dhead = torch.empty_like(x), None
        if ctx.needs_input_grad[1]:
            dhead = torch.zeros_like(head, dtype=torch.float32)
        for start in range(0, len(x), C):
            rows = slice(start, min(start + C, len(x)))
            c = rows.stop - start
            project(x[rows], head, zs[:c])
            project(target[rows], teacher_head, zt[:c])
            dx[rows] = reduce_grads(dz[:c], x[rows], head, True, dhead)
        ctx.save_for_backward(dx, dhead)
        return dx.new_zeros((), dtype=torch.float32)

    @staticmethod
    def backward(ctx, grad):
        dx, dhead = ctx.saved_tensors
        return dx, None if dhead is None else dhead.to(dx.dtype), None, None, None


def products(kind, args):
    return lambda *inputs: Products.apply(*inputs, args.workspace_bytes)


CONTESTANTS = {
    "ours": ours,
    "naive": naive,
    "naive compiled": naive_compiled,
    "liger fused": liger_fused,
    "liger chunked": liger_chunked,
    "trl": trl,
    "products": products,
}


# ---------------------------------------------------------------------------------------------------------------------
# Measuring
# ---------------------------------------------------------------------------------------------------------------------


def make_inputs(args, tokens=None):
    """Student logits of standard deviation 3; the teacher's are those plus noise of standard deviation `closeness`."""
    tokens = tokens or args.tokens
    generator = torch.Generator(args.device).manual_seed(args.seed)
    dtype = torch.bfloat16 if args.device == "cuda" else torch.float32

    def randn(rows, columns, scale):
        return torch.randn(rows, columns, generator=generator, device=args.device, dtype=dtype).mul_(scale)

    Hs, Ht, V = args.student_hidden, args.teacher_hidden, args.vocab
    x, head = randn(tokens, Hs, 1.0), randn(V, Hs, 3 / Hs**0.5)
    noise = args.closeness / 3
    target, teacher_head = randn(tokens, Ht, 1.0), randn(V, Ht, 3 / Hs**0.5 * noise)
    target[:, :Hs].mul_(noise).add_(x)
    teacher_head[:, :Hs].add_(head)
    return [x.requires_grad_(), head.requires_grad_(not args.frozen_head), target, teacher_head]


def step(loss_function, inputs):
    """-> the gradients of what requires one: the hidden states, and the head unless it is frozen."""
    return torch.autograd.grad(loss_function(*inputs), [t for t in inputs if t.requires_grad])


def reference_grads(kind, args):
    """In float64, over as many tokens as float64 logits fit easily."""
    inputs = make_inputs(args, tokens=min(args.tokens, 64))
    wide = [t.detach().double().requires_grad_(t.requires_grad) for t in inputs]

    def loss(x, head, target, teacher_head):
        return reference_divergence(x @ head.T, target @ teacher_head.T, kind, 0.5).mean()

    return inputs, step(loss, wide)


def gradient_errors(loss_function, inputs, references):
    """Relative errors of dX and dW."""
    grads = step(loss_function, inputs)
    return [((g - r).norm() / r.norm()).item() for g, r in zip(grads, references, strict=True)]


def median_ratio(these, others):
    return statistics.median(a / b for a, b in zip(these, others, strict=True))


def synchronize(args):
    if args.device == "cuda":
        torch.cuda.synchronize()


def time_once(function, args):
    """Milliseconds; of CPU time where there is one thread, which other jobs on the machine lengthen less."""
    clock = time.process_time if args.device == "cpu" and torch.get_num_threads() == 1 else time.perf_counter
    synchronize(args)
    start = clock()
    function()
    synchronize(args)
    return 1e3 * (clock() - start)


def peak_memory_mb(name, kind, args):
    """Peak of one loss + backward beyond what was there before it. The first such step loads and compiles code."""
    loss_function = CONTESTANTS[name](kind, args)
    inputs = make_inputs(args)
    compiled = name in ("naive compiled", "liger chunked")
    small = [t[:2].detach().requires_grad_(t.requires_grad) for t in inputs]
    step(loss_function, inputs if compiled or args.device == "cuda" else small)
    gc.collect()
    if args.device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step(loss_function, inputs)
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    ctypes.CDLL(None).malloc_trim(0)  # freed memory goes back to the system, so that it counts again when it is used
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again from VmRSS
    before = process_memory_mb("VmRSS")
    step(loss_function, inputs)
    return process_memory_mb("VmHWM") - before


def process_memory_mb(field):
    """VmRSS, now, or VmHWM, the highest yet (Linux). getrusage's figure would start from the parent process's."""
    status = Path("/proc/self/status").read_text()
    return int(status.split(field + ":")[1].split()[0]) / 2**10


def peak_memory_in_own_process(name, kind, args):
    command = [sys.executable, __file__, "--memory-of", name, kind]
    for field in ("tokens", "vocab", "student_hidden", "teacher_hidden", "workspace_mb", "device"):
        if getattr(args, field) is not None:
            command += [f"--{field.replace('_', '-')}", str(getattr(args, field))]
    command += ["--frozen-head"] * args.frozen_head + ["--no-equal-workspace"] * (not args.equal_workspace)
    done = subprocess.run(command, capture_output=True, text=True)
    return float(done.stdout.split()[-1]) if done.returncode == 0 else None


def copy_bandwidth(args):
    """Bytes read and written per second by a plain copy, in GB/s."""
    source = torch.ones((1 << 30 if args.device == "cuda" else 1 << 26) // 4, device=args.device)
    target = torch.empty_like(source).copy_(source)
    return 2 * source.nbytes / statistics.median(time_once(lambda: target.copy_(source), args) for _ in range(9)) / 1e6


def logits_kernel_bandwidth(args):
    """The same figure for divergence_from_logits: both logits read twice, the gradient written once."""
    dtype = torch.bfloat16 if args.device == "cuda" else torch.float32
    zs = torch.randn(args.tokens, args.vocab, device=args.device, dtype=dtype).requires_grad_()
    zt = torch.randn(args.tokens, args.vocab, device=args.device, dtype=dtype)

    def run():
        divergence_from_logits(zs, TeacherLogits(zt))

    run()
    return 5 * zs.nbytes / statistics.median(time_once(run, args) for _ in range(5)) / 1e6


def time_alternating(losses, missing, args):
    """-> name: milliseconds of each round, the first one left out."""
    inputs = make_inputs(args)
    times = {name: [] for name in losses}
    for _ in range(args.rounds + 1):
        for name, function in list(losses.items()):
            try:
                times[name].append(time_once(partial(step, function, inputs), args))
            except torch.OutOfMemoryError:
                missing[name] = "out of memory"
                del losses[name]
            gc.collect()
    return {name: times[name][1:] for name in losses}


def machine(args):
    if args.device == "cuda":
        return torch.cuda.get_device_name()
    models = [line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")]
    return f"{models[0] if models else platform.processor()}, {torch.get_num_threads()} thread(s)"


def main(args):
    torch.manual_seed(args.seed)
    if args.memory_of:
        print(peak_memory_mb(*args.memory_of, args))
        return
    results, missing = [], {}
    for kind in args.kinds:
        losses = {}
        for name in args.contestants:
            try:
                losses[name] = CONTESTANTS[name](kind, args)
            except ImportError as error:
                missing[name] = f"not installed ({error.name or error})"
        inputs, references = reference_grads(kind, args)
        errors = {}
        for name, function in list(losses.items()):
            try:
                errors[name] = None if name == "products" else gradient_errors(function, inputs, references)
            except Exception as error:  # a peer that does not run here must not end the comparison
                missing[name] = f"failed: {str(error).splitlines()[0][:80]}"
                del losses[name]
            gc.collect()
        del references
        times = time_alternating(losses, missing, args)
        for name in losses:
            ms = times[name]
            memory = None
            if args.memory:
                measure = peak_memory_mb if args.device == "cuda" else peak_memory_in_own_process
                memory = measure(name, kind, args)
            results.append(
                dict(
                    kind=kind, name=name, ms=statistics.median(ms), memory_mb=memory, errors=errors[name],
                    ours_over_this=median_ratio(times["ours"], ms) if "ours" in times else None,
                )
            )  # fmt: skip

    # dX and dW, which every implementation must return, in the inputs' dtype
    element = 2 if args.device == "cuda" else 4
    gradients_mb = element * args.student_hidden * (args.tokens + (0 if args.frozen_head else args.vocab)) / 2**20
    naive_memory = {r["kind"]: r["memory_mb"] for r in results if r["name"] == "naive"}
    lines = [
        "| divergence | implementation | ms | ours takes | peak MB | of naive's | less gradients MB | of naive's "
        "| error of dX | error of dW |",
        "|" + 10 * "---|",
    ]
    for r in results:
        cells = [r["kind"], r["name"], f"{r['ms']:.1f}", f"{r['ours_over_this']:.2f} x" if r["ours_over_this"] else ""]
        peak, naive_peak = r["memory_mb"], naive_memory.get(r["kind"])
        for beside in (0, gradients_mb):
            cells += [f"{peak - beside:.0f}" if peak else ""]
            cells += [f"{(peak - beside) / (naive_peak - beside):.2f}" if peak and naive_peak else ""]
        cells += [f"{e:.1e}" for e in r["errors"] or ()]
        lines.append("| " + " | ".join(cells + [""] * (10 - len(cells))) + " |")
    bandwidth = dict(copy_gb_s=copy_bandwidth(args), from_logits_gb_s=logits_kernel_bandwidth(args))
    notes = [f"{name}: {why}" for name, why in missing.items()]
    notes.append("copy {copy_gb_s:.1f} GB/s, divergence_from_logits {from_logits_gb_s:.1f} GB/s".format(**bandwidth))
    where = f"{machine(args)}; torch {torch.__version__}; N = {args.tokens}, V = {args.vocab}, "
    where += f"hidden {args.student_hidden} and {args.teacher_hidden}{', head frozen' if args.frozen_head else ''}; "
    where += f"gradients {gradients_mb:.0f} MB; "
    where += f"workspace {args.workspace_mb or 'default'} MB; {args.rounds} rounds"
    summary = dict(asdict(replace(args, out=None)), machine=machine(args), torch=torch.__version__, results=results,
                   gradients_mb=gradients_mb, missing=missing, **bandwidth)  # fmt: skip
    text = "\n".join([where, "", *lines, "", *notes])
    print(text)
    print(json.dumps(summary))
    if args.out:
        command = "python benchmarks/kernels.py " + shlex.join(sys.argv[1:])
        with open(args.out, "a") as file:
            file.write(f"\n## {args.title}\n\n    {command}\n\n{text}\n\n```json\n{json.dumps(summary)}\n```\n")


if __name__ == "__main__":
    import tyro

    main(tyro.cli(Args, description=__doc__))
