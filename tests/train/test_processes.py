"""Two processes with four devices each train as one with eight, stop together when one is asked to, and go on alone."""

import dataclasses
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from maxstack.config import UserError, write_run
from maxstack.processes import asked_for
from maxstack.sharding import MeshConfig
from maxstack.telemetry import read_rows
from maxstack.train.loop import train
from maxstack.train.run import EvaluationConfig, RunConfig
from tests.commands import flags_for
from tests.train.runs import tiny_run

ROOT = Path(__file__).resolve().parents[2]
LAUNCH = ROOT / "launch" / "local_processes.sh"
MESH = MeshConfig(fsdp=4, tensor=2)
STEPS = 12
TOGETHER_S = 240


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def start(run: RunConfig, folder: Path, *before: str, **settings: str) -> subprocess.Popen[str]:
    """`maxstack train` with four devices, behind the words of a launcher or with the settings of one process."""
    command = [
        *before,
        sys.executable,
        "-m",
        "maxstack",
        "train",
        str(write_run(run, folder / "run_file.py")),
    ]
    four = {"XLA_FLAGS": flags_for(4), "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        command, env={**os.environ, **four, **settings}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )  # fmt: skip


def ended(process: subprocess.Popen[str]) -> str:
    """What a process said, once it has ended well."""
    try:
        out, error = process.communicate(timeout=TOGETHER_S)
    finally:
        process.kill()
    assert process.returncode == 0, f"{out}\n{error}"
    return out


def losses(run: RunConfig) -> dict[int, float]:
    rows = read_rows(Path(run.out) / "metrics.jsonl")
    return {row["step"]: row["loss"] for row in rows if row["kind"] == "train"}


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> dict[int, float]:
    run = tiny_run(tmp_path_factory.mktemp("alone"), mesh=MESH, steps=STEPS)
    train(run, jax.devices()[:8])
    return losses(run)


def test_two_launched_processes_train_as_one(alone, tmp_path):
    run = tiny_run(tmp_path, mesh=MESH, steps=STEPS, evaluation=EvaluationConfig(every=5))
    said = ended(start(run, tmp_path, str(LAUNCH), "2", MAXSTACK_PORT=str(free_port())))
    assert said.count(f"step {STEPS} of {STEPS} done") == 2
    found = losses(run)
    assert found.keys() == alone.keys()
    # The same program on the same mesh; only the sums between processes are made by another library.
    np.testing.assert_allclose(list(found.values()), list(alone.values()), rtol=2e-6)


def test_a_signal_to_one_process_stops_both_at_one_step_and_one_process_goes_on(tmp_path):
    run = tiny_run(tmp_path, mesh=MESH, steps=100_000)
    coordinator = f"127.0.0.1:{free_port()}"
    processes = [
        start(
            run, tmp_path, MAXSTACK_PROCESSES="2", MAXSTACK_PROCESS=str(index), MAXSTACK_COORDINATOR=coordinator
        )
        for index in range(2)
    ]  # fmt: skip
    metrics = Path(run.out) / "metrics.jsonl"
    deadline = time.monotonic() + TOGETHER_S
    while time.monotonic() < deadline and not (metrics.exists() and metrics.stat().st_size):
        time.sleep(0.05)
    processes[1].send_signal(signal.SIGTERM)
    said = [ended(process) for process in processes]
    stopped = max(losses(run))
    assert f"stopped by another process after step {stopped} " in said[0]
    assert f"stopped by SIGTERM after step {stopped} " in said[1]
    resumed = dataclasses.replace(run, steps=stopped + 2, mesh=MeshConfig(fsdp=2))
    assert train(resumed, jax.devices()[:2]).step == stopped + 2
    assert sorted(losses(resumed)) == list(range(1, stopped + 3))


def test_a_launched_process_that_fails_ends_the_others_with_its_exit_code():
    script = 'if [ "$MAXSTACK_PROCESS" = 1 ]; then exit 3; fi; sleep 60'
    began = time.monotonic()
    done = subprocess.run([str(LAUNCH), "3", "sh", "-c", script], check=False)
    assert done.returncode == 3
    assert time.monotonic() - began < 30


@pytest.mark.parametrize("words", [[], ["0", "true"], ["two", "true"], ["2"]])
def test_the_launcher_refuses_nonsense(words):
    done = subprocess.run([str(LAUNCH), *words], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "usage:" in done.stderr


def test_processes_are_told_apart_by_the_environment():
    place = {"MAXSTACK_PROCESS": "1", "MAXSTACK_COORDINATOR": "h:1"}
    assert asked_for({}) is None
    assert asked_for({"MAXSTACK_PROCESSES": "1", **place}) is None
    assert asked_for({"MAXSTACK_PROCESSES": "auto"}) == {}
    wanted = {"coordinator_address": "h:1", "num_processes": 2, "process_id": 1}
    assert asked_for({"MAXSTACK_PROCESSES": "2", **place}) == wanted
    for wrong in ({"MAXSTACK_PROCESS": "2"}, {"MAXSTACK_PROCESS": ""}, {"MAXSTACK_COORDINATOR": ""}):
        with pytest.raises(UserError, match="MAXSTACK_PROCESSES=2"):
            asked_for({"MAXSTACK_PROCESSES": "2", **place, **wrong})
