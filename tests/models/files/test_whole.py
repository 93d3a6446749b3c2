"""Written files are there whole or not at all."""

import os
import signal
import subprocess
import sys

import numpy as np
import pytest

from maxstack.config import RunError, UserError
from maxstack.models.files import Export, Safetensors, TensorInfo, write_gguf, write_safetensors
from maxstack.models.files.whole import pieces, written_whole

INFO = TensorInfo((8,), "float32")


def fail():
    raise RuntimeError("the second array cannot be made")


def write_two(folder, second):
    """One writer after the other, both with a second tensor that is made by `second`."""
    first = np.ones(8, np.float32)
    yield lambda: write_safetensors(folder, [("a", INFO, lambda: first), ("b", INFO, second)], shard_bytes=32)
    yield lambda: write_gguf(
        folder / "m.gguf", {}, [Export("a", INFO, "F32", lambda: first), Export("b", INFO, "F16", second)]
    )


def test_nothing_half_written_stays_behind(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    for write in write_two(tmp_path, fail):
        with pytest.raises(RuntimeError, match="second array"):
            write()
        assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_a_full_disk_is_a_run_error_and_leaves_nothing(tmp_path):
    def full():
        raise OSError(28, "No space left on device")

    for write in write_two(tmp_path / "new", full):
        with pytest.raises(RunError, match="No space left on device; free some space"):
            write()
        assert list(tmp_path.iterdir()) == []


def test_nothing_is_seen_under_its_name_before_all_is_written(tmp_path):
    seen = []

    def look():
        seen.extend(path.name for path in tmp_path.iterdir() if not path.name.startswith("."))
        return np.ones(8, np.float32)

    for write in write_two(tmp_path, look):
        write()
    assert [name for name in seen if name.endswith("gguf")] == []
    assert sorted(set(seen)) == sorted(path.name for path in tmp_path.iterdir() if path.suffix != ".gguf")


KILLED = """
import os, signal, sys
from pathlib import Path
import numpy as np
from maxstack.models.files import TensorInfo, write_safetensors
info = TensorInfo((8,), "float32")
die = lambda: os.kill(os.getpid(), signal.SIGKILL)
write_safetensors(Path(sys.argv[1]), [("a", info, lambda: np.ones(8, np.float32)), ("b", info, die)])
"""


def test_what_a_killed_writer_left_is_not_read_and_goes_with_the_next(tmp_path):
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], check=False, env=dict(os.environ))
    assert done.returncode == -signal.SIGKILL
    assert [path.name.startswith(".weights.") for path in tmp_path.iterdir()] == [True]
    with pytest.raises(UserError, match="neither"):
        Safetensors(tmp_path)
    next(write_two(tmp_path, lambda: np.ones(8, np.float32)))()
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]
    assert Safetensors(tmp_path).names() == ("a", "b")


def test_a_writer_at_work_is_left_alone(tmp_path):
    with written_whole(tmp_path) as first:
        with written_whole(tmp_path) as second:
            (second / "b").write_text("b")
        (first / "a").write_text("a")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


def test_a_file_in_the_way_is_the_users_mistake(tmp_path):
    (tmp_path / "file").write_text("x")
    for write in write_two(tmp_path / "file", fail):
        with pytest.raises(UserError, match="is a file where a folder is needed"):
            write()


@pytest.mark.parametrize("multiple", [1, 4, 32])
def test_pieces_are_multiples_and_all_of_the_array(monkeypatch, multiple):
    monkeypatch.setattr("maxstack.models.files.whole._AT_A_TIME", 300)
    wide = np.arange(2 * 3 * 64, dtype=np.float32).reshape(2, 3, 64)
    views = (wide[:, ::2], wide.transpose(1, 0, 2), wide.reshape(6, 64)[:, :30], wide[0, 0, ::3])
    for array in (wide, *views, wide[0, 0], np.array(7.0, np.float32), wide[:0]):
        found = list(pieces(array, multiple))
        assert all(piece.size % multiple == 0 for piece in found[:-1])
        np.testing.assert_array_equal(np.concatenate([wide[0, 0, :0], *found]), array.ravel())
