"""What the compilers of absent chips say of the kernels; writes the tables of docs/kernels.md, or compares with them.

    python benchmarks/kernel_table.py                                        # all tables, for half an hour
    python benchmarks/kernel_table.py --jobs 2 --rows rows.jsonl             # takes up where it was cut off
    python benchmarks/kernel_table.py tpu-attention --only chip=v5e,v6e tokens=2048 --check

`--check` writes nothing, and fails where a kernel takes more registers, spilled bytes, on-chip memory, temporaries,
FLOPs or bytes than the page says. With `--only` without `--check` the other rows of a table stay as they are.
A line a row says what differs from the page and how long it took. `--rows` keeps them, each with the kernels' sources
and the compilers that it was made with: rows of others are made again.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from kernel_programs import TABLES, measured  # beside this file
from kernel_roofline import roofline
from kernel_shapes import Row

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "kernels.md"
MAKERS = ("hopper", "loops", "mix", "registers", "shapes", "tpu")
"""Of the scripts beside this one, those that make a row."""


def table(rows: list[Row]) -> str:
    """Rows as Markdown."""
    lines = ["| " + " | ".join(rows[0]) + " |", "|" + "---|" * len(rows[0])]
    return "\n".join(lines + ["| " + " | ".join(row.values()) + " |" for row in rows])


def put(name: str, text: str) -> None:
    """Write a table between its marks on the page, which are put at the end if they are not there."""
    page = PAGE.read_text() if PAGE.exists() else "# Kernels\n"
    start, end = f"<!-- table {name} -->", f"<!-- end {name} -->"
    if start not in page:
        page += f"\n## {name}\n\n{start}\n{end}\n"
    before, _, rest = page.partition(start)
    PAGE.write_text(f"{before}{start}\n{text}\n{end}{rest.partition(end)[2]}")


def recorded(name: str) -> list[Row]:
    """Rows of a table on the page."""
    part = PAGE.read_text().partition(f"<!-- table {name} -->")[2].partition(f"<!-- end {name} -->")[0]
    cells = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in part.splitlines() if line[:1] == "|"
    ]
    return [dict(zip(cells[0], line, strict=True)) for line in cells[2:]]


def grown(name: str, rows: list[Row], tolerance: float = 0.1) -> list[str]:
    """What takes a tenth more than the page says, kernels that are in no program any more, rows that are not there."""
    names, compared = TABLES[name].names, TABLES[name].compared
    known = {tuple(row[part] for part in names): row for row in recorded(name)}
    found = []
    for row in rows:
        key = tuple(row[part] for part in names)
        if key not in known:
            found.append(f"{name}: {', '.join(key)} is not on the page")
            continue
        for column in (column for column in row if column.startswith(compared)):
            old, new = number(known[key].get(column, "-")), number(row[column])
            gone = row[column] == "-" != known[key].get(column, "-")
            if gone or new > old * (1 + tolerance) + least(row[column]):
                found.append(f"{name}: {', '.join(key)}: {column} {known[key].get(column)} -> {row[column]}")
    return found


def differing(name: str, rows: list[Row]) -> list[str]:
    """Every cell that is not what the page says."""
    known = {tuple(row[part] for part in TABLES[name].names): row for row in recorded(name)}
    found = []
    for row in rows:
        old = known.get(tuple(row[part] for part in TABLES[name].names))
        if old is None:
            found.append("not on the page")
        else:
            changed = [column for column in row if old.get(column) != row[column]]
            found += [f"{column} {old.get(column)} -> {row[column]}" for column in changed]
    return found


def number(cell: str) -> float:
    """A cell; a kernel that is not in a program takes nothing."""
    return 0.0 if cell == "-" else float(cell)


def least(cell: str) -> float:
    """Half of a cell's last digit: what rounding may make of nothing."""
    return 0.5 * 10.0 ** -len(cell.partition(".")[2])


def compilers() -> str:
    """What the figures are of."""
    found = []
    for package in ("jax", "libtpu", "jax-cuda13-pjrt"):
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            found.append(f"no {package}")
    return ", ".join(found)


def made_with() -> str:
    """The kernels' sources, what calls them here, and the compilers, as a short name."""
    found = hashlib.sha256(compilers().encode())
    files = [*(ROOT / "kernels").rglob("*.py"), ROOT / "kernels/tiles.json"]
    files += [ROOT / "benchmarks" / f"kernel_{part}.py" for part in MAKERS]
    for file in sorted(files):
        found.update(file.read_bytes())
    return found.hexdigest()[:12]


