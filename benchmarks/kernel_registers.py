"""Compile GPU kernels for an H200 that is not there: registers, spilled bytes, shared memory and instructions of each.

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
            "instructions": instructions(words[0], name),
        }
        for name, stores, loads, registers in found
    ]


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


UNITS = {
    "exp": ("ex2", "lg2", "rsqrt", "rcp", "tanh", "sqrt"),
    "float": ("fma", "add.f32", "add.rn", "sub.f32", "sub.rn", "mul.f32", "mul.rn", "neg.f32", "sub.bf16x2"),
    "other": (
        "max",
        "min",
        "setp",
        "selp",
        "cvt",
        "and.b32",
        "or.b32",
        "xor.b32",
        "shl.b32",
        "shr",
        "prmt",
        "add.s32",
    ),
}
"""How instructions begin that take a unit's time; what only moves numbers is left to ptxas, which drops most of it."""


def instructions(words: str, kernel: str) -> dict[str, int]:
    """Of a kernel's PTX: floating-point operations of one warpgroup's `wgmma`, and instructions of a thread by unit."""
    ptx = (
        words.partition(f".entry {kernel}_mosaic_gpu_kernel")[2]
        .partition("ptxas info")[0]
        .partition(".entry ")[0]
    )
    shapes = re.findall(r"wgmma\.mma_async\.sync\.aligned\.m(\d+)n(\d+)k(\d+)", ptx)
    found = {"wgmma flops": sum(2 * int(m) * int(n) * int(k) for m, n, k in shapes)}
    names = re.findall(r"^\s*(?:@!?%p\d+ )?([a-z][\w.:]*)", ptx, re.MULTILINE)
    return found | {unit: sum(name.startswith(starts) for name in names) for unit, starts in UNITS.items()}


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
