# docs/resuming.md
"""What an input holds, in 16 hex digits: a run that goes on, and a bridge that skips what is finished, compare these, as a
path or a file's time says nothing of the contents."""

import hashlib
import re
from pathlib import Path

from infra import dataset, parallel

# flags that name an input, where a script has them
INPUTS = ("model", "teacher", "student", "train_data", "eval_data", "label_split", "rollouts", "paced", "grader")
CHECKPOINT = ("config.json", "generation_config.json", "*.safetensors", "*.safetensors.index.json", "*token*", "vocab*",
              "merges.txt", "chat_template*")  # fmt: skip
WHOLE, PIECE, PIECES = 64 << 20, 1 << 20, 64  # bytes, bytes, how many


def digest_of(spec: str | Path) -> str | None:
    """Of a local file its contents; of a checkpoint folder the names, sizes and contents of config, tokenizer and weights,
    where of a file above 64 MB only 64 pieces of 1 MB, evenly spread with both ends, are read: 16 GB take a second, and a
    change that leaves all pieces as they were is not seen. None for a hub id, and for what is not there."""
    path = Path(re.sub(r"\.py:\w+$", ".py", str(spec)))  # --grader's FILE.py:FUNCTION
    if path.is_file():
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()[:16]
    if not str(spec) or not path.is_dir():
        return None
    whole = hashlib.sha256()
    for file in sorted({file for pattern in CHECKPOINT for file in path.glob(pattern) if file.is_file()}):
        size = file.stat().st_size
        whole.update(f"{file.name} {size} ".encode())
        with file.open("rb") as contents:
            for k in range(PIECES) if size > WHOLE else ():
                contents.seek((size - PIECE) * k // (PIECES - 1))
                whole.update(contents.read(PIECE))
            if size <= WHOLE:
                whole.update(contents.read())
    return whole.hexdigest()[:16]


def digests(args, problems=None) -> dict[str, str | None]:
    """{flag: digest_of} of every input that `args` names, and under "problems" the digest of these, in order, with their
    earlier messages and answers. Only rank 0 reads."""
    specs = {name: getattr(args, name) for name in INPUTS if getattr(args, name, None)}
    if ":" not in specs.get("grader", ":"):
        del specs["grader"]  # one of ours
    found = parallel.on_rank_zero(lambda: {name: digest_of(spec) for name, spec in specs.items()})
    if problems is not None:
        found["problems"] = dataset.digest(problems)
    return found
