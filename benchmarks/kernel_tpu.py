"""Rows for TPUs that are not there: what the compiler says of each program, and of the kernel's memory on the chip."""

import re
from typing import Any

from kernel_shapes import (  # beside this file
    TRAINED,
    VOCABULARY,
    Row,
    append_of,
    attention_of,
    attention_work,
    cross_entropy_of,
    grouped_of,
    latent_of,
    paged_of,
    quantized_of,
)

ATTENTION = {
    "attention_forward": "forward",
    "attention_backward": "backward",
    "attention_backward_keys": "dk and dv",
    "attention_backward_queries": "dq",
}
"""What the table calls the kernels; in a program is either `attention_backward` or the two below it."""
GROUPED = {"grouped_matmul": "rows", "grouped_matmul_matrices": "matrices"}
"""Products of rows with their expert's matrix, and the gradients of the matrices."""


def attention(key: Row) -> list[Row]:
    """Attention. Computed logits count whole blocks, also where a mask hides most of one."""
    from tests.kernels.chips import compiled_for

    model, length = key["model"], int(key["tokens"])
    function, arguments = attention_of(model, length)
    program = compiled_for(key["chip"], function, *arguments)
    forward, forward_bytes, backward, backward_bytes = attention_work(model, length)
    vmem = {f"VMEM MiB, {short}": mib(on_chip_memory(program, name)) for name, short in ATTENTION.items()}
    return [key | vmem | costs(program, forward + backward, forward_bytes + backward_bytes)]


def paged(key: Row) -> list[Row]:
    """Attention over pages; all sequences are full, so that every page of the pool is read."""
    of = paged_of(tpu(key["chip"]), key["model"], key["pages"], int(key["queries"]))
    return [key | one_kernel(key["chip"], of, "paged_attention")]


def latents(key: Row) -> list[Row]:
    """Attention over latents."""
    of = latent_of(tpu(key["chip"]), key["pages"], int(key["queries"]))
    return [key | one_kernel(key["chip"], of, "paged_attention")]


def append(key: Row) -> list[Row]:
    """New tokens written into pages; the pool is donated. Nothing is multiplied."""
    from tests.kernels.chips import compiled_for

    tokens = int(key["tokens"])
    function, arguments, moved = append_of(tpu(key["chip"]), key["model"], key["pages"], tokens)
    program = compiled_for(key["chip"], function, *arguments, donate_argnums=0)
    kernel = "append_token" if tokens == 1 else "append_pages"
    row = costs(program, 0, moved)
    row = {name: cell.partition("/ ")[2] if name == "of them needed" else cell for name, cell in row.items()}
    del row["GFLOP"]
    return [key | {"VMEM MiB": mib(on_chip_memory(program, kernel))} | row]


def quantized(key: Row) -> list[Row]:
    """A product with a packed weight."""
    activations = "int8" if "×" in key["weights"] else "float"
    of = quantized_of(key["weights"].split()[0], int(key["tokens"]), key["model"], activations)
    return [key | one_kernel(key["chip"], of, "quantized_matmul")]


def grouped(key: Row) -> list[Row]:
    """Products by expert; tiles at the borders of experts are computed for each of the two."""
    from tests.kernels.chips import compiled_for

    function, arguments, flops, moved = grouped_of(key["weights"], int(key["rows"]), key["model"])
    program = compiled_for(key["chip"], function, *arguments)
    vmem = {f"VMEM MiB, {short}": mib(on_chip_memory(program, name)) for name, short in GROUPED.items()}
    return [key | vmem | costs(program, flops, moved)]


def cross_entropy(key: Row) -> list[Row]:
    """Loss and gradients, on an H200 too. A program states one turn of its loop over chunks of tokens."""
    from tests.kernels.chips import compiled_for

    function, arguments, flops, moved = cross_entropy_of(key["model"], key["tokens"] == "weighed")
    program: Any = compiled_for("h200" if key["chip"] == "H200" else key["chip"], function, *arguments)
    width = arguments[0].shape[1]
    held, width = logits_held(program.as_text(), arguments[0].shape[1]), arguments[0].shape[1]
    row = key | {
        "logits held, tokens": str(held),
        "temporaries MB": f"{program.memory_analysis().temp_size_in_bytes / 1e6:.1f}",
        "of them the gradient's sum": f"{4 * width * VOCABULARY / 1e6:.1f}",
    }
    cost = program.cost_analysis()
    if cost is None:  # XLA for GPUs says nothing
        return [row | dict.fromkeys(("GFLOP", "MB moved", "of them needed"), "-")]
    turns, outside = -(-TRAINED // held), OUTSIDE * width * VOCABULARY
    computed = turns * cost["flops"]
    accessed = turns * (cost["bytes accessed"] - outside) + outside
    return [
        row
        | {
            "GFLOP": f"{computed / 1e9:.1f}",
            "MB moved": f"{accessed / 1e6:.1f}",
            "of them needed": f"{flops / computed:.0%} / {moved / accessed:.0%}",
        }
    ]


OUTSIDE = 10
"""Bytes for each number of the matrix around the loop: zeros of the sum, the sum read, the gradient written."""


def logits_held(text: str, width: int) -> int:
    """The most tokens for which a program has an array with a column for each word."""
    found = re.findall(rf"\[(\d+),{VOCABULARY}\]|\[{VOCABULARY},(\d+)\]", text)
    sizes = {int(one or other) for one, other in found} - {width, 1}
    return max(sizes)


def tpu(chip: str) -> Any:
    from maxstack.kernels.dispatch import Chip

    return Chip("tpu", chip)


def one_kernel(chip: str, of: tuple, kernel: str) -> Row:
    """The columns of a program with one kernel: its memory on the chip, and what it costs."""
    from tests.kernels.chips import compiled_for

    function, arguments, flops, moved = of
    program = compiled_for(chip, function, *arguments)
    return {"VMEM MiB": mib(on_chip_memory(program, kernel))} | costs(program, flops, moved)


def on_chip_memory(program: Any, kernel: str) -> int:
    """Bytes of VMEM that a Mosaic TPU kernel of a compiled program takes; 0 if it is not in there."""
    for line in program.as_text().splitlines():
        if re.search(rf"[/(]{kernel}\)*/pallas_call", line) and "tpu_custom_call" in line:
            found = re.search(r'"used_scoped_memory_configs":\[\{"memory_space":"1"[^}]*"size":"(\d+)"', line)
            if found:
                return int(found[1])
    return 0


def mib(size: int) -> str:
    return f"{size / 2**20:.1f}" if size else "-"


def costs(program: Any, flops: float, moved: float) -> Row:
    """What a program states for XLA's schedule, beside what has to be computed and moved."""
    cost, memory = program.cost_analysis(), program.memory_analysis()
    row = {"temporaries MB": f"{memory.temp_size_in_bytes / 1e6:.1f}"}
    row |= {"GFLOP": f"{cost['flops'] / 1e9:.1f}"}
    row |= {"MB moved": f"{cost['bytes accessed'] / 1e6:.1f}"}
    row |= {
        "of them needed": f"{flops / max(cost['flops'], 1):.0%} / {moved / max(cost['bytes accessed'], 1):.0%}"
    }
    seconds = cost[
        "optimal_seconds"
    ]  # of some programs below 0: what the compiler does not know counts as -1 or so
    row |= {"compiler's µs": f"{seconds * 1e6:,.0f}" if seconds > 0 else "-"}
    return row | {"program KB": f"{memory.generated_code_size_in_bytes / 1e3:.0f}"}