def kept(name: str, file: Path | None) -> dict[str, list[Row]]:
    """Rows of a table that a file has, by their keys; those of other sources or compilers are left out."""
    if file is None or not file.exists():
        return {}
    lines, now = [json.loads(line) for line in file.read_text().splitlines()], made_with()
    return {
        json.dumps(made["key"]): made["rows"]
        for made in lines
        if made["table"] == name and made.get("made with") == now
    }


def compile_rows(name: str, keys: list[Row], jobs: int, file: Path | None) -> list[Row]:
    """The rows of all keys, by processes of their own, each for some keys; those that `file` has are not made again.

    A process ends now and then, and with it what the compilers keep.
    """
    done = {key: rows for key, rows in kept(name, file).items() if json.loads(key) in keys}
    left = [key for key in keys if json.dumps(key) not in done]
    if done:
        print(f"{name}: {len(done)} rows are in {file}", file=sys.stderr, flush=True)

    def run(some: list[Row]) -> None:
        command = [sys.executable, __file__, name, "--keys", json.dumps(some)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            for line in process.stdout or ():
                if not line.startswith("{"):
                    continue
                made = json.loads(line)
                done[json.dumps(made["key"])] = made["rows"]
                said = [
                    f"{name} {len(done)}/{len(keys)}",
                    ", ".join(made["key"].values()),
                    f"{made['seconds']:.0f} s",
                ]
                said += differing(name, made["rows"]) or ["as on the page"]
                print("; ".join(said), file=sys.stderr, flush=True)
                if file is not None:
                    with file.open("a") as rows:
                        rows.write(line)
        if process.returncode:
            raise RuntimeError(f"{name}: the process for {some} ended with exit code {process.returncode}")

    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(run, [left[at : at + 8] for at in range(0, len(left), 8)]))
    return [row for key in keys for row in done[json.dumps(key)]]


def compile_here(name: str, keys: list[Row]) -> None:
    """Rows as lines of JSON on standard output."""
    for key in keys:
        begun = time.perf_counter()
        made = {"table": name, "key": key, "rows": measured(name, key), "made with": made_with()}
        print(json.dumps(made | {"seconds": round(time.perf_counter() - begun, 1)}), flush=True)


def wanted(name: str, only: list[str]) -> list[Row]:
    """Keys of a table, or those that `name=value,value` pick."""
    picked = {part.partition("=")[0]: part.partition("=")[2].split(",") for part in only}
    return [
        key
        for key in TABLES[name].keys
        if all(key.get(one) in of for one, of in picked.items() if one in key)
    ]


def with_others(name: str, rows: list[Row]) -> list[Row]:
    """The new rows in the order of the keys, and between them those that stay."""
    of = TABLES[name].names
    new = {tuple(row[part] for part in of): row for row in rows}
    kept = [
        row
        for row in recorded(name)
        if tuple(row[part] for part in of) not in new and list(row) == list(rows[0])
    ]
    order = [list(key.items()) for key in TABLES[name].keys]

    def place(row: Row) -> int:
        return next((at for at, key in enumerate(order) if all(row.get(k) == v for k, v in key)), len(order))

    return sorted([*kept, *new.values()], key=place)


def main() -> int:
    """Run the script; returns the exit code."""
    names = [*TABLES, "roofline"]
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("tables", nargs="*", help=f"of {', '.join(names)}")
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME=VALUE,VALUE", help="some rows")
    parser.add_argument("--jobs", type=int, default=1, help="processes that compile at a time")
    parser.add_argument(
        "--rows", type=Path, help="file that keeps each row as it is made, and gives those it has"
    )
    parser.add_argument("--check", action="store_true", help="compare with the page and write nothing")
    parser.add_argument("--keys", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if unknown := [name for name in args.tables if name not in names]:
        parser.error(f"no table {unknown[0]!r}; there are {', '.join(names)}")
    os.environ["JAX_PLATFORMS"] = "cpu"
    sys.path.insert(0, str(ROOT))
    if args.keys is not None:
        compile_here(args.tables[0], args.keys)
        return 0
    worse = []
    for name in args.tables or names:
        if name == "roofline":
            if not args.check:
                put(name, table(roofline(recorded)))
            continue
        rows = compile_rows(name, wanted(name, args.only), args.jobs, args.rows)
        if args.check:
            worse += grown(name, rows)
        else:
            put(name, f"{table(with_others(name, rows))}\n\nCompiled with {compilers()}.")
    print("\n".join(worse))
    return 1 if worse else 0


if __name__ == "__main__":
    raise SystemExit(main())
