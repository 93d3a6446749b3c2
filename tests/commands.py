"""Commands run in this process, on a run of three steps; and what other processes need."""

import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from maxstack import cli
from maxstack.checkpoint import CheckpointConfig
from maxstack.config import write_run
from maxstack.sharding import MeshConfig
from tests.train.runs import tiny_run

STEPS = 3


def write_run_file(folder: Path, **changes) -> Path:
    """A run of three steps, each saved, as a file; on all devices there are."""
    kept = CheckpointConfig(save_every=1)
    return write_run(
        tiny_run(folder, steps=STEPS, mesh=MeshConfig(), checkpoint=kept, **changes), folder / "tiny.py"
    )


def flags_for(devices: int) -> str:
    """XLA_FLAGS of a process with so many devices, which compiles as quickly as this one (`tests/conftest.py`)."""
    return re.sub(r"(device_count)=\d+", rf"\1={devices}", os.environ["XLA_FLAGS"])


def maxstack(*words: str | Path) -> int:
    """The exit code of a command, also where argparse leaves by SystemExit."""
    try:
        return cli.main([str(word) for word in words])
    except SystemExit as stop:
        return int(stop.code or 0)


def refusal(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """A function that runs a command which must end with the code, the parts in its message, and no traceback."""

    def check(code: int, parts: Sequence[str], *words: str | Path) -> str:
        capsys.readouterr()
        got = maxstack(*words)
        text = capsys.readouterr().err
        assert (got, "Traceback" in text) == (code, False), text
        for part in parts:
            assert part in text
        return text

    return check
