"""Compile GPU kernels for an H200 that is not there: registers, spilled bytes, shared memory and main loops of each.

`registers` are what `ptxas` gives each thread at launch; the warpgroups then move them between each other, as the
docstring of each kernel says. A spilled register is what `ptxas` calls one: bytes it stores to and loads from memory.
`kernel_table.py` writes the rows into docs/kernels.md.
"""

import os
import re
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from kernel_loops import entry, main_loops, threads_of  # beside this file


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
            **running(entry(words[0], name)),
        }
        for name, stores, loads, registers in found
    ]


def running(ptx: str) -> dict[str, Any]:
    """Threads of a block, warpgroups that compute (one of several only loads), and the main loops they run."""
    threads = threads_of(ptx)
    return {"threads": threads, "warpgroups": max(1, threads // 128 - 1), "loops": main_loops(ptx)}


@contextmanager
def said() -> Iterator[list[str]]:
    """The words that the compiler, which knows nothing of `sys.stdout`, writes meanwhile: one string, at the end."""
    os.environ["MOSAIC_GPU_DUMP_PTXAS"] = os.environ["MOSAIC_GPU_DUMP_PTX"] = "1"
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
                    total += place.aval.size * bits(place.aval.dtype) // 8
    return total


def bits(dtype: Any) -> int:
    """Of a number; two of 4 bits share a byte, and a barrier, which has no size, takes 64."""
    return 4 if "int4" in str(dtype) else 8 * getattr(dtype, "itemsize", 8)
