"""The line in the terminal: what the server does, and only where there is a terminal."""

import asyncio
import io

from rich.console import Console

from maxstack.models.generation import SamplingParams
from maxstack.serve.operate.operation import Operation
from maxstack.serve.operate.phases import COMPILE, LOAD, Phases
from maxstack.serve.operate.status_line import StatusLine
from tests.serve.operate.pretend import engine


def test_it_says_the_phase_and_then_the_load():
    now, said = [0.0], []
    phases = Phases(said.append, clock=lambda: now[0])
    operation = Operation("tiny", phases=phases)
    line = StatusLine(operation, clock=lambda: now[0])
    with phases.phase(LOAD, "read"):
        now[0] = 2.0
        assert line.text() == "starting: load"
    with phases.phase(COMPILE, "compiled"):
        phases.compiled(1, 3)
        assert line.text() == "starting: compile (1 of 3 programs)"
        now[0] = 5.0
    phases.finish("answers")
    assert phases.seconds == {"load": 2.0, "compile": 3.0, "ready": 5.0}
    assert [text.split()[:2] for text in said] == [
        ["load", "2.0"],
        ["compile", "0.0"],
        ["compile", "3.0"],
        ["ready", "5.0"],
    ]
    with engine() as (made, _):
        operation.attach(made)
        assert line.text().startswith("0 running · 0 waiting · 0 tok/s · cache 0%")
        now[0] = 6.0
        asyncio.run(made.complete([1, 2, 3], SamplingParams(max_tokens=20, temperature=0.0)))
        assert "10 tok/s" in line.text()  # half of the way to the latest 20
        operation.draining = True
        assert line.text().startswith("draining · ")


def test_without_a_terminal_there_is_none():
    out = io.StringIO()
    asyncio.run(StatusLine(Operation("tiny"), Console(file=out)).show())
    assert out.getvalue() == ""
