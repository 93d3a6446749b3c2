"""`maxstack train RUN [overrides]`: pretrain a model from a run file; the same command again resumes."""

import sys
from collections.abc import Sequence

from maxstack.config import UserError, load_run, override
from maxstack.train.stop import Stopped, StopRequest

# Short names of settings that scripts use often.
SHORT = {"--save-every": "--checkpoint.save-every", "--profile": "--telemetry.profile"}

USAGE = """usage: maxstack train RUN [--FIELD VALUE ...]

RUN is a Python file with a function config() that returns a RunConfig, such as configs/pretrain/tiny.py.
The same command again resumes from the newest good checkpoint in --out.
Often used: --out DIR, --steps N, --save-every K (short for --checkpoint.save-every), --profile A:B (steps to trace).
`maxstack train RUN --help` lists every field of that run with its meaning, unit and value."""


def main(argv: Sequence[str]) -> int:
    """Run the verb; returns the exit code."""
    if not argv or argv[0] in ("-h", "--help"):
        print(USAGE, file=sys.stdout if argv else sys.stderr)
        return 0 if argv else 2
    path, *rest = argv
    if path.startswith("-"):
        raise UserError(
            f"the run file comes first, before {path}: maxstack train configs/pretrain/tiny.py {path} …"
        )
    with StopRequest() as stop:  # from here on: importing jax alone takes seconds
        try:
            return _train(path, [full_name(word) for word in rest], stop)
        except Stopped:
            print(f"stopped by {stop.reason} before the first step; the same command goes on")
            return 0


def _train(path: str, overrides: Sequence[str], stop: StopRequest) -> int:
    from maxstack.processes import join_processes
    from maxstack.train.loop import train
    from maxstack.train.run import RunConfig

    with stop.at_once():
        join_processes()
        run = override(load_run(path, RunConfig), overrides, f"maxstack train {path}")
    outcome = train(run, stop=stop)
    if outcome.stopped_by:
        print(
            f"stopped by {outcome.stopped_by} after step {outcome.step} of {run.steps}; the same command resumes"
        )
    else:
        print(f"{outcome.out}: step {outcome.step} of {max(run.steps, outcome.step)} done")
    return 0


def full_name(word: str) -> str:
    """A command-line word with a short field name spelled out."""
    name, equals, value = word.partition("=")
    name = name.replace("_", "-") if name.startswith("--") else name
    return f"{SHORT[name]}{equals}{value}" if name in SHORT else word
