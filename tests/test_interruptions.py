"""What goes wrong while a command runs: full disks, signals, readers that leave. Nothing is lost or half-written."""

import contextlib
import dataclasses
import errno
import io
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from maxstack import cli
from maxstack.config import log_faults_in
from maxstack.data import store
from maxstack.telemetry import Display, read_rows
from maxstack.train import session
from maxstack.train.run import EvaluationConfig
from maxstack.train.stop import Stopped, StopRequest
from tests.commands import STEPS, flags_for, maxstack, refusal, write_run_file
from tests.train.runs import tiny_run

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def _no_fault_folder(tmp_path: Path) -> None:
    log_faults_in(tmp_path / "absent")


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    return refusal(capsys)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with tiny.py, its run, finished, in `run`, and its data in `cache`."""
    folder = tmp_path_factory.mktemp("finished")
    assert maxstack("train", write_run_file(folder)) == 0
    return folder


# ------------------------------------------------------------------------------------------------- full disk


@contextlib.contextmanager
def no_file_above(size: int) -> Iterator[None]:
    """Writing on in a file of that size fails, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


# After a failed write Orbax closes its event loop while tensorstore still reports to it.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize(
    ("size", "parts"),
    [
        (2_000, ["cannot write", "prepared", "free some space"]),
        (6_000, ["cannot write", "run.py", "free some space"]),
        (20_000, ["checkpoint 1 could not be saved", "limit is reached", "free some space"]),
    ],
)
def test_a_full_disk_is_said_with_the_place_and_leaves_nothing_half_written(
    finished, tmp_path, refused, size, parts
):
    out, cache = tmp_path / "out", tmp_path / "cache"
    if size > 2_000:
        shutil.copytree(finished / "cache", cache)
    words = ["train", finished / "tiny.py", "--out", out, "--data.cache", cache]
    with no_file_above(size):
        refused(1, parts, *words)
    assert not list(tmp_path.rglob("*.partial"))
    for path in out.glob("tokenizer/*.json"):
        json.loads(path.read_bytes())
    assert maxstack(*words) == 0
    assert not list(tmp_path.rglob("*tmp"))


def test_metrics_that_cannot_be_written_stop_the_run_with_their_place(finished, tmp_path, refused):
    (tmp_path / "out" / "metrics.jsonl").mkdir(parents=True)
    parts = ["metrics.jsonl: Is a directory", "move that folder"]
    refused(1, parts, "train", finished / "tiny.py", "--out", tmp_path / "out")


def test_a_display_that_cannot_be_written_does_not_stop_the_run():
    from rich.console import Console

    class Full(io.StringIO):
        def write(self, text: str) -> int:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    display = Display(2, mode="lines", console=Console(file=Full()))
    display.message("one")
    assert display.mode == "off"


# ------------------------------------------------------------------------------------------------- signals


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_before_there_is_anything_to_save_leaves_at_once_with_0(
    finished, tmp_path, capsys, monkeypatch, number
):
    monkeypatch.setattr(session, "prepare", lambda *_: os.kill(os.getpid(), number))
    monkeypatch.setattr(session, "check_vocabulary", lambda *_: pytest.fail("it went on"))
    assert maxstack("train", finished / "tiny.py", "--out", tmp_path / "out") == 0
    assert f"stopped by {number.name} before the first step" in capsys.readouterr().out


def test_sigterm_ends_preparing_as_ctrl_c_does_and_leaves_nothing_half_prepared(finished, tmp_path, capsys):
    def interrupt(self, array) -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    words = ["data", "prepare", finished / "tiny.py", "--out", tmp_path / "out"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store.HashingFile, "write", interrupt)
        assert maxstack(*words) == cli.INTERRUPTED
    assert capsys.readouterr().err.endswith("maxstack data: stopped\n")
    assert not [path for path in (tmp_path / "out").iterdir() if path.is_dir()]
    assert maxstack(*words) == 0


def test_a_signal_during_imports_is_kept_until_they_are_done():
    with StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.requested()
        with pytest.raises(Stopped), stop.at_once():
            pytest.fail("it went on")


def test_a_signal_during_the_last_evaluation_saves_first_and_the_next_run_evaluates(tmp_path, monkeypatch):
    run_file = write_run_file(tmp_path, evaluation=EvaluationConfig(every=0))
    make = session.evaluation_step

    def interrupted(plan):
        step = make(plan)
        return lambda *arguments: (os.kill(os.getpid(), signal.SIGTERM), step(*arguments))[1]

    monkeypatch.setattr(session, "evaluation_step", interrupted)
    assert maxstack("train", run_file) == 0
    kinds = [row["kind"] for row in read_rows(tmp_path / "run" / "metrics.jsonl")]
    assert kinds == ["train"] * STEPS
    assert (tmp_path / "run" / "checkpoints" / f"{STEPS:08}").is_dir()
    monkeypatch.undo()
    assert maxstack("train", run_file) == 0
    kinds = [row["kind"] for row in read_rows(tmp_path / "run" / "metrics.jsonl")]
    assert kinds == ["train"] * STEPS + ["evaluation"]


def start(*words: str | Path, **options) -> subprocess.Popen:
    environment = {**os.environ, "XLA_FLAGS": flags_for(1), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "maxstack", *map(str, words)]
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True, **options)


@pytest.mark.slow
def test_a_second_ctrl_c_leaves_at_once_and_the_run_resumes(tmp_path):
    run_file = write_run_file(tmp_path)
    words = ["train", run_file, "--steps", "100000", "--checkpoint.save-every", "5"]
    process = start(*words, stdout=subprocess.DEVNULL)
    metrics = tmp_path / "run" / "metrics.jsonl"
    while process.poll() is None and not (metrics.exists() and metrics.read_bytes().count(b"\n") > 12):
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    time.sleep(0.01)  # two of the same kind that are both pending count as one
    process.send_signal(signal.SIGINT)
    error = process.communicate(timeout=5)[1]
    # A save of a model this small may be over before the second comes.
    assert process.returncode in (0, 130), error
    assert "Traceback" not in error
    assert maxstack("inspect", tmp_path / "run", "--verify", "hash") == 0
    again = start(*words[:2], "--steps", str(1 + len(list(read_rows(metrics)))), stdout=subprocess.DEVNULL)
    assert "resumed from step" in again.communicate(timeout=60)[1]
    assert again.returncode == 0


@pytest.mark.slow
def test_a_reader_that_leaves_does_not_stop_the_training(tmp_path):
    display = dataclasses.replace(tiny_run(tmp_path).telemetry, display="lines", lines_every_s=0.0)
    run_file = write_run_file(tmp_path, telemetry=display)
    reading, writing = os.pipe()
    os.close(reading)
    process = start("train", run_file, stdout=writing)
    os.close(writing)
    assert "Traceback" not in process.communicate(timeout=60)[1]
    assert process.returncode == 0
    assert len(list(read_rows(tmp_path / "run" / "metrics.jsonl"))) == STEPS
