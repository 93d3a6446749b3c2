"""metrics.jsonl survives what can happen to the process and to the disk."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from maxstack.config import RunError
from maxstack.telemetry import MetricsFile, read_rows


def write(path: Path, count: int) -> None:
    with MetricsFile(path) as file:
        for step in range(1, count + 1):
            file.write({"step": step, "loss": 1.0 / step})


def steps(path: Path) -> list[int]:
    return [row["step"] for row in read_rows(path)]


def test_each_row_is_on_disk_when_write_returns(tmp_path):
    with MetricsFile(tmp_path / "runs" / "m.jsonl") as file:
        file.write({"step": 1, "loss": 2.5})
        assert json.loads(file.path.read_text()) == {"step": 1, "loss": 2.5}


@pytest.mark.parametrize(
    "torn", [b'{"step": 4, "lo', b'{"step": 4}', b"\0\0\0\0\n", b"\xff\xfe\n", b"[4]\n", b"4\n"]
)
def test_a_torn_line_is_dropped_and_the_next_row_is_whole(tmp_path, torn):
    path = tmp_path / "m.jsonl"
    write(path, 3)
    with path.open("ab") as file:
        file.write(torn)
    assert steps(path) == [1, 2, 3], "a reader passes over it"
    with MetricsFile(path) as file:
        file.write({"step": 4})
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 3, 4]


def test_resuming_drops_later_rows_of_every_kind_and_tells_them(tmp_path):
    path = tmp_path / "m.jsonl"
    with MetricsFile(path) as file:
        for step in range(1, 7):
            file.write({"step": step, "kind": "train"})
            file.write({"step": step, "kind": "evaluation"})
        file.write({"note": "without a step"})
    with MetricsFile(path, resume_step=4) as file:
        assert [row["step"] for row in file.dropped] == [5, 5, 6, 6]
        file.write({"step": 5, "kind": "train"})
    assert [row.get("step") for row in read_rows(path)] == [1, 1, 2, 2, 3, 3, 4, 4, None, 5]


def test_a_file_without_anything_to_drop_is_not_touched(tmp_path):
    path = tmp_path / "m.jsonl"
    write(path, 3)
    before = path.stat()
    MetricsFile(path, resume_step=3).close()
    assert (path.stat().st_ino, path.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def test_dropping_replaces_the_file_as_a_whole(tmp_path, monkeypatch):
    path = tmp_path / "m.jsonl"
    write(path, 5)

    def crash(*_):
        raise OSError(5, "crash before the rename")

    monkeypatch.setattr(Path, "replace", crash)
    with pytest.raises(RunError, match="crash before the rename"):
        MetricsFile(path, resume_step=2)
    assert steps(path) == [1, 2, 3, 4, 5]
    assert [p.name for p in tmp_path.iterdir()] == ["m.jsonl"]


def test_numbers_that_json_lacks_become_null_with_a_flag_and_come_back(tmp_path):
    path = tmp_path / "m.jsonl"
    row = {
        "step": 1, "loss": math.nan, "norm": math.inf, "list": [1.0],
        "held_out": {"a.b": {"nll": -math.inf, "bits": 1.0}},
    }  # fmt: skip
    with MetricsFile(path) as file:
        file.write(row)

    def refuse(text: str) -> None:
        raise AssertionError(f"{text} is not JSON")

    plain = json.loads(path.read_text(), parse_constant=refuse)
    assert plain["loss"] is None
    assert plain["held_out"] == {"a.b": {"nll": None, "bits": 1.0}}
    assert plain["non_finite"] == {"loss": "nan", "norm": "inf", "held_out.a.b.nll": "-inf"}
    (back,) = read_rows(path)
    assert math.isnan(back.pop("loss"))
    row.pop("loss")
    assert back == row


def test_scalars_of_numpy_and_jax_and_any_text_are_written(tmp_path):
    import jax.numpy as jnp

    path = tmp_path / "m.jsonl"
    text = 'quote " newline \n null \0 heart ❤ lone \u2028 '
    with MetricsFile(path) as file:
        file.write(
            {
                "step": np.int64(3),
                "loss": jnp.float32(0.5),
                "bad": np.float32("nan"),
                "text": text,
                "p": tmp_path,
            }
        )
    (row,) = read_rows(path)
    assert (row["step"], row["loss"], row["text"], row["p"]) == (3, 0.5, text, str(tmp_path))
    assert math.isnan(row["bad"])


def test_a_full_disk_is_a_clear_error_and_leaves_no_torn_line(tmp_path, monkeypatch):
    path = tmp_path / "m.jsonl"
    write(path, 2)
    real, calls = os.write, []

    def fill_up(file, data):
        calls.append(len(data))
        if len(calls) == 1:
            return real(file, data[:7])
        raise OSError(28, "No space left on device")

    with MetricsFile(path) as file:
        monkeypatch.setattr(os, "write", fill_up)
        with pytest.raises(RunError, match=r"m\.jsonl: No space left on device"):
            file.write({"step": 3, "loss": 1.0})
        monkeypatch.undo()
        assert path.read_bytes().endswith(b"\n")
        file.write({"step": 3})
    assert steps(path) == [1, 2, 3]


def test_killed_while_writing_leaves_only_whole_rows(tmp_path):
    path = tmp_path / "m.jsonl"
    program = (
        "import sys\nfrom maxstack.telemetry.rows import MetricsFile\n"
        "file = MetricsFile(sys.argv[1])\n"
        "step = 0\n"
        "while True:\n    step += 1\n    file.write({'step': step, 'text': 'x' * 2000})\n"
    )
    process = subprocess.Popen([sys.executable, "-c", program, str(path)], cwd=Path(__file__).parents[2])
    deadline = time.monotonic() + 60
    while not (path.exists() and path.stat().st_size > 100_000):
        assert process.poll() is None, "the writer ended by itself"
        assert time.monotonic() < deadline, "the writer wrote nothing"
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    kept = len(steps(path))
    with MetricsFile(path) as file:
        file.write({"step": kept + 1})
    assert steps(path) == list(range(1, kept + 2))


def test_no_file_has_no_rows(tmp_path):
    assert list(read_rows(tmp_path / "none.jsonl")) == []
