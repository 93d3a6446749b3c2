"""A server of our own, started for a run and stopped after it; and what the client takes by itself."""

import asyncio
import json
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import httpx2

from maxstack.bench.serve.answers import read
from maxstack.bench.serve.asks import Ask
from maxstack.bench.serve.client import Clients, Server
from maxstack.bench.serve.numbers import summary
from maxstack.config import RunError

LAST_LINES = 15
GAP_S, PIECES = 0.005, 100


@contextmanager
def started(model: str, options: Sequence[str] = (), wait_s: float = 600.0) -> Iterator[str]:
    """`maxstack serve` with a model on a free port; gives its address once it is ready."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "maxstack", "serve", "--model", model, "--port", str(port), *options]
    with tempfile.TemporaryDirectory(prefix="maxstack-bench-") as folder:
        log = Path(folder, "log")
        with log.open("wb") as out:
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=out, stderr=out)
            try:
                url = f"http://127.0.0.1:{port}"
                _until_ready(process, url, log, wait_s)
                yield url
            finally:
                stop(process)


def _until_ready(process: subprocess.Popen[bytes], url: str, log: Path, wait_s: float) -> None:
    deadline = time.monotonic() + wait_s
    while time.monotonic() < deadline:
        if process.poll() is not None:
            break
        try:
            if httpx2.get(f"{url}/ready", timeout=5.0, trust_env=False).status_code == 200:
                return
        except httpx2.TransportError:
            pass
        time.sleep(0.1)
    tail = "\n".join(log.read_text(errors="replace").splitlines()[-LAST_LINES:])
    state = "is not ready" if process.poll() is None else f"ended with exit code {process.poll()}"
    raise RunError(f"`maxstack serve` {state} after {wait_s:.0f} s at most; it said last:\n{tail}")


def stop(process: subprocess.Popen[bytes], wait_s: float = 30.0) -> None:
    """Ask it to end; kill it where it does not."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(wait_s)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def overhead(at_once: int) -> dict[str, float]:
    """What the client takes, against a server in another process that does nothing: CPU seconds a piece, seconds to
    the first token (`first_s`) and added to each gap (`gap_s`), medians."""
    command = [sys.executable, "-m", "maxstack.bench.serve.nothing", json.dumps({"gap_s": GAP_S})]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            port = process.stdout.readline().strip()
            if not port:
                raise RunError("the server that does nothing has not started; its message is above")
            return asyncio.run(_overhead(f"http://127.0.0.1:{port}", at_once))
        finally:
            process.kill()


async def _overhead(url: str, at_once: int) -> dict[str, float]:
    ask = Ask(prompt="a word", tokens=PIECES)
    async with Clients(Server(url=url, model="nothing")) as clients:
        await clients.closed_loop([ask] * at_once, at_once)  # opens the connections
        before = time.process_time()
        heard = await clients.closed_loop([ask] * (2 * at_once), at_once)
        spent = time.process_time() - before
    answers = [read(each) for each in heard]
    gaps = [gap - GAP_S for answer in answers for gap in answer.itl_s]
    return {
        "piece_s": spent / sum(len(answer.times) for answer in answers),
        "first_s": summary([answer.ttft_s for answer in answers])["p50"],
        "gap_s": summary(gaps)["p50"],
    }
