"""Prefill and decode of a SmolLM2-135M shape on this CPU beside transformers and llama.cpp, taking turns in one run.

    python benchmarks/decode_cpu.py --torch-python OTHER/bin/python --llama-python THIRD/bin/python --gguf F32.gguf

Random float32 weights (speed does not depend on them); the GGUF file is to have the same shape. Each contender is a
process of its own that stays loaded; a turn is one prefill of 512 tokens, or some tokens decoded behind 512 cached
ones, alone and 8 rows at once. Prints medians, ratios of the same round, and at which share of the memory bandwidth, as
read by a sum over a large array in the same round, the bytes of a token arrive.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from turns import Contender  # beside this file

CACHED, TOKENS, VOCABULARY = 512, 8, 49_152
SHAPE = {
    "vocab_size": VOCABULARY, "width": 576, "depth": 30, "heads": 9, "kv_heads": 3, "head_size": 64,
    "feed_forward": 1536,
}  # fmt: skip
LAYER = 576 * (2 * 576 + 2 * 192 + 3 * 1536)
WEIGHT_BYTES = 4 * (30 * LAYER + VOCABULARY * 576)
CACHE_BYTES = 4 * 30 * 2 * 3 * 64 * CACHED


class Ours:
    """maxstack's Generator, driven below its host loop as the others are: one call a step, greedy tokens read back."""

    def __init__(self):
        import jax

        from maxstack.models import RopeConfig, llama
        from maxstack.models.generation import Generator

        config = llama(**SHAPE, max_length=2048, dtype="float32", rope=RopeConfig(theta=1e5))
        self.writer = Generator(jax.jit(config.build)(jax.random.key(0)))
        self.states: dict[int, Any] = {}

    def prefill(self, rows: int) -> None:
        import jax
        import numpy as np

        ids = np.random.default_rng(0).integers(VOCABULARY, size=(rows, CACHED + 1)).tolist()
        self.states[rows], _ = self.writer._read(ids, None)
        jax.block_until_ready(self.states[rows])

    def decode(self, rows: int) -> None:
        import jax.numpy as jnp
        import numpy as np

        from maxstack.models.generation import SamplingParams
        from maxstack.models.generation.params import row_settings

        settings = row_settings([SamplingParams(temperature=0.0)] * rows, VOCABULARY)
        state = self.states[rows]._replace(lengths_b=jnp.full(rows, CACHED, jnp.int32))
        for _ in range(TOKENS):
            chosen, state = self.writer._programs.step(self.writer._weights, state, settings)
            np.asarray(chosen.tokens_b)
        self.states[rows] = state


class Memory:
    """Reads a large array: what the machine's memory gives to all cores."""

    def __init__(self):
        import jax
        import jax.numpy as jnp

        self.array, self.sum = jnp.ones(2**27, jnp.float32), jax.jit(jnp.sum)
        self.prefill(1)

    def prefill(self, rows: int) -> None:
        self.sum(self.array).block_until_ready()

    decode = prefill


def serve(contender: Any) -> None:
    """Do what each line on standard input asks for, and answer with the seconds it took."""
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        what, rows = line.split()
        start = time.perf_counter()
        getattr(contender, what)(int(rows))
        print(json.dumps({"seconds": time.perf_counter() - start}), flush=True)


def contenders(args: argparse.Namespace) -> list[Contender]:
    here = Path(__file__).resolve().parent
    found = [Contender(name, [sys.executable, __file__, "--serve", name]) for name in ("maxstack", "memory")]
    shape = json.dumps(SHAPE | {"cached": CACHED, "tokens": TOKENS})
    if args.torch_python:
        found.append(Contender("transformers", [args.torch_python, str(here / "torch_decode.py"), shape]))
    if args.llama_python:
        command = [args.llama_python, str(here / "llama_decode.py"), shape, args.gguf]
        found.append(Contender("llama.cpp", command))
    return found


def compare(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Medians and ratios for each kind of turn."""
    all_, rows = contenders(args), []
    for count in args.rows:
        for what, rounds in (("prefill", args.prefills), ("decode", args.rounds)):
            took: dict[str, list[float]] = {one.name: [] for one in all_}
            for at in range(rounds + 1):  # the first compiles
                for one in all_:
                    seconds = one.ask(f"{what} {count}")["seconds"]
                    if at:
                        took[one.name].append(seconds)
            rows.append(summary(what, count, took))
            print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    return rows


def summary(what: str, rows: int, took: dict[str, list[float]]) -> dict[str, Any]:
    """Tokens a second, ratios of the same round, share of the bandwidth."""
    tokens = rows * (CACHED if what == "prefill" else TOKENS)
    ours, memory = took["maxstack"], took["memory"]
    row: dict[str, Any] = {"turn": what, "rows": rows, "seconds": took}
    row["tokens_per_second"] = {
        name: tokens / statistics.median(s) for name, s in took.items() if name != "memory"
    }
    row["ratios"] = {
        name: statistics.median(b / a for a, b in zip(ours, seconds, strict=True))
        for name, seconds in took.items() if name not in ("maxstack", "memory")
    }  # fmt: skip
    row["memory_gb_s"] = 2**29 / statistics.median(memory) / 1e9
    if what == "decode":
        row["bytes_a_step"] = WEIGHT_BYTES + rows * CACHE_BYTES
        shares = [row["bytes_a_step"] * TOKENS / a / (2**29 / m) for a, m in zip(ours, memory, strict=True)]
        row["bandwidth_share"] = statistics.median(shares)
    return row


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown."""
    names = list(rows[0]["tokens_per_second"])
    head = [
        "turn",
        "rows",
        *(f"{n} tok/s" for n in names),
        *(f"ratio to {n}" for n in names[1:]),
        "bandwidth",
    ]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row in rows:
        cells = [row["turn"], str(row["rows"]), *(f"{row['tokens_per_second'][n]:.1f}" for n in names)]
        cells += [f"{row['ratios'][n]:.2f}" for n in names[1:]]
        share = row.get("bandwidth_share")
        cells.append(f"{share:.0%} of {row['memory_gb_s']:.0f} GB/s" if share else "")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--torch-python", default="", help="interpreter that has torch and transformers")
    parser.add_argument("--llama-python", default="", help="interpreter that has llama-cpp-python")
    parser.add_argument("--gguf", default="", help="float32 GGUF file of this shape, for llama.cpp")
    parser.add_argument("--rounds", type=int, default=7, help="decode turns of each contender")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8], help="rows at once")
    parser.add_argument("--prefills", type=int, default=2, help="prefill turns of each contender")
    parser.add_argument("--json", default="", help="file for all figures")
    parser.add_argument("--serve", choices=("maxstack", "memory"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        serve({"maxstack": Ours, "memory": Memory}[args.serve]())
        return
    rows = compare(args)
    print(table(rows))
    if args.json:
        Path(args.json).write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
