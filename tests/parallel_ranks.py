"""One rank of tests/test_parallel.py, which starts it under torchrun: runs scripts one after another in one process group,
because most of a launch is imports. Its argument is a JSON list of [script, arguments]; `stop_at` among the arguments ends
that run there as a crash behind its checkpoint would, `fail_on` makes a rank raise an error at the first step, `nodes` lets
the ranks believe that they run on so many machines."""

import json
import os
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(ROOT / "tests"))
import torch  # noqa: E402
from conftest import SCRIPTS, FakeGrader  # noqa: E402

from infra import cli, parallel, reward, run_folder  # noqa: E402

write_checkpoint = run_folder.Run.checkpoint
torch.set_num_threads(1)
modules = (reward, *SCRIPTS.values())
for module in modules:  # every second response of a group is right, which random models cannot arrange
    module.Grader = FakeGrader
parallel.setup()
for script, args in json.loads(sys.argv[1]):
    module = SCRIPTS[script]
    sys.argv[0] = str(ROOT / f"{script}.py")
    os.environ["LOCAL_WORLD_SIZE"] = str(parallel.world_size() // args.pop("nodes", 1))
    stop_at, fail_on = args.pop("stop_at", None), args.pop("fail_on", None)

    def checkpoint(run, step, *state, stop_at=stop_at, fail_on=fail_on):
        if step == 1 and fail_on == parallel.rank():
            raise RuntimeError("deliberate")
        write_checkpoint(run, step, *state)
        if step == stop_at:
            raise KeyboardInterrupt

    run_folder.Run.checkpoint = checkpoint
    try:
        if fail_on is None:
            module.main(module.Args(**args))
        else:
            sys.argv[1:] = ["--model", args["model"], "--train-data", args["train_data"], "--out", args["out"],
                            "--prompts-per-step", "4", "--minibatch-prompts", "4", "--max-response-tokens", "8"]  # fmt: skip
            cli.run(module.main, module.Args)
    except KeyboardInterrupt:
        pass
    parallel.barrier()
