# docs/data.md
"""Rows of a data file, as they stand in it, or of a dataset of the Hugging Face hub."""

import csv
import io
import json
import os
from decimal import Decimal
from pathlib import Path

from infra.cli import UsageError, require
from infra.hub import first_line, from_hub

csv.field_size_limit(2**31 - 1)


def load_rows(spec: str, flag: str) -> list[dict]:
    """The rows of `numbered_rows` without their places."""
    return [row for _, row in numbered_rows(spec, flag)]


def numbered_rows(spec: str, flag: str) -> list[tuple[str, dict]]:
    """[(its place in the file: "line 3" or "row 3", from 1; row)] of a local .jsonl, .json, .parquet or .csv file, or of a
    hub dataset `name`, `name:config` or `name:config:split`. A local file is read as it is: by its literal path, as UTF-8,
    without a cache. Raises UsageError for what cannot be read, naming the place."""
    path, there, kinds = Path(spec), os.path.exists(spec), ", ".join(READERS)
    read = READERS.get(path.suffix.lower())
    folder = os.path.isdir(spec or ".") or os.path.isdir(spec.split(":")[0])
    require(not folder, f"{flag} {spec}: that is a folder here; give a file in it ({kinds})")
    if not read and not there:
        rows = [(f"row {number}", row) for number, row in enumerate(hub_rows(spec, flag), 1)]
    else:
        require(read, f"{flag} {spec}: the file is there, but only {kinds} are read; unpack, convert or rename it")
        require(there, f"{flag} {spec}: there is no such file. Check the path")
        try:
            rows = read(path)
        except OSError as error:
            raise UsageError(f"{flag} {spec}: cannot read it ({error.strerror or first_line(error)})") from None
        except ValueError as error:
            raise UsageError(f"{flag} {spec}: {error}") from None
    for place, row in rows:
        require(isinstance(row, dict), f"{flag} {spec}, {place}: must be a JSON object, one for each problem")
    return rows


def utf8_text(path: Path) -> str:
    """A text file, with or without a byte order mark, whatever the locale."""
    data = path.read_bytes()
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ValueError(f"line {line} is not UTF-8 (byte {data[error.start]:#x}); convert the file to UTF-8") from None


def parse_json(text: str):
    """JSON, in which an object has no key twice and a number that a float would round is a Decimal."""

    def unique(pairs):
        row = dict(pairs)
        twice = [key for i, (key, _) in enumerate(pairs) if key in dict(pairs[:i])] if len(row) < len(pairs) else []
        if twice:
            raise ValueError(f"the key {twice[0]!r} comes twice")
        return row

    def exact(number):
        exactly = Decimal(number)
        return float(number) if Decimal(repr(float(number))) == exactly else exactly

    try:
        return json.loads(text, object_pairs_hook=unique, parse_float=exact)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def read_jsonl(path: Path) -> list[tuple[str, object]]:
    rows = []
    for number, line in enumerate(utf8_text(path).split("\n"), 1):  # splitlines() would split at U+2028 inside a text
        try:
            rows += [(f"line {number}", parse_json(line))] if line.strip() else []
        except ValueError as error:
            why = f"{error.msg}, column {error.colno}" if isinstance(error, json.JSONDecodeError) else first_line(error)
            raise ValueError(f"line {number} is not a JSON object ({why})") from None
    return rows


def read_json(path: Path) -> list[tuple[str, object]]:
    try:
        rows = parse_json(utf8_text(path))
    except json.JSONDecodeError as error:
        lines = error.msg == "Extra data"
        hint = "; one object a line is a .jsonl file: rename it" if lines else ""
        raise ValueError(f"line {error.lineno} is not JSON ({error.msg}){hint}") from None
    if isinstance(rows, dict) and isinstance(rows.get("data"), list):
        rows = rows["data"]
    if not isinstance(rows, list):
        raise ValueError('a .json file must hold a list of objects, or {"data": such a list}')
    return [(f"row {number}", row) for number, row in enumerate(rows, 1)]


def read_csv(path: Path) -> list[tuple[str, dict]]:
    reader = csv.reader(io.StringIO(utf8_text(path), newline=""), strict=True)
    columns, rows, line = None, [], 1  # a quoted cell may have several lines: a row's place is its first
    try:
        for cells in reader:
            if not columns:
                columns = [cell.strip() for cell in cells]
                if len(columns) == 1 and (other := {";", "\t"} & set(columns[0])):
                    raise ValueError(f"the columns are separated by {other.pop()!r}; separate them by commas")
                if len(set(columns)) < len(columns):
                    raise ValueError(f"two columns of the header have one name: {', '.join(columns)}")
            elif cells:
                if len(cells) != len(columns):
                    raise ValueError(f"line {line} has {len(cells)} cells, not {len(columns)}; quote what holds a comma")
                rows.append((f"line {line}", dict(zip(columns, cells, strict=True))))
            line = reader.line_num + 1
    except csv.Error as error:
        raise ValueError(f"line {line} is not CSV ({error})") from None
    return rows


def read_parquet(path: Path) -> list[tuple[str, dict]]:
    import pyarrow.parquet  # not needed for the other kinds, and slow to import

    try:
        with path.open("rb") as file:
            table = pyarrow.parquet.ParquetFile(file).read()
        names, rows = table.column_names, table.to_pylist()
    except (pyarrow.ArrowException, NotImplementedError, UnicodeDecodeError) as error:
        raise ValueError(f"not a whole parquet file ({first_line(error)})") from None
    if len(set(names)) < len(names):
        raise ValueError(f"two columns have one name: {', '.join(names)}")
    return [(f"row {number}", row) for number, row in enumerate(rows, 1)]


def hub_rows(spec: str, flag: str) -> list[dict]:
    name, config, split = (spec.split(":", 2) + [None, None])[:3]
    try:
        import datasets

        if config is None:
            configs = from_hub(lambda: datasets.get_dataset_config_names(name), name)
            config = next((c for c in ("default", "all") if c in configs), configs[0] if len(configs) == 1 else None)
            require(config, f"{flag} {spec}: choose a config, {flag} {name}:CONFIG, one of {', '.join(configs)}")
        return list(from_hub(lambda: datasets.load_dataset(name, config, split=split or "train"), name))
    except UsageError:
        raise
    except Exception as error:  # no such dataset, no network: all end the same way for the user
        raise UsageError(
            f"{flag} {spec}: there is no such file, nor can it be loaded from the hub ({first_line(error)}). "
            f"Check the path, or the network and the name:config:split"
        ) from None


READERS = {".jsonl": read_jsonl, ".json": read_json, ".parquet": read_parquet, ".csv": read_csv}
