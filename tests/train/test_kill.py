"""kill -9 at random moments: the run goes on, and its losses are those of the uninterrupted run, bit for bit."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from maxstack.checkpoint import CheckpointConfig
from maxstack.checkpoint.folder import TEMPORARY
from maxstack.config import write_run
from maxstack.telemetry import read_rows
from maxstack.train.run import EvaluationConfig, SampleConfig
from tests.train.runs import tiny_run

TRIALS = 20
STEPS = 40


def start(folder: Path) -> subprocess.Popen:
    environment = {**os.environ, "XLA_FLAGS": "", "PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    command = [sys.executable, "-m", "maxstack", "train", str(folder / "run_file.py")]
    return subprocess.Popen(
        command, env=environment, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )  # fmt: skip


def losses(folder: Path) -> dict[int, str]:
    rows = list(read_rows(folder / "run" / "metrics.jsonl"))
    found = {row["step"]: json.dumps(row["loss"]) for row in rows if row["kind"] == "train"}
    assert len(found) == sum(row["kind"] == "train" for row in rows), "a step is recorded twice"
    return found


def prepare_run(folder: Path) -> Path:
    run = tiny_run(
        folder, steps=STEPS, checkpoint=CheckpointConfig(save_every=4), evaluation=EvaluationConfig(every=5),
        samples=SampleConfig(every=10, prompts=("the",), max_tokens=4),
    )  # fmt: skip
    write_run(run, folder / "run_file.py")
    return folder


def anywhere(process: subprocess.Popen, folder: Path, moments: random.Random, span: float) -> None:
    """From preparing to evaluating."""
    time.sleep(moments.uniform(0.05, 0.95) * span)


def while_saving(process: subprocess.Popen, folder: Path, moments: random.Random, span: float) -> None:
    """While one of the next saves is half written; what the last kill left behind does not count."""
    old = set(half_written(folder))
    wait_for(process, lambda: not old.issuperset(half_written(folder)) and moments.random() < 0.3)


def half_written(folder: Path) -> list[Path]:
    return list((folder / "run").glob(f"*/*{TEMPORARY}*"))


def while_evaluating(process: subprocess.Popen, folder: Path, moments: random.Random, span: float) -> None:
    """Between a step and the row of its evaluation, or the row of its sample."""
    metrics = folder / "run" / "metrics.jsonl"

    def due() -> bool:
        rows = list(read_rows(metrics)) if metrics.exists() else []
        last = rows[-1] if rows else {"kind": "", "step": 0}
        return last["kind"] == "train" and last["step"] % 5 == 0 and moments.random() < 0.3

    wait_for(process, due)


def wait_for(process: subprocess.Popen, seen: Callable[[], bool]) -> None:
    """Until it is so; a run that is over earlier was not interrupted there."""
    while process.poll() is None and not seen():
        time.sleep(0.002)


AIMS = (anywhere, while_saving, while_evaluating)


@pytest.mark.kill
def test_killed_runs_resume_to_the_losses_of_the_uninterrupted_run(tmp_path):
    whole = prepare_run(tmp_path / "whole")
    began = time.perf_counter()
    assert start(whole).wait() == 0
    span = time.perf_counter() - began
    expected = losses(whole)
    assert sorted(expected) == list(range(1, STEPS + 1))
    moments, hit = random.Random(0), 0
    for trial in range(TRIALS):
        killed = prepare_run(tmp_path / f"trial{trial}")
        for _ in range(2):
            process = start(killed)
            AIMS[trial % len(AIMS)](process, killed, moments, span)
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            hit += process.wait() == -signal.SIGKILL
        process = start(killed)
        _, error = process.communicate()
        assert process.returncode == 0, error
        assert losses(killed) == expected, f"trial {trial}"
    assert hit >= TRIALS * 3 // 2, "most processes have to be killed before they are done"


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_save_and_exit_with_0(tmp_path, number):
    run = prepare_run(tmp_path)
    process = start(run)
    metrics = run / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (metrics.exists() and metrics.stat().st_size) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(number)
    assert process.wait(timeout=60) == 0
    done = max(losses(run))
    assert start(run).wait() == 0
    assert done < STEPS, "the run was over before the signal came"
    assert max(losses(run)) == STEPS
