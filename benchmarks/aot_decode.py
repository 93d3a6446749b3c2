"""Compile the server's decode step for TPUs that are not here: the bytes each chip moves, against the least it must.

    python benchmarks/aot_decode.py                          # 8B on a v6e, 70B on four v5p, for half an hour
    python benchmarks/aot_decode.py v6e-8b-int8 --rows 64    # one of them
    python benchmarks/aot_decode.py --record                 # also writes maxstack/bench/serve/steps.json and the table

The step is the engine's own (maxstack/serve/programs.py), over shapes: nothing is there. Every row has filled its
pages, 2,048 tokens. Times are those of a roofline: nothing of this has been measured.
"""

import argparse
import json
import os
import sys
import time
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PAGE_OF_DOCS = ROOT / "docs" / "benchmarks.md"
ROWS = (16, 64, 128)
START, END = "<!-- table decode steps -->", "<!-- end decode steps -->"


def table(records: dict[str, dict[str, Any]]) -> str:
    """Steps as Markdown."""
    from maxstack.bench.serve.recorded import seconds

    lines = [
        "| step | rows | least, GB | moved, GB | useful | memory, GiB | collectives | sent, MB | roofline, ms |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, record in records.items():
        for step in record["steps"]:
            floor = step["weights"] + step["cache"]
            lines.append(
                f"| {name} | {step['rows']} | {floor / 1e9:.2f} | {step['moved'] / 1e9:.2f} "
                f"| {floor / step['moved']:.0%} | {step['memory'] / 2**30:.1f} | {step['collectives']} "
                f"| {step['sent'] / 1e6:.1f} | {seconds(record['chip'], step) * 1e3:.1f} |"
            )
    return "\n".join(lines)


def keep(records: dict[str, dict[str, Any]]) -> None:
    """For the simulator, and as the table of the docs."""
    from maxstack.bench.serve.recorded import FILE, SETTINGS

    records = {name: records[name] for name in SETTINGS if name in records}
    FILE.write_text(json.dumps(records, indent=1) + "\n")
    before, found, rest = PAGE_OF_DOCS.read_text().partition(START)
    if found:
        PAGE_OF_DOCS.write_text(f"{before}{START}\n{table(records)}\n{END}{rest.partition(END)[2]}")


def main() -> int:
    """Run the script; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("names", nargs="*", help="such as v6e-8b-int8; all without")
    parser.add_argument("--rows", type=int, nargs="+", default=list(ROWS))
    parser.add_argument(
        "--record", action="store_true", help="keep the figures, for the simulator and the docs"
    )
    parser.add_argument("--largest", type=int, default=6, help="parts listed of what is moved")
    args = parser.parse_args()
    os.environ["JAX_PLATFORMS"] = "cpu"
    sys.path.insert(0, str(ROOT))
    import jax

    from maxstack.bench.serve.recorded import SETTINGS, kept, setting_of
    from maxstack.bench.serve.step_bytes import by_part, step_bytes

    records = kept()
    for name in args.names or SETTINGS:
        steps = {step["rows"]: step for step in records.get(name, {}).get("steps", ())}
        for rows in args.rows:
            begun = time.perf_counter()
            try:
                step, found = step_bytes(setting_of(name, rows))
            except jax.errors.JaxRuntimeError as error:
                if "RESOURCE_EXHAUSTED" not in str(error):
                    raise
                print(f"{name}, {rows} rows: does not fit: {next(iter(str(error).splitlines()))}")
                continue
            steps[rows] = asdict(step)
            print(
                f"{name}, {rows} rows: least {step.floor / 1e9:.2f} GB, moved {step.moved / 1e9:.2f} GB, useful "
                f"{step.useful:.1%}; compiled in {time.perf_counter() - begun:.0f} s"
            )
            for kind, size in by_part(found).most_common(args.largest):
                print(f"    {size / 1e6:10.1f} MB  {kind}")
            sys.stdout.flush()
            records[name] = SETTINGS[name].plain() | {
                "date": datetime.now(UTC).date().isoformat(),
                "libtpu": version("libtpu"),
                "steps": [steps[rows] for rows in sorted(steps)],
            }
            if args.record:
                keep(kept() | {name: records[name]})
    print(table({name: records[name] for name in args.names or SETTINGS if name in records}))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
