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

from maxstack.config import write_run
from maxstack.sharding import MeshConfig
from maxstack.telemetry import read_rows
from maxstack.train.loop import train
from maxstack.train.run import EvaluationConfig, RunConfig
from tests.train.runs import tiny_run

ROOT = Path(__file__).resolve().parents[2]
MESH = MeshConfig(fsdp=4, tensor=2)
STEPS = 12


def start_processes(run: RunConfig, folder: Path) -> list[subprocess.Popen[str]]:
    """Both halves of a run, with the compilation cache that they share."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    run_file = write_run(run, folder / "run_file.py")
    environment = {key: value for key, value in os.environ.items() if not key.startswith("XLA_")}
    worker = Path(__file__).with_name("worker.py")
    return [
        subprocess.Popen(
            [sys.executable, *map(str, (worker, run_file, port, process, 2, 4))],
            env=environment | {"PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for process in range(2)
    ]  # fmt: skip


def ended(processes: list[subprocess.Popen[str]]) -> list[str]:
    """What both said, once both have ended well."""
    try:
        results = [(process, *process.communicate(timeout=240)) for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, out, error in results:
        assert process.returncode == 0, f"{out}\n{error}"
    return [out.splitlines()[-1] for _, out, _ in results]


def losses(run: RunConfig) -> dict[int, float]:
    rows = read_rows(Path(run.out) / "metrics.jsonl")
    return {row["step"]: row["loss"] for row in rows if row["kind"] == "train"}


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> dict[int, float]:
    run = tiny_run(tmp_path_factory.mktemp("alone"), mesh=MESH, steps=STEPS)
    train(run, jax.devices()[:8])
    return losses(run)


def test_two_processes_train_as_one(alone, tmp_path):
    run = tiny_run(tmp_path, mesh=MESH, steps=STEPS, evaluation=EvaluationConfig(every=5))
    said = ended(start_processes(run, tmp_path))
    assert said == [f"ended at step {STEPS}, stopped by None"] * 2
    found = losses(run)
    assert found.keys() == alone.keys()
    # The same program on the same mesh; only the sums between processes are made by another library.
    np.testing.assert_allclose(list(found.values()), list(alone.values()), rtol=2e-6)


def test_a_signal_to_one_process_stops_both_at_one_step_and_one_process_goes_on(alone, tmp_path):
    run = tiny_run(tmp_path, mesh=MESH, steps=100_000)
    processes = start_processes(run, tmp_path)
    metrics = Path(run.out) / "metrics.jsonl"
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline and not (metrics.exists() and metrics.stat().st_size):
        time.sleep(0.05)
    processes[1].send_signal(signal.SIGTERM)
    said = ended(processes)
    stopped = max(losses(run))
    assert said[1] == f"ended at step {stopped}, stopped by SIGTERM"
    assert said[0] == f"ended at step {stopped}, stopped by another process"
    resumed = dataclasses.replace(run, steps=stopped + 2, mesh=MeshConfig(fsdp=2), allow_changes=True)
    assert train(resumed, jax.devices()[:2]).step == stopped + 2
    assert sorted(losses(resumed)) == list(range(1, stopped + 3))
