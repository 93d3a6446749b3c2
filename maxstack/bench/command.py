"""`maxstack bench kernels`: the kernels on this machine, beside what one would use instead, in turns.
`maxstack bench serve`: load on a server, ours or another (`maxstack bench serve --help`)."""

import argparse
import json
import math
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from maxstack.config import UserError, write_atomically


def main(argv: Sequence[str]) -> int:
    """Run the verb; returns the exit code."""
    if argv[:1] == ["serve"]:
        from maxstack.bench.serve.command import main as serve

        return serve(argv[1:])
    parser = argparse.ArgumentParser(prog="maxstack bench", description=__doc__)
    parser.add_argument("what", choices=("kernels", "serve"), help="what is timed")
    parser.add_argument("--only", nargs="+", default=[], metavar="KERNEL", help="some of the kernels")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each contender; medians are shown")
    parser.add_argument("--seconds", type=float, default=0.2, help="least length of a turn (seconds)")
    parser.add_argument("--json", type=Path, help="file for all figures")
    parser.add_argument(
        "--tune", action="store_true",
        help="try sizes of blocks, and keep what is faster in this user's table, at once: Ctrl-C loses nothing",
    )  # fmt: skip
    parser.add_argument(
        "--minutes", type=float,
        help="with --tune: try nothing more after this time, and say what was not tried (default: try all)",
    )  # fmt: skip
    args = parser.parse_args(argv)
    if args.rounds < 1:
        raise UserError(f"--rounds {args.rounds}: at least one turn is needed")
    if args.minutes is not None and not (args.tune and args.minutes > 0):
        raise UserError(f"--minutes {args.minutes:g}: it is a time above 0 for --tune")
    check(args.only)
    if args.tune:
        return tune(args.only, args.rounds, args.seconds, args.minutes, args.json)
    run(args.only, args.rounds, args.seconds, args.json)
    return 0


def tune(only: Sequence[str], rounds: int, seconds: float, minutes: float | None, file: Path | None) -> int:
    """Try sizes of blocks, and keep what is better in the user's table; returns the exit code."""
    from maxstack.bench.kernels import CASES
    from maxstack.bench.tune.command import main as tune
    from maxstack.bench.tune.race import Effort

    until = math.inf if minutes is None else time.perf_counter() + 60 * minutes
    cases = [case for name in only or CASES for case in CASES[name]()]
    return tune(cases, Effort(rounds=rounds, least_seconds=seconds, until=until), file)


def check(only: Sequence[str]) -> None:
    """Refuse the name of a kernel that is none."""
    from maxstack.bench.kernels import CASES

    if unknown := [name for name in only if name not in CASES]:
        raise UserError(f"--only {unknown[0]}: no such kernel; there are {', '.join(CASES)}")


def run(only: Sequence[str], rounds: int, seconds: float, file: Path | None) -> None:
    """Time the cases, show each as it is done, and a table at the end."""
    import jax

    from maxstack.bench.kernels import CASES
    from maxstack.bench.measure import bandwidth, measured, product_rate, table
    from maxstack.kernels.dispatch import chip

    here, console = chip(), Console(stderr=True)
    memory, products = bandwidth(), product_rate(dtype="float32" if here.platform == "cpu" else "bfloat16")
    device = jax.devices()[0].device_kind
    console.print(
        f"{device} ({here.name}): reads {memory / 1e9:.0f} GB/s, multiplies {products / 1e12:.2f} TFLOP/s"
    )
    results = []
    for name in only or CASES:
        for case in CASES[name]():
            with console.status(f"{case.kernel}, {case.shape} …"):
                results.append(measured(case, rounds=rounds, least_seconds=seconds))
    print(table(results, memory, products))
    if file is not None:
        found = {
            "device": device,
            "chip": here.name,
            "jax": jax.__version__,
            "bandwidth": memory,
            "products": products,
        }
        text = json.dumps(found | {"cases": [result.row() for result in results]}, indent=1)
        write_atomically(file, text.encode())
