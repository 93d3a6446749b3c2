"""A contender of a benchmark: a process of its own, which takes a turn when asked and answers with a line of JSON."""

import json
import os
import subprocess
from pathlib import Path
from typing import IO, Any, cast


class Contender:
    """Started, and waited for until it says that it is ready. Raises RuntimeError when it ends before its time."""

    def __init__(
        self, name: str, command: list[str], checkout: Path = Path(__file__).resolve().parent.parent
    ):
        environment = {
            **os.environ,
            "PYTHONPATH": str(checkout),
            "JAX_PLATFORMS": "cpu",
        }
        self.name = name
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        self.stdin, self.stdout = cast(IO[str], self.process.stdin), cast(IO[str], self.process.stdout)
        self.read()

    def read(self) -> dict[str, Any]:
        """Its next line."""
        line = self.stdout.readline()
        if not line:
            raise RuntimeError(
                f"{self.name} ended with exit code {self.process.wait()}; its message is above"
            )
        return json.loads(line)

    def ask(self, what: str) -> dict[str, Any]:
        """Its answer to a line."""
        self.stdin.write(f"{what}\n")
        self.stdin.flush()
        return self.read()
