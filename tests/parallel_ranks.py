"""One rank of tests/test_parallel.py, which starts it under torchrun: runs scripts one after another in one process group,
because most of a launch is imports. Its argument is a JSON list of [script, arguments]."""

import importlib
import json
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(ROOT / "tests"))
import torch  # noqa: E402
from conftest import FakeGrader  # noqa: E402

import common  # noqa: E402
import parallel  # noqa: E402

torch.set_num_threads(1)
common.Grader = FakeGrader  # every second response of a group is right, which random models cannot arrange by themselves
parallel.setup()
for script, args in json.loads(sys.argv[1]):
    module = importlib.import_module(script)
    sys.argv[0] = str(ROOT / f"{script}.py")
    module.main(module.Args(**args))
    parallel.barrier()
