# docs/grader.md
"""The child process of grader.py: one question a line on its standard input, one verdict a line back.

It is started with -P and so imports nothing of its folder by accident: a file there may be called like a library's module.
"""

import json
import os
import select
import signal
import sys
import types
from contextlib import suppress

START_SECONDS = 120.0  # to import sympy, perhaps from a cold network disk; an answer's own deadline starts after it


def main(parent: int, timeout: float, memory_gb: float) -> None:
    import resource

    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # the kernel's own action: it kills, whatever the process is doing
    signal.setitimer(signal.ITIMER_REAL, START_SECONDS)
    memory = int(memory_gb * 2**30)
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))  # whatever gets evaluated, it writes no file
    protocol, silence = os.fdopen(os.dup(1), "w", encoding="ascii"), os.open(os.devnull, os.O_RDWR)
    os.dup2(silence, 1)  # what the libraries print is no verdict
    import math_verify  # noqa: F401  with all it needs, before this folder can be looked into

    package = sys.modules["infra"] = types.ModuleType("infra")  # without its __init__.py, which imports transformers
    package.__path__ = [os.path.dirname(os.path.abspath(__file__))]
    from infra.grader_objects import judge

    judge(r"\frac{\pi}{2}", r"\pi \cdot 0.5", False)  # the parser builds its tables now, not on an answer's clock
    os.dup2(silence, 2)
    signal.setitimer(signal.ITIMER_REAL, 0)
    print("ready", file=protocol, flush=True)
    while True:
        while not select.select([sys.stdin], [], [], 2.0)[0]:
            if os.getppid() != parent:  # a fork of the parent may hold our pipe open: then there is no end of file
                return
        line = sys.stdin.readline()
        if not line:
            return
        signal.setitimer(signal.ITIMER_REAL, timeout)
        pairs, read = json.loads(line)
        equal = False
        for pair in pairs:
            with suppress(Exception):
                equal = equal or judge(*pair, read)
        signal.setitimer(signal.ITIMER_REAL, 0)
        # after a large answer the memory left may be too little for the next one
        retire = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 > memory / 2
        print(json.dumps({"equal": equal, "retire": retire}), file=protocol, flush=True)


if __name__ == "__main__":
    main(int(sys.argv[2]), float(sys.argv[3]), float(sys.argv[4]))
