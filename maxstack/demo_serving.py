"""The end of the demo: its model behind OpenAI's interface, asked through OpenAI's own client."""

import importlib.util
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path

from maxstack.config import RunError

PORT = 8000
READY_S = 300.0
"""A first start compiles; one that takes longer has failed."""


def serve(command: list[str], model: Path, prompt: str, asked: Callable[[], None]) -> None:
    """Start the server, ask it, call `asked`, print where it is; in a terminal it stays until Ctrl-C.

    Raises RunError if it fails.
    """
    url = f"http://127.0.0.1:{free_port()}"
    arguments = [
        "--model",
        str(model),
        "--name",
        "demo",
        "--template",
        "chatml",
        "--port",
        url.rpartition(":")[2],
    ]
    process = subprocess.Popen([*command, *arguments])
    try:
        wait_until_ready(url, process)
        ask(url, prompt)
        asked()
        print(
            f"\nthe server is at {url}: a page to chat at, and {url}/v1 for any client of OpenAI's interface",
            flush=True,
        )
        if sys.stdin.isatty():
            print("Ctrl-C ends it", flush=True)
            process.wait()
        else:
            print("nobody is at a terminal: it ends now, and the same command starts it again", flush=True)
    except KeyboardInterrupt:
        pass
    finally:
        leave(process)


def free_port() -> int:
    """The usual port, or any other where that is taken."""
    for port in (PORT, 0):
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return probe.getsockname()[1]
    raise RunError("no port is free on 127.0.0.1")


def wait_until_ready(url: str, process: subprocess.Popen) -> None:
    """Return when the server answers requests."""
    end = time.monotonic() + READY_S
    while time.monotonic() < end:
        if process.poll() is not None:
            raise RunError(f"the server ended with exit code {process.returncode}; its message is above")
        try:
            with urllib.request.urlopen(f"{url}/ready", timeout=5):
                return
        except (urllib.error.URLError, OSError):  # not there yet, or 503
            time.sleep(0.2)
    raise RunError(f"the server was not ready within {READY_S:.0f} s")


def ask(url: str, prompt: str) -> None:
    """Ask for a continuation, and print it as it comes."""
    if importlib.util.find_spec("openai") is None:
        print("   OpenAI's client is not installed (pip install openai): nothing is asked", flush=True)
        return
    from openai import OpenAI

    with OpenAI(base_url=f"{url}/v1", api_key="none") as client:
        answer = client.completions.create(
            model="demo", prompt=prompt, max_tokens=80, temperature=0.7, seed=1, stream=True
        )
        print(prompt, end="")
        for piece in answer:
            print(piece.choices[0].text if piece.choices else "", end="", flush=True)
        print()


def leave(process: subprocess.Popen) -> None:
    """Ask the server to finish, and wait for it."""
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
