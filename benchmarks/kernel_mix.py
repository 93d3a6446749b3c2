"""What the instructions of a Hopper kernel allow on paper: a share of the tensor cores' peak, or of the bandwidth.

In a turn of the main loop each unit of a multiprocessor of an H200 takes a time of its own:

    tensor cores   the products
    shared memory  128 bytes a clock: operands of products that lie there, what threads read and write
    exp            exp2, log2, reciprocals: 16 threads a clock
    shuffle        numbers that move between threads: 32
    other          comparisons, choices, conversions, integers, logic: 64
    float          float32 additions, multiplications and both at once: 128
    issue          each of these instructions and all others: 128

If all units work at once the longest one bounds. If within a warpgroup none does while another works, their sum does;
the warpgroups of a multiprocessor, those of all blocks that it has room for, share the units. (CUDA C++ Programming
Guide, throughput of native arithmetic instructions, compute capability 9.0; NVIDIA H100 whitepaper.) PTX is what is
counted; ptxas merges some of its instructions, three-input logic for instance.
"""

import re
from collections import Counter
from typing import Any, NamedTuple

from kernel_loops import flops_of, products_of  # beside this file

WARPGROUP = 128
FLOPS_A_CLOCK = 4096
"""bfloat16, dense, of one multiprocessor: 989.4 TFLOP/s of 132 at 1.83 GHz; int8 has twice as many."""
BYTES_A_CLOCK = 4800 / 1.83 / 132
"""What 4,800 GB/s of memory give each of 132 multiprocessors: 19.9."""
SHARED_A_CLOCK = 128
LANES_A_CLOCK = {"exp": 16, "shuffle": 32, "other": 64, "float": 128, "rest": 128}
UNITS = {
    "exp": r"ex2|lg2|rsqrt|rcp|tanh|sqrt",
    "shuffle": r"shfl",
    "float": r"(fma|add|sub|mul|neg)\.[\w.]*(f32|f16|bf16)(x2)?$",
    "other": r"max|min|set|selp|slct|cvt|and|or|xor|not|sh[lrf]|lop3|prmt|bf[ei]|add|sub|mul|mad|neg|abs|div|rem|vote",
}
"""How instructions begin, the first that fits counts; others cost their issue alone."""
FREE = re.compile(r"mov|cvta|bra|ret|exit|trap|pragma|wgmma")
"""What ptxas drops, and the few that start products."""
ACCESS = re.compile(r"(?:ld|st)\.(?:\w+\.)*?shared\S*?(?:\.v(\d))?\.[a-z]+(\d+)$|(?:ld|st)matrix\S*\.x(\d)")
REGISTERS, SHARED, THREADS = 65_536, 228 * 1024, 2048
"""Of a multiprocessor; a block of threads takes 1 KiB of shared memory more than it asks for."""


def clocks(names: Counter[str]) -> dict[str, float]:
    """Clocks that each unit takes for one turn of one warpgroup."""
    count = Counter[str]()
    for name, times in names.items():
        if not FREE.match(name):
            count[next((unit for unit, starts in UNITS.items() if re.match(starts, name)), "rest")] += times
    found = {unit: WARPGROUP * count[unit] / lanes for unit, lanes in LANES_A_CLOCK.items()}
    accessed = WARPGROUP * sum(times * accessed_bytes(name) for name, times in names.items())
    products = products_of(names)
    # Of rows and columns 32 bytes go into a product, whatever their type.
    operands = sum(32 * (n + (0 if held else m)) for m, n, _, held in products)
    tensor = max(sum(32 * m * n for m, n, _, _ in products) / FLOPS_A_CLOCK, operands / SHARED_A_CLOCK)
    return found | {
        "tensor": tensor,
        "accessed": accessed / SHARED_A_CLOCK,
        "shared": (accessed + operands) / SHARED_A_CLOCK,
        "issue": WARPGROUP * count.total() / 128,
    }


def accessed_bytes(name: str) -> float:
    """Of shared memory, by a thread."""
    found = ACCESS.match(name)
    if found is None:
        return 0
    return 4.0 * int(found[3]) if found[3] else int(found[1] or 1) * int(found[2]) / 8


def apart(units: dict[str, float]) -> float:
    """Clocks of a warpgroup's turn if no unit works while another does."""
    return sum(units[unit] for unit in (*LANES_A_CLOCK, "accessed", "tensor"))


def blocks_at_once(found: dict[str, Any]) -> int:
    """Blocks of threads that a multiprocessor has room for."""
    threads = found["threads"]
    registers = -(-found["registers"] // 8) * 8 * threads
    return max(1, min(REGISTERS // registers, SHARED // (found["shared"] + 1024), THREADS // threads))


def peak(found: dict[str, Any]) -> dict[str, str]:
    """Columns of a kernel that the tensor cores bound."""
    names = "exp2 clocks a tensor clock", "peak allowed", "with all parts"
    if not found["loops"]:
        return dict.fromkeys(names, "-")
    fewest, most = (turn(found, which) for which in ("fewest", "most"))
    exp2 = f"{fewest.units['exp'] / fewest.units['tensor']:.2f}"
    return dict(
        zip(names, (exp2, *(shares(each.units["tensor"], each) for each in (fewest, most))), strict=True)
    )


def bandwidth(found: dict[str, Any], operand_bytes: float, columns: int | None) -> dict[str, str]:
    """Columns of a kernel that the memory bounds. A number of the streamed operand, `operand_bytes` of memory each, is
    multiplied with `columns` others (None: those of a product)."""
    loops = found["loops"]
    columns = columns or products_of(loops[0].fewest)[0][1]
    flops = sum(flops_of(loop.fewest) for loop in loops) * (found["warpgroups"] // len(loops))
    brought, one = operand_bytes * flops / (2 * columns), turn(found, "fewest")
    return {
        "B a turn": f"{brought:,.0f}",
        "clocks a turn": f"{one.at_once:,.0f} / {max(one.at_once, one.apart):,.0f}",
        "bandwidth allowed": shares(brought / BYTES_A_CLOCK, one),
    }


class Turn(NamedTuple):
    """Clocks of a turn of the main loop, of all warpgroups of a block."""

    units: dict[str, float]
    at_once: float
    """The longest unit's."""
    apart: float
    """A warpgroup's sum, for each of the blocks that a multiprocessor has room for: they wait each for itself."""


def turn(found: dict[str, Any], which: str) -> Turn:
    """Of what `kernel_registers.kernel_resources` gives; `which` is "fewest" or "most"."""
    loops = found["loops"]
    each = found["warpgroups"] // len(loops)  # that run the same loop
    each_units = [clocks(getattr(loop, which)) for loop in loops]
    units = {unit: each * sum(one[unit] for one in each_units) for unit in each_units[0]}
    return Turn(units, max(units.values()), max(map(apart, each_units)) / blocks_at_once(found))


def shares(needed: float, one: Turn) -> str:
    """Of `needed` clocks: if all units work at once, and if within a warpgroup none does while another works."""
    return " / ".join(f"{min(needed / clock, 1):.0%}" for clock in (one.at_once, max(one.at_once, one.apart)))
