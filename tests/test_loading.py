"""What is loaded, and from where: no code of a checkpoint's own, no pickle, and a hub that fails."""

import json
import re
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
import torch
from conftest import ROOT, random_model
from huggingface_hub import constants
from test_bad_input import assert_refused, command

import toy
from infra import cli, hub, models

CODE = """
import pathlib
pathlib.Path({marker!r}).touch()
from transformers import Qwen3Config, Qwen3ForCausalLM
class Config(Qwen3Config):
    model_type = "own"
class Model(Qwen3ForCausalLM):
    config_class = Config
"""


@pytest.fixture
def own_code(tmp_path):
    """`own_code(model_type)`: a checkpoint that brings a modeling file, which leaves a mark when it runs."""

    def make(model_type):
        folder = tmp_path / "own"
        random_model().save_pretrained(folder)
        toy.make_tokenizer().save_pretrained(folder)
        config = json.loads((folder / "config.json").read_text())
        config |= {"model_type": model_type, "auto_map": {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}}
        (folder / "config.json").write_text(json.dumps(config))
        (folder / "own.py").write_text(CODE.format(marker=str(tmp_path / "it_ran")))
        return folder

    return make


@pytest.mark.parametrize("script, flag, more", [
    ("opd", "student", ("--teacher", "CHECKPOINT", "--prompts-per-step", "2")),
    ("grpo", "model", ("--prompts-per-step", "2", "--minibatch-prompts", "2")),
])  # fmt: skip
def test_a_checkpoint_with_code_of_its_own_is_refused_and_not_run(
    cli, checkpoints, data, tmp_path, own_code, script, flag, more
):
    flags = [checkpoints.wide if part == "CHECKPOINT" else part for part in more]
    start = time.time()
    result = cli(
        script, f"--{flag}", own_code("own"), "--train-data", data, "--max-steps", "1", *flags, "--out", tmp_path / "o"
    )
    assert_refused(result, f"--{flag} .*brings its own code, which is never run; use a Qwen or Llama checkpoint")
    assert not (tmp_path / "it_ran").exists() and time.time() - start < 10, "transformers would ask on the terminal"


def test_a_known_architecture_is_loaded_by_transformers_own_code(tmp_path, own_code):
    model = models.load_model(str(own_code("qwen3")), "--model", torch.device("cpu"), torch.float32, trainable=False)
    assert type(model).__module__.startswith("transformers.") and not (tmp_path / "it_ran").exists()


def test_pickled_weights_are_refused(tmp_path):
    model = random_model()
    model.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(cli.UsageError, match="--model .*cannot load it"):
        models.load_model(str(tmp_path), "--model", torch.device("cpu"), torch.float32, trainable=False)


def test_no_source_unpickles():
    """torch.load only with weights_only, and no pickle, anywhere."""
    sources = [*ROOT.glob("*.py"), *ROOT.glob("kernels/*.py"), *ROOT.glob("benchmarks/*.py")]
    assert len(sources) > 10
    for path in sources:
        text = path.read_text()
        assert not re.search(r"import pickle|allow_pickle=True|trust_remote_code=True", text), path
        assert all("weights_only=True" in call for call in re.findall(r"torch\.load\([^\n]*", text)), path


# ------------------------------------------------------------------------------------------------------- a hub that fails
class Busy(Exception):
    def __init__(self, status):
        super().__init__(f"{status} from the hub")
        self.response = type("Response", (), {"status_code": status})


def caused_by(error, cause):
    error.__cause__ = cause
    return error


@pytest.fixture
def flaky(monkeypatch):
    """`flaky(*errors)`: a loader that raises these, one a call, and then returns "loaded"; and the waits it led to."""
    monkeypatch.setattr(hub, "go_offline_without_network", lambda: None)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)  # another test may have found no network

    def make(*errors):
        waits, errors = [], list(errors)
        monkeypatch.setattr(hub.time, "sleep", waits.append)

        def load():
            if errors:
                raise errors.pop(0)
            return "loaded"

        return load, waits

    return make


PASSING = [Busy(503), Busy(429), ConnectionResetError("reset"), TimeoutError(), type("ReadTimeout", (Exception,), {})(),
           caused_by(OSError("could not reach the hub"), type("ConnectError", (Exception,), {})())]  # fmt: skip


@pytest.mark.parametrize("error", PASSING, ids=repr)
def test_a_failure_that_may_pass_is_tried_again(flaky, error, capsys):
    load, waits = flaky(error, error)
    assert hub.from_hub(load, "some/model") == "loaded" and waits == list(hub.RETRY_WAITS)
    assert capsys.readouterr().err.count("some/model: ") == 2


def test_but_not_for_ever(flaky):
    load, waits = flaky(*[Busy(503)] * 9)
    with pytest.raises(Busy):
        hub.from_hub(load, "some/model")
    assert len(waits) == len(hub.RETRY_WAITS)


@pytest.mark.parametrize(
    "error", [Busy(404), Busy(401), ValueError("no such config"), caused_by(OSError("x"), Busy(404))], ids=repr
)
def test_a_wrong_name_or_a_missing_permission_is_not_tried_again(flaky, error):
    load, waits = flaky(error)
    with pytest.raises(type(error)):
        hub.from_hub(load, "some/model")
    assert waits == []


def test_a_local_folder_is_read_once(flaky, tmp_path):
    load, waits = flaky(ConnectionResetError())
    with pytest.raises(ConnectionResetError):
        hub.from_hub(load, str(tmp_path))
    assert waits == []


class BusyServer(BaseHTTPRequestHandler):
    """Alive, and every file request is answered with 503."""

    def do_HEAD(self):
        self.server.requests.append(self.path)
        self.send_response(200 if self.path == "/" else 503)
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_GET = do_HEAD

    def log_message(self, *_):
        pass


@pytest.mark.slow
def test_a_busy_hub_ends_in_one_line(checkpoints, data, tmp_path):
    """A server of this process stands in for the hub; its client has waits of its own, so this takes a while."""
    server = HTTPServer(("127.0.0.1", 0), BusyServer)
    server.requests = []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        result, _ = command("opd.py", "--teacher", "nobody/nothing", "--student", checkpoints.student, "--train-data", data,
                            "--prompts-per-step", 2, "--out", tmp_path / "o", HF_HOME=str(tmp_path / "hf"),
                            HF_ENDPOINT=f"http://127.0.0.1:{server.server_port}")  # fmt: skip
    finally:
        server.shutdown()
    code, _, err = result
    assert code == 2 and "Traceback" not in err, err
    assert err.rstrip().splitlines()[-1].startswith("error: --teacher nobody/nothing: cannot load it"), err
    assert err.count("trying again in") == len(hub.RETRY_WAITS) and len(server.requests) > 3
