"""The kernels on a GPU or TPU beside their peers, taking turns in one run, and the goals beside the figures.

    python benchmarks/kernels.py --json kernels.json --torch-python OTHER/bin/python
    python benchmarks/kernels.py --only "attention forward" "paged decode"

Peers: XLA's attention and cuDNN's by way of jax.nn, tokamax where it is installed, jax's own kernels for TPUs, and
PyTorch's scaled_dot_product_attention in a process of its own. Goals are those for Hopper. Prints a table and writes
one JSON: a row is measured, or says why not; nothing is taken from elsewhere. Shares are of the memory bandwidth and
the rate of products that this machine was seen to give in the same run. `kernels_cpu.py` is for the CPU.
"""

import argparse
import json
import os
import statistics
import sys
from pathlib import Path
from typing import Any

from kernel_rows import Goal, Row, Torch, Turn, rows  # beside this file

ROOT = Path(__file__).resolve().parent.parent


def measured(row: Row, rounds: int) -> dict[str, Any]:
    """Seconds of each turn of each contender, and why others did not take part."""
    import jax

    ready: dict[str, Turn] = {}
    declined: dict[str, str] = {}
    for name, make in row.contenders.items():
        try:
            ready[name] = make()
        except (NotImplementedError, ValueError, jax.errors.JaxRuntimeError, RuntimeError) as reason:
            declined[name] = next(iter(str(reason).splitlines()), type(reason).__name__)
    took: dict[str, list[float]] = {name: [] for name in ready}
    for _ in range(rounds):
        for name, one in ready.items():
            took[name].append(one())
    return {"seconds": took, "declined": declined}


def told(row: Row, found: dict[str, Any], memory: float, products: float, chip: str) -> dict[str, Any]:
    """A row of the output: figures, and what they say of the goal."""
    medians = {name: statistics.median(each) for name, each in found["seconds"].items()}
    plain = {
        "kernel": row.kernel, "shape": row.shape, "goal": str(row.goal), "flops": row.flops, "bytes": row.bytes,
        **found, "medians": medians,
    }  # fmt: skip
    if "ours" not in medians:
        return plain | {"verdict": f"not measured: {found['declined']['ours']}"}
    seconds = medians["ours"]
    best = min(medians.keys() - {"ours"}, key=lambda name: medians[name], default=None)
    speed = medians[best] / seconds if best else None
    plain |= {
        "best_peer": best, "times_best_peer": speed, "of_bandwidth": row.bytes / seconds / memory,
        "of_products": row.flops / seconds / products,
    }  # fmt: skip
    return plain | {"verdict": verdict(row.goal, speed, row.bytes / seconds / memory, chip)}


def verdict(goal: Goal, speed: float | None, bandwidth: float, chip: str) -> str:
    """Whether the goal is met."""
    if goal == Goal():
        return "no goal"
    if not chip.startswith("sm90"):
        return f"measured; the goal is for Hopper, and this is {chip}"
    if goal.peer is not None and speed is None:
        return "not measured: no peer took part"
    missed = goal.peer is not None and speed is not None and speed < goal.peer
    missed |= goal.bandwidth is not None and bandwidth < goal.bandwidth
    return "missed" if missed else "met"


def table(found: list[dict[str, Any]]) -> str:
    """Markdown."""
    lines = ["| kernel | shape | goal | found | peers, time / ours | verdict |", "|---|---|---|---|---|---|"]
    for row in found:
        ours = row["medians"].get("ours")
        peers = [
            f"{name} {seconds / ours:.2f}"
            for name, seconds in row["medians"].items()
            if ours and name != "ours"
        ]
        peers += [
            f"{name} not measured: {why}" for name, why in row["declined"].items() if ours and name != "ours"
        ]
        figures = [
            f"{row[name]:.0%} of {what}"
            for name, what in (("of_bandwidth", "bandwidth"), ("of_products", "products"))
            if row.get(name)
        ]
        cells = (
            row["kernel"],
            row["shape"],
            row["goal"],
            ", ".join(figures),
            ", ".join(peers),
            row["verdict"],
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--torch-python", default="", help="interpreter that has torch for this machine's GPU"
    )
    parser.add_argument("--only", nargs="+", default=[""], help="kernels whose name starts so")
    parser.add_argument("--rounds", type=int, default=7, help="turns of each contender; medians count")
    parser.add_argument("--seconds", type=float, default=0.2, help="least length of a turn (seconds)")
    parser.add_argument("--json", type=Path, help="file for all figures")
    args = parser.parse_args()
    # PyTorch's process needs memory of the same card.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    sys.path.insert(0, str(ROOT))
    import jax

    from maxstack.bench.measure import bandwidth, product_rate
    from maxstack.kernels.dispatch import chip

    here, found = chip(), []
    absent = here.platform not in ("gpu", "tpu")
    memory, products = (0.0, 0.0) if absent else (bandwidth(4096), product_rate(8192, "bfloat16"))
    for row in rows(Torch(args.torch_python), args.seconds):
        if not row.kernel.startswith(tuple(args.only)):
            continue
        if absent:
            nothing = {"seconds": {}, "declined": dict.fromkeys(row.contenders, "no GPU or TPU")}
            found.append(
                told(row, nothing, memory, products, here.name) | {"verdict": "not measured: no GPU"}
            )
        else:
            found.append(told(row, measured(row, args.rounds), memory, products, here.name))
            print(json.dumps(found[-1]), file=sys.stderr, flush=True)
    device = jax.devices()[0].device_kind
    what = {
        "device": device,
        "chip": here.name,
        "jax": jax.__version__,
        "bandwidth": memory,
        "products": products,
    }
    print(f"{device} ({here.name}), jax {jax.__version__}", end="")
    print("" if absent else f": reads {memory / 1e9:.0f} GB/s, multiplies {products / 1e12:.0f} TFLOP/s")
    print(table(found))
    if args.json:
        args.json.write_text(json.dumps(what | {"rows": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
