"""Seconds from the start of `maxstack serve` to /ready, with an empty cache of compiled programs and with a full one.

    python benchmarks/serve_start.py [MODEL]

Prints the wall time beside its budget, the processor time, which other work on the machine changes less, the memory
that the server holds, and the phases that it has told.
"""

import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import NamedTuple

import psutil

BUDGET_S = {"first": 20.0, "second": 8.0}
"""Of the packaged model of 135M parameters, on two cores with nothing else to do."""
LOOK_S = 0.02


class Start(NamedTuple):
    """What a start took."""

    wall_s: float
    user_s: float
    system_s: float
    resident_mb: float
    told: str


def started(model: str, cache: str) -> Start:
    """Start a server, wait until it is ready, end it."""
    with tempfile.NamedTemporaryFile("w+", suffix=".log") as log:
        command = [sys.executable, "-m", "maxstack", "serve", "--model", model, "--port", "0"]
        began = time.monotonic()
        server = subprocess.Popen(command, stderr=log, env=os.environ | {"MAXSTACK_COMPILED_CACHE": cache})
        try:
            while not ready(Path(log.name).read_text()):
                if server.poll() is not None:
                    raise RuntimeError(Path(log.name).read_text())
                time.sleep(LOOK_S)
            wall_s, process = time.monotonic() - began, psutil.Process(server.pid)
            times, memory = process.cpu_times(), process.memory_info().rss
        finally:
            server.send_signal(signal.SIGTERM)
            server.wait(60)
        return Start(wall_s, times.user, times.system, memory / 1e6, Path(log.name).read_text())


def ready(told: str) -> bool:
    """Whether the server that has told this is."""
    found = re.search(r"http://[0-9.:]+", told)
    if found is None:
        return False
    try:
        with urllib.request.urlopen(f"{found[0]}/ready", timeout=5):
            return True
    except OSError:  # not there yet, or not ready
        return False


def main(model: str) -> None:
    """Two starts, one after the other."""
    with tempfile.TemporaryDirectory() as cache:
        for name, budget_s in BUDGET_S.items():
            start = started(model, cache)
            print(
                f"{name}: {start.wall_s:.1f} s (budget {budget_s:.0f} s), processor {start.user_s:.1f} + "
                f"{start.system_s:.1f} s, {start.resident_mb:.0f} MB"
            )
            print(start.told)


if __name__ == "__main__":
    main(*(sys.argv[1:] or ["smollm2-135m-instruct"]))
