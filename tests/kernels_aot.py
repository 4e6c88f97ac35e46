"""Compiles every Triton kernel for sm_80 and sm_90 without a GPU: no spills, vector loads, no shuffles in the loops.

Run in its own process (the compiler and the interpreter do not share one). Prints registers and stack of each kernel.
"""

import re
import subprocess
import sys
import tempfile
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kernels import divergence_triton as divergence
from kernels import logprob_triton as logprob

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
SIZES = ("V", "zs_stride", "zt_stride", "z_stride", "dz_stride")  # multiples of 16 in our buffers


def compile_kernel(kernel, architecture, logits, num_warps, **constants):
    """As a launch would: pointers and sizes divisible by 16, else the compiler does not vectorise."""
    types = {}
    for name in kernel.arg_names:
        if name in constants:
            types[name] = "constexpr"
        elif name in ("zs_ptr", "zt_ptr", "z_ptr"):
            types[name] = f"*{logits}"
        elif name in ("dz_ptr", "ids_ptr"):
            types[name] = {"dz_ptr": "*bf16", "ids_ptr": "*i64"}[name]
        else:
            types[name] = "*fp32" if name.endswith("_ptr") else "i32" if name in SIZES else "fp32"
    divisible = [i for i, name in enumerate(kernel.arg_names) if name in SIZES or name.endswith("_ptr")]
    source = ASTSource(
        kernel,
        types,
        constexprs={(kernel.arg_names.index(name),): value for name, value in constants.items()},
        attrs={(i,): [["tt.divisibility", 16]] for i in divisible},
    )
    return triton.compile(source, target=GPUTarget("cuda", architecture, 32), options={"num_warps": num_warps})


def run(tool, flag, cubin):
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([tool, flag, file.name], capture_output=True, text=True, check=True).stdout


def loops(sass):
    """Instructions between a backward branch and its target."""
    lines = re.findall(r"/\*([0-9a-f]{4,})\*/\s+(.*?);", sass)
    bodies = []
    for address, instruction in lines:
        target = re.search(r"\bBRA\b.*?0x([0-9a-f]+)", instruction)
        if target and int(target[1], 16) < int(address, 16):
            bodies.append([text for at, text in lines if int(target[1], 16) <= int(at, 16) <= int(address, 16)])
    return bodies


def cases():
    for logits, vector in (("fp32", 4), ("bf16", 8)):
        stats = dict(num_warps=divergence.STATS_WARPS, BLOCK=32 * divergence.STATS_WARPS * vector, VECTOR=vector)
        grad = dict(num_warps=divergence.GRAD_WARPS, BLOCK=divergence.GRAD_BLOCK)
        yield divergence.stats_kernel, logits, stats
        yield divergence.jsd_kernel, logits, stats
        for kind in range(3):
            yield divergence.grad_kernel, logits, dict(grad, KIND=kind)
        yield logprob.logprob_stats_kernel, logits, stats
        for has_logprob, has_entropy in ((True, False), (True, True), (False, True)):
            options = dict(grad, HAS_LOGPROB=has_logprob, HAS_ENTROPY=has_entropy)
            yield logprob.logprob_grad_kernel, logits, options


for architecture in (80, 90):
    for kernel, logits, options in cases():
        cubin = compile_kernel(kernel, architecture, logits, **options).asm["cubin"]
        registers, stack = (
            int(re.search(rf"{what}:(\d+)", run(CUOBJDUMP, "-res-usage", cubin))[1]) for what in ("REG", "STACK")
        )
        sass = run(CUOBJDUMP, "-sass", cubin)
        # 16 bytes at once, straight to registers or (stats: two stages in flight) to shared memory
        vector_loads = len(re.findall(r"\b(?:LDG\.E\S*\.128|LDGSTS\.E\S*\.128)", sass))
        row_loads = len(re.findall(r"\b(?:LDG|LDGSTS)\.", sass))
        name = kernel.__name__
        kind = "".join(f" {key.lower()}={value}" for key, value in options.items() if key[:3] in ("KIN", "HAS"))
        print(f"sm_{architecture} {logits} {name}{kind}: {registers} registers, stack {stack}, "
              f"{vector_loads} of {row_loads} loads are 16 bytes")  # fmt: skip
        assert stack == 0, f"{name} spills {stack} bytes"
        assert vector_loads >= (1 if "logprob" in name else 2), f"{name} reads the logits word by word"
        if "VECTOR" in options:
            bodies = [body for body in loops(sass) if any("MUFU.EX2" in line for line in body)]
            assert bodies, f"{name}: no loop found in the machine code"
            assert not any("SHFL" in line for body in bodies for line in body), f"{name} shuffles in its loop"
            assert not any(re.match(r".*\bLDG\.E(?!\S*128)", line) for body in bodies for line in body), name
sys.exit(0)
