# docs: docs/kernels.md
"""Figure of peak memory against the number of tokens, naive torch and ours, on this machine: docs/kernels_memory.png.

    python benchmarks/kernels_memory.py

Each point is one loss + backward in a process of its own (`kernels.py --memory-of`), reverse KL, head of hidden 256.
"""

import importlib.util
from pathlib import Path

HERE = Path(__file__).parent
TOKENS = (64, 128, 256, 512, 1024)
VOCAB, HIDDEN = 151936, 256

if __name__ == "__main__":
    try:
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise SystemExit("the figure needs matplotlib: pip install matplotlib") from error

    # by its path: `import kernels` is the library
    spec = importlib.util.spec_from_file_location("kernels_benchmark", HERE / "kernels.py")
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)

    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    sizes = dict(vocab=VOCAB, student_hidden=HIDDEN, teacher_hidden=HIDDEN, equal_workspace=False)
    for label, style in (("naive", "o--"), ("ours", "o-"), ("ours, head frozen", "o:")):
        peaks = []
        for tokens in TOKENS:
            args = benchmark.Args(tokens=tokens, frozen_head="frozen" in label, **sizes)
            peaks.append(benchmark.peak_memory_in_own_process(label.split(",")[0], "reverse_kl", args) / 1024)
            print(f"{label}, N = {tokens}: {peaks[-1]:.2f} GB", flush=True)
        axes.plot(TOKENS, peaks, style, label=label)
    axes.axhline(VOCAB * HIDDEN * 4 / 2**30, color="gray", linewidth=0.8, label="dW alone")
    axes.set(
        xlabel="tokens N", ylabel="peak beyond the inputs (GB)", ylim=(0, None),
    )  # fmt: skip
    axes.set_title(f"Reverse KL, loss + backward, V = {VOCAB:,}, hidden {HIDDEN}, CPU, fp32", fontsize=10)
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(HERE.parent / "docs" / "kernels_memory.png", dpi=130)
