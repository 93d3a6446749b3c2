"""Prefill and decode on this CPU beside transformers and llama.cpp, taking turns in one run.

    python benchmarks/decode_cpu.py --write-gguf FOLDER            (once: random models for llama.cpp)
    python benchmarks/decode_cpu.py --torch-python OTHER/bin/python --llama-python THIRD/bin/python --gguf F32.gguf
    python benchmarks/decode_cpu.py --weights float32 bfloat16 int8 int4-g32 --llama-python … --gguf q8_0.gguf q4_0.gguf
    (on a machine that does nothing else: llama.cpp's threads spin until the slowest is done)

Random weights (speed does not depend on them); the GGUF files are to have the same shape. Each contender is a process
of its own that stays loaded; a turn is one prefill of 512 tokens, or some tokens decoded behind 512 cached ones, alone
and several rows at once. The first of `--weights` is what the others are compared with. Prints medians, ratios of the
same round, and at which share of the memory bandwidth, as read by a sum over a large array in the same round, the bytes
of a token arrive.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any, cast

from turns import Contender  # beside this file

CACHED, TOKENS = 512, 8
SHAPES: dict[str, dict[str, Any]] = {
    "135m": {  # SmolLM2
        "vocab_size": 49_152, "width": 576, "depth": 30, "heads": 9, "kv_heads": 3, "head_size": 64,
        "feed_forward": 1536,
    },
    "1.5b": {  # Qwen2.5
        "vocab_size": 151_936, "width": 1536, "depth": 28, "heads": 12, "kv_heads": 2, "head_size": 128,
        "feed_forward": 8960,
    },
}  # fmt: skip
BITS = {
    "float32": 32.0,
    "bfloat16": 16.0,
    "bfloat16-in-float32": 16.0,
    "int8": 8.0,
    "int4-g32": 4.5,
    "int4-g128": 4.125,
}
"""A weight, with its share of a scale; scales of whole rows (int8) do not count. A model of bfloat16's numbers is
computed in float32 on a CPU unless one asks for bfloat16."""


def bytes_a_step(shape: dict[str, Any], weights: str, rows: int) -> float:
    """What a step has to read: each weight once, and the cache. A packed model's output projection is in int8."""
    width, kv = shape["width"], shape["kv_heads"] * shape["head_size"]
    layer = width * (2 * shape["heads"] * shape["head_size"] + 2 * kv + 3 * shape["feed_forward"])
    head_bits = 8.0 if BITS[weights] < 8 else BITS[weights]
    cached = rows * shape["depth"] * 2 * kv * CACHED * (2 if weights == "bfloat16" else 4)
    return (shape["depth"] * layer * BITS[weights] + shape["vocab_size"] * width * head_bits) / 8 + cached


def model(shape: dict[str, Any], weights: str) -> Any:
    """Random weights."""
    import jax
    import jax.numpy as jnp

    from maxstack.models import RopeConfig, llama

    dtype = "bfloat16" if weights == "bfloat16" else "float32"
    numbers = jnp.bfloat16 if BITS[weights] == 16 else jnp.float32
    config = llama(**shape, max_length=2048, dtype=dtype, rope=RopeConfig(theta=1e5))
    return jax.jit(lambda key: jax.tree.map(lambda w: w.astype(numbers), config.build(key)))(
        jax.random.key(0)
    )


class Ours:
    """maxstack's Generator, driven below its host loop as the others are: one call a step, greedy tokens read back."""

    def __init__(self, shape: dict[str, Any], weights: str):
        from maxstack.models.generation import Generator
        from maxstack.models.packing import packed

        few = BITS[weights] < 16
        built = model(shape, weights)
        self.vocabulary = shape["vocab_size"]
        self.writer = Generator(packed(built, cast(Any, weights)) if few else built)
        self.states: dict[int, Any] = {}

    def prefill(self, rows: int) -> None:
        import jax
        import numpy as np

        ids = np.random.default_rng(0).integers(self.vocabulary, size=(rows, CACHED + 1)).tolist()
        self.states[rows], _ = self.writer._read(ids, None)
        jax.block_until_ready(self.states[rows])

    def decode(self, rows: int) -> None:
        import jax.numpy as jnp
        import numpy as np

        from maxstack.models.generation import SamplingParams
        from maxstack.models.generation.params import row_settings

        settings = row_settings([SamplingParams(temperature=0.0)] * rows, self.vocabulary)
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
    """Ours in order of `--weights`, the memory, and the others."""
    here = Path(__file__).resolve().parent
    ours = [sys.executable, __file__, "--shape", args.shape, "--serve"]
    found = [Contender(f"maxstack {weights}", [*ours, weights]) for weights in args.weights]
    found.append(Contender("memory", [*ours, "memory"]))
    shape = json.dumps(SHAPES[args.shape] | {"cached": CACHED, "tokens": TOKENS})
    if args.torch_python:
        found.append(Contender("transformers", [args.torch_python, str(here / "torch_decode.py"), shape]))
    for file in args.gguf if args.llama_python else ():
        command = [args.llama_python, str(here / "llama_decode.py"), shape, file]
        found.append(Contender(f"llama.cpp {Path(file).stem}", command))
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
            if rounds:
                rows.append(summary(args, what, count, took))
                print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    return rows


