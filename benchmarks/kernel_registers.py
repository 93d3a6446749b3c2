"""Compile the GPU kernels for an H200 that is not there: registers, spilled bytes and shared memory of each.

    python benchmarks/kernel_registers.py                     # a table
    python benchmarks/kernel_registers.py --json rows.json

`registers` are what `ptxas` gives each thread at launch; the warpgroups then move them between each other, as the
docstring of each kernel says. A spilled register is what `ptxas` calls one: bytes it stores to and loads from memory.
"""

import argparse
import json
import os
import re
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
ATTENTION: dict[str, tuple[int, ...]] = {
    "1B: 16/8 heads of 64": (1, 8192, 16, 8, 64, 64),
    "8B: 32/8 heads of 128": (1, 8192, 32, 8, 128, 128),
    "70B: 64/8 heads of 128": (1, 8192, 64, 8, 128, 128),
    "96: 32/32 heads of 96": (1, 8192, 32, 32, 96, 96),
    "MLA: 16/16 heads of 192/128": (1, 8192, 16, 16, 192, 128),
    "256: 16/8 heads of 256": (1, 8192, 16, 8, 256, 256),
}
"""Training shapes: rows, positions, query heads, kv heads, head sizes of keys and values."""
MASKS: dict[str, dict[str, Any]] = {
    "causal": {},
    "packed": {"packed": True},
    "packed, soft cap, sinks": {"packed": True, "softcap": 30.0, "sunk": True},
}


def attention_rows(shapes: dict[str, tuple[int, ...]], masks: dict[str, dict[str, Any]]) -> Iterator[dict]:
    """A row for each kernel of forward and backward, each shape and each kind of mask."""
    import jax
    import jax.numpy as jnp

    from maxstack.kernels.attention import mosaic_gpu
    from maxstack.kernels.attention.masks import Coordinates, Options

    for shape, (b, t, n, k, h, w) in shapes.items():
        for mask, kind in masks.items():
            packed, sunk = kind.get("packed", False), kind.get("sunk", False)
            options = Options(causal=True, window=None, softcap=kind.get("softcap"), scale=h**-0.5)

            def gradients(q, keys, v, sinks, ids, options=options, packed=packed, sunk=sunk):
                def run(q, keys, v):
                    at = Coordinates(ids, ids, None, None) if packed else Coordinates(None, None, None, None)
                    return mosaic_gpu.attention(options, None, None, q, keys, v, sinks if sunk else None, at)

                outputs, pull = jax.vjp(run, q, keys, v)
                return outputs, pull(outputs)

            arrays = [(b, t, n, h), (b, t, k, h), (b, t, k, w)]
            arguments = [jax.ShapeDtypeStruct(a, jnp.bfloat16) for a in arrays]
            arguments += [jax.ShapeDtypeStruct((n,), jnp.float32), jax.ShapeDtypeStruct((b, t), jnp.int32)]
            for resources in kernel_resources(gradients, *arguments):
                yield {"shape": shape, "mask": mask, **resources}


def kernel_resources(function: Any, *arguments: Any) -> list[dict[str, Any]]:
    """What the compiler says of each GPU kernel inside of `function` of these shapes."""
    import jax

    from maxstack.kernels.dispatch import compiling_for
    from tests.kernels.chips import HOPPER, compiled_for

    with compiling_for(HOPPER):
        shared = shared_bytes(jax.make_jaxpr(lambda *a: function(*a))(*arguments).jaxpr)
    with said() as words:
        compiled_for("h200", function, *arguments)
    found = re.findall(
        r"Function properties for (\w+)_mosaic_gpu_kernel\n.*?(\d+) bytes spill stores, (\d+) bytes spill loads\n"
        r".*?Used (\d+) registers",
        words[0],
        re.DOTALL,
    )
    serialized = "wgmma.mma_async instructions are serialized" in words[0]
    return [
        {
            "kernel": name,
            "registers": int(registers),
            "spilled": int(stores) + int(loads),
            "shared": shared[name],
            "serialized": serialized,
        }
        for name, stores, loads, registers in found
    ]


@contextmanager
def said() -> Iterator[list[str]]:
    """The words that the compiler, which knows nothing of `sys.stdout`, writes meanwhile: one string, at the end."""
    os.environ["MOSAIC_GPU_DUMP_PTXAS"] = "1"
    words: list[str] = []
    sys.stdout.flush()
    sys.stderr.flush()
    before = os.dup(1), os.dup(2)
    with tempfile.TemporaryFile() as file:
        try:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
            yield words
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os.dup2(before[0], 1)
            os.dup2(before[1], 2)
            os.close(before[0])
            os.close(before[1])
            file.seek(0)
            words.append(file.read().decode(errors="replace"))


def shared_bytes(jaxpr: Any) -> dict[str, int]:
    """Bytes of shared memory that each kernel inside of a traced function keeps for a block of threads."""
    import jax

    found: dict[str, int] = {}
    for equation in jaxpr.eqns:
        leaves = jax.tree.leaves(equation.params, is_leaf=lambda x: hasattr(x, "jaxpr") or hasattr(x, "eqns"))
        inner = [getattr(x, "jaxpr", x) for x in leaves if hasattr(x, "jaxpr") or hasattr(x, "eqns")]
        if equation.primitive.name == "mpmd_map":
            found[str(equation.params["name"])] = sum(scratch_bytes(part) for part in inner)
        else:
            for part in inner:
                found |= shared_bytes(part)
    return found


def scratch_bytes(jaxpr: Any) -> int:
    """Bytes of the blocks in shared memory at the top of a kernel; a barrier has 8."""
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "run_scoped":
            for place in equation.params["jaxpr"].invars:
                if "smem" in str(place.aval.memory_space):
                    total += place.aval.size * getattr(place.aval.dtype, "itemsize", 8)
    return total


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown."""
    lines = [
        "| kernel | shape | mask | registers | spilled bytes | shared KiB |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        kib = f"{row['shared'] / 1024:.0f}"
        parts = (row["kernel"], row["shape"], row["mask"], row["registers"], row["spilled"], kib)
        lines.append("| " + " | ".join(str(part) for part in parts) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="also write the rows here")
    arguments = parser.parse_args()
    os.environ["JAX_PLATFORMS"] = "cpu"
    sys.path.insert(0, str(ROOT))
    rows = list(attention_rows(ATTENTION, MASKS))
    print(table(rows))
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
