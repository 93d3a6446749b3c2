"""The request log: a line a request, and nothing that happens to the disk hurts anybody."""

import json
import os
import threading
from pathlib import Path

import pytest

from maxstack.serve.operate import request_log
from maxstack.serve.operate.request_log import KEPT, RequestLog

FULL = Path("/dev/full")


def lines(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_records_are_lines_of_json_in_order(tmp_path):
    log = RequestLog(tmp_path / "requests.log")
    for i in range(50):
        log.write({"id": str(i), "text": "a\nb \udcff é"})
    log.close()
    assert [record["id"] for record in lines(tmp_path / "requests.log")] == [str(i) for i in range(50)]
    assert (log.written, log.dropped) == (50, 0)


def test_as_text_a_record_is_one_line_too(tmp_path):
    log = RequestLog(tmp_path / "requests.log", "text")
    log.write({"time": "now", "id": "x", "path": "/v1", "what": "two\nlines", "finish": ["stop"]})
    log.close()
    [line] = (tmp_path / "requests.log").read_text().splitlines()
    assert line == 'now x path=/v1 what="two\\nlines" finish=["stop"]'


@pytest.mark.skipif(not FULL.exists(), reason="no /dev/full here")
def test_a_full_disk_costs_lines_and_is_said_once(tmp_path, caplog):
    log = RequestLog(FULL)
    for i in range(20):
        log.write({"id": i})
    log.close()
    assert (log.written, log.dropped) == (0, 20)
    assert len([record for record in caplog.records if "No space left" in record.message]) == 1


def test_a_disk_that_was_full_is_written_again_and_a_torn_line_spoils_no_other(tmp_path, monkeypatch):
    file, whole = tmp_path / "requests.log", os.write
    left = [4]

    def short(fd, data):
        if left[0] > 4:
            return whole(fd, data)
        left[0], taken = 0, left[0]
        if not taken:
            raise OSError(28, "No space left on device")
        return whole(fd, data[:taken])

    monkeypatch.setattr(request_log.os, "write", short)
    log = RequestLog(file)
    log.write({"id": "torn"})
    while not log.dropped:
        threading.Event().wait(0.01)
    left[0] = 1000
    log.write({"id": "whole"})
    log.close()
    assert file.read_text().splitlines()[1:] == ['{"id":"whole"}']
    assert (log.written, log.dropped) == (1, 1)


def test_a_disk_that_hangs_makes_nobody_wait(tmp_path, monkeypatch):
    go_on = threading.Event()
    monkeypatch.setattr(request_log.os, "open", lambda *rest: go_on.wait(30) and os.dup(2))
    monkeypatch.setattr(request_log, "WAITING", 5)
    monkeypatch.setattr(request_log, "CLOSE_S", 0.05)
    log = RequestLog(tmp_path / "requests.log")
    for i in range(100):
        log.write({"id": i})
    assert log.dropped >= 94
    log.close()
    monkeypatch.undo()
    go_on.set()


def test_files_are_put_aside_at_their_size_and_the_oldest_go(tmp_path):
    log = RequestLog(tmp_path / "requests.log", rotate_bytes=200)
    for i in range(100):
        log.write({"id": i, "pad": "x" * 30})
    log.close()
    files = sorted(path.name for path in tmp_path.iterdir())
    assert set(files) - {"requests.log"} == {f"requests.log.{n}" for n in range(1, KEPT + 1)}
    assert all(path.stat().st_size < 300 for path in tmp_path.iterdir())
    assert lines(tmp_path / "requests.log.1")[-1]["id"] > lines(tmp_path / "requests.log.2")[-1]["id"]