def summary(args: argparse.Namespace, what: str, rows: int, took: dict[str, list[float]]) -> dict[str, Any]:
    """Tokens a second, ratios of the same round to the first of ours, shares of the bandwidth."""
    tokens = rows * (CACHED if what == "prefill" else TOKENS)
    memory = took.pop("memory")
    first = next(iter(took.values()))
    row: dict[str, Any] = {"turn": what, "rows": rows, "seconds": took}
    row["tokens_per_second"] = {name: tokens / statistics.median(s) for name, s in took.items()}
    row["ratios"] = {
        name: statistics.median(b / a for a, b in zip(first, seconds, strict=True))
        for name, seconds in took.items()
    }  # fmt: skip
    row["memory_gb_s"] = 2**29 / statistics.median(memory) / 1e9
    if what == "decode":
        row["bandwidth_share"] = {
            name: statistics.median(
                bytes_a_step(SHAPES[args.shape], weights, rows) * TOKENS / s / (2**29 / m)
                for s, m in zip(took[name], memory, strict=True)
            )
            for weights in args.weights if (name := f"maxstack {weights}")
        }  # fmt: skip
    return row


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: a line for each contender of each turn."""
    first = next(iter(rows[0]["ratios"]))
    head = ["turn", "rows", "contender", "tokens/s", f"its time / {first}'s", "share of bandwidth"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row in rows:
        for name, ratio in row["ratios"].items():
            share = row.get("bandwidth_share", {}).get(name)
            cells = [
                row["turn"],
                str(row["rows"]),
                name,
                f"{row['tokens_per_second'][name]:.1f}",
                f"{ratio:.2f}",
            ]
            cells.append(f"{share:.0%} of {row['memory_gb_s']:.0f} GB/s" if share else "")
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def write_files(folder: Path, shape: str, kinds: list[str]) -> None:
    """Random models of the shape for llama.cpp, without a tokenizer: FOLDER/SHAPE-KIND.gguf each."""
    from maxstack.models.files.gguf.write import write_gguf
    from maxstack.models.pretrained import gguf_writing as writing

    folder.mkdir(parents=True, exist_ok=True)
    built = model(SHAPES[shape], "float32")
    held = writing.held_by(built.config, None)
    none = {"tokenizer.ggml.model": "none", f"{held.row.name}.vocab_size": SHAPES[shape]["vocab_size"]}
    for kind in kinds:
        ggml = writing.KINDS[kind]
        metadata = {**writing.general(held.row.name, ggml), **held.keys, **none}
        write_gguf(folder / f"{shape}-{kind}.gguf", metadata, writing.exports(held, built, ggml))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--torch-python", default="", help="interpreter that has torch and transformers")
    parser.add_argument("--llama-python", default="", help="interpreter that has llama-cpp-python")
    parser.add_argument("--gguf", nargs="+", default=[], help="GGUF files of this shape, for llama.cpp")
    parser.add_argument("--write-gguf", type=Path, help="write such files, with random weights, and end")
    parser.add_argument(
        "--kinds", nargs="+", default=["float32", "q8_0", "q4_0"], help="of the files written"
    )
    parser.add_argument("--shape", choices=SHAPES, default="135m", help="of the model")
    parser.add_argument(
        "--weights", nargs="+", choices=BITS, default=["float32"], help="ours, the first compared with"
    )
    parser.add_argument("--rounds", type=int, default=7, help="decode turns of each contender")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8], help="rows at once")
    parser.add_argument("--prefills", type=int, default=2, help="prefill turns of each contender")
    parser.add_argument("--json", default="", help="file for all figures")
    parser.add_argument("--serve", choices=("memory", *BITS), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        serve(Memory() if args.serve == "memory" else Ours(SHAPES[args.shape], args.serve))
        return
    if args.write_gguf:
        write_files(args.write_gguf, args.shape, args.kinds)
        return
    rows = compare(args)
    print(table(rows))
    if args.json:
        Path(args.json).write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
