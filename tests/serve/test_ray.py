"""Replicas under Ray Serve. The slow test needs Ray: here, or in the Python that MAXSTACK_RAY_PYTHON names."""

import importlib.util
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from maxstack.config import UserError
from maxstack.data.tokenizer import byte_tokenizer
from maxstack.models.save import save
from maxstack.serve.ray_app import OURS, words_of
from tests.models.tiny import build
from tests.serve.driven import CONFIG

ROOT = Path(__file__).resolve().parents[2]


def test_arguments_are_those_of_the_command_line_and_wrong_ones_are_refused_at_once():
    words = words_of(
        {"model": "m", "max_length": 32, "adapters": ["a=x", "b=y"], "log_prompts": True, "kv": None}
    )
    assert words == ["--model=m", "--max-length=32", "--adapters", "a=x", "b=y", "--log-prompts"]
    with pytest.raises(UserError, match="port is not for replicas"):
        words_of({"model": "m", "port": 1})
    with pytest.raises(SystemExit):
        words_of({"model": "m", "rows": "many"})


def test_the_application_s_file_is_one_that_can_be_deployed():
    [application] = yaml.safe_load((ROOT / "launch/serve_ray.yaml").read_text())["applications"]
    assert application["import_path"] == "maxstack.serve.ray_app:app"
    assert words_of({key: value for key, value in application["args"].items() if key not in OURS})


@pytest.mark.slow
def test_two_replicas_answer_the_same_through_one_address(tmp_path):
    python = os.environ.get("MAXSTACK_RAY_PYTHON", sys.executable)
    if python == sys.executable and importlib.util.find_spec("ray") is None:
        pytest.skip("Ray is not installed: name a Python that has it and our packages by MAXSTACK_RAY_PYTHON")
    save(build(CONFIG), byte_tokenizer(), tmp_path / "model")
    with socket.socket() as own:
        own.bind(("127.0.0.1", 0))
        port = own.getsockname()[1]
    script = [
        python,
        str(Path(__file__).with_name("ray_replicas.py")),
        str(tmp_path / "model"),
        str(port),
        str(tmp_path / "out"),
    ]
    settings = os.environ | {"PYTHONPATH": str(ROOT), "RAY_USAGE_STATS_ENABLED": "0", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        script, env=settings, capture_output=True, text=True, timeout=600, cwd=tmp_path, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert json.loads((tmp_path / "out").read_text()) == {"instances": 2, "texts": 1, "ready": "ready"}
