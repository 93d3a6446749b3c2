"""Real processes: several that save and restore together, and one that is killed while it saves."""

import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from maxstack.checkpoint import Checkpoints
from maxstack.checkpoint.folder import half_written
from tests.checkpoint import worker

ROOT = Path(__file__).resolve().parent.parent.parent
WORKER = Path(__file__).with_name("worker.py")


def start(job: str, directory: Path, *place: int) -> subprocess.Popen[str]:
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("JAX_", "XLA_"))}
    command = [sys.executable, str(WORKER), job, str(directory), *map(str, place)]
    pipe = subprocess.PIPE
    return subprocess.Popen(
        command, env=environment | {"PYTHONPATH": str(ROOT)}, stdout=pipe, stderr=pipe, text=True
    )


def run(job: str, directory: Path, processes: int) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    places = [(port, process, processes) for process in range(processes)] if processes > 1 else [()]
    children = [start(job, directory, *place) for place in places]
    try:
        results = [(child, *child.communicate(timeout=90)) for child in children]
    finally:
        for child in children:
            child.kill()
    for child, output, errors in results:
        assert child.returncode == 0, f"{output}\n{errors}"


def test_saved_by_two_processes_and_restored_by_one(tmp_path: Path) -> None:
    run("save", tmp_path, 2)
    worker.restore(tmp_path)


def test_saved_by_one_process_and_restored_by_two_and_refused_in_both(tmp_path: Path) -> None:
    worker.save(tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "damaged")
    files = [path for path in (tmp_path / "damaged" / "00000003").rglob("*") if path.is_file()]
    data = max(files, key=lambda path: path.stat().st_size)
    data.write_bytes(data.read_bytes()[:-1] + b"?")
    shutil.copytree(tmp_path / "whole", tmp_path / "newer")
    record = tmp_path / "newer" / "00000003" / "checkpoint.json"
    record.write_text(json.dumps(json.loads(record.read_text()) | {"layout": 9}))
    run("restore_whole_and_refuse_others", tmp_path, 2)


@pytest.mark.parametrize("job", ["stop_while_writing", "stop_before_rename"])
def test_killed_while_saving_leaves_the_previous_checkpoint_and_a_folder_that_is_ignored(
    tmp_path: Path, job: str
) -> None:
    child = start(job, tmp_path)
    assert child.stdout is not None
    assert child.stdout.readline().startswith("writing")
    child.kill()
    assert child.wait() == -signal.SIGKILL
    with Checkpoints(tmp_path) as checkpoints:
        assert [path.name for path in half_written(tmp_path)] == ["00000002.orbax-checkpoint-tmp"]
        assert checkpoints.latest_good() == 1
        state, meta, account = checkpoints.restore()
        assert (state["w"] == 1).all()
        assert meta == {"position": 1}
        assert account.verified == "hash"
        checkpoints.save(2, state, {})
    assert half_written(tmp_path) == []
    assert Checkpoints(tmp_path).latest_good() == 2


@pytest.mark.kill
def test_killed_at_random_moments_every_complete_checkpoint_is_whole(tmp_path: Path) -> None:
    chance = random.Random(0)
    reached = 0
    for _ in range(20):
        child = start("save_until_killed", tmp_path)
        assert child.stdout is not None
        handed_over = int(child.stdout.readline())
        time.sleep(chance.uniform(0.0, 0.5))
        child.kill()
        handed_over = max([handed_over, *map(int, child.stdout.read().split())])
        child.wait()
        checkpoints = Checkpoints(tmp_path)
        good = checkpoints.latest_good()
        # The step before the last one handed over was committed, since each save waits for the one before.
        assert good is not None or handed_over == 1
        for step in checkpoints.steps():
            state, meta, account = checkpoints.restore(step)
            assert meta == {"position": step}
            assert account.verified == "hash"
            assert all((state[f"w{number}"] == step * 10 + number).all() for number in range(8))
        assert (good or 0) >= max(reached, handed_over - 1)
        reached = good or 0
