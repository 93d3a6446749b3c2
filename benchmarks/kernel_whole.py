"""Whole programs compiled for chips that are not there: which kernels are inside, and how often each is called.

    python benchmarks/kernel_whole.py                                  # writes the table of docs/kernels.md
    python benchmarks/kernel_whole.py --only program=decode chip=H200  # some of its rows, the others stay
    python benchmarks/kernel_whole.py --check                          # writes nothing, fails where a program changed

The programs are those that the trainer and the server run: a step of training, a decode step of all rows, a chunk of
prompts. Sizes of layers are real, layers few: their number is that of a scan and costs no time.
"""

import argparse
import dataclasses
import math
import os
import re
import sys
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple

from kernel_programs import TPUS, Row, product  # beside this file
from kernel_table import ROOT, compilers, put, recorded, table  # beside this file

NAME = "whole"
LAYERS, VOCABULARY = 3, 32_768
TOKENS = 512
"""Of a row that is trained on."""
ROWS, WIDTH, CHUNK = 16, 16, 256
"""Of a step of the server: rows, pages of each, tokens of a chunk."""
PAGES = {"bfloat16": 4096, "int8": 12_288, "int4": 12_288}
"""Of a layer's pool: as real ones, no part of it fits the chip, scales neither."""
CHIPS = ("H200", *TPUS)
NAMES = ("program", "model", "weights", "cache", "chips", "chip")
CELL = "kernels inside, calls in a run"
KERNELS = re.compile(r'custom_call_target="(?:tpu_custom_call|mosaic_gpu\w*)"')


class Inside(NamedTuple):
    """What a compiled program holds."""

    kernels: Counter[str]
    """Calls of each in a run."""
    copies: list[str]
    """Instructions that copy a pool."""
    temporaries: int
    """Bytes beside arguments and results."""
    layer: int = 0
    """Bytes of a layer's weights, of a program that shall copy none of them."""


def models() -> dict[str, Any]:
    """Layers with the sizes of Llama 3 8B, of a small mixture, of DeepSeek-V2-Lite's attention."""
    from maxstack.models import AttentionConfig, BlockConfig, MoEConfig, StackConfig, TransformerConfig, llama
    from maxstack.models.feed_forward import FeedForwardConfig
    from maxstack.models.mla import MLAConfig

    def of(block: BlockConfig) -> TransformerConfig:
        stacks = (StackConfig(pattern=(block,), repeats=LAYERS),)
        return TransformerConfig(vocab_size=VOCABULARY, width=2048, stacks=stacks, **shared)

    shared: dict[str, Any] = {"dtype": "bfloat16", "tie_embeddings": False, "max_length": 4096}
    dense = llama(
        vocab_size=VOCABULARY, width=4096, depth=LAYERS, heads=32, kv_heads=8, feed_forward=14_336, **shared
    )
    mixture = MoEConfig(size=768, experts=16, experts_per_token=4)
    latent = MLAConfig(heads=16, kv_rank=512)
    return {
        "dense": dense,
        "mixture": of(
            BlockConfig(attention=AttentionConfig(heads=32, kv_heads=8, head_size=128), feed_forward=mixture)
        ),
        "MLA": of(BlockConfig(attention=latent, feed_forward=FeedForwardConfig(size=10_944))),
    }


def training(key: Row) -> tuple[Any, ...]:
    """A step of training, forward, backward and update, on one chip or on four that share it."""
    from maxstack import sharding
    from maxstack.kernels.dispatch import chip_of, compiling_for
    from maxstack.optim import OptimConfig
    from maxstack.train import state as states
    from maxstack.train.losses import pretrain
    from maxstack.train.step import SafetyConfig, abstract_batch, train_step
    from maxstack.train.step import compiled as compiled_step
    from tests.kernels.chips import as_users_compile

    chips = int(key["chips"])
    devices = devices_of(key["chip"], chips)
    cut = sharding.MeshConfig(fsdp=2, tensor=2) if chips > 1 else sharding.MeshConfig()
    mesh, optim = sharding.build_mesh(cut, devices), OptimConfig()
    config = dataclasses.replace(models()[key["model"]], remat="attention")
    plan = states.layout(config, optim, mesh, zero=cut.zero, steps=10)
    step = train_step(plan, pretrain, optim, SafetyConfig(), 0.0, 10)
    with compiling_for(chip_of(devices[0])), as_users_compile():
        return (compiled_step(plan, step, abstract_batch(plan, 1, 2, TOKENS), plan.abstract(config)),)


def serving(key: Row) -> tuple[Any, Any, int]:
    """A step of the server, the pools that it is given, and the bytes of a layer's weights."""
    from maxstack.bench.serve.absent_chip import Setting, made
    from tests.kernels.chips import as_users_compile

    weights: Any = key["weights"]
    kv: Any = key["cache"]
    setting = Setting(
        config=models()[key["model"]], topology="", rows=2 if key["program"] == "chunk" else ROWS, width=WIDTH,
        pages=PAGES[kv], weights=weights, kv=kv, chunk=CHUNK if key["program"] == "chunk" else 0,
    )  # fmt: skip
    with as_users_compile():
        step = made(setting, devices_of(key["chip"], int(key["chips"])))
    stacked = [leaf for leaf in step.leaves if leaf.shape[0] == LAYERS]
    layer = sum(math.prod(leaf.shape[1:]) * leaf.dtype.itemsize for leaf in stacked)
    return step.compiled, step.pools, layer if key["program"] == "decode" else 0


def devices_of(chip: str, count: int) -> list[Any]:
    """So many devices of a topology description."""
    from tests.kernels.chips import device_of

    first = device_of(chip.lower())
    return [first] if count == 1 else list(first.client.devices())[:count]


def inside(program: Any, pools: Any = None, layer: int = 0) -> Inside:
    """What a compiled program holds."""
    import jax

    from maxstack.plan.hlo import computations

    whole = computations(program.as_text() or "")
    sizes = {leaf.size for leaf in jax.tree.leaves(pools)}
    copies = [
        one.line.strip()
        for body in whole.values()
        for one in body.values()
        if one.op in ("copy", "copy-start", "transpose") and sizes & {math.prod(a.shape) for a in one.arrays}
    ]
    kernels: Counter[str] = Counter()
    for name, times in calls(whole, "ENTRY", 1):
        kernels[name] += times
    return Inside(kernels, copies, program.memory_analysis().temp_size_in_bytes, layer)


def calls(whole: Any, name: str, times: int) -> Iterator[tuple[str, int]]:
    """The kernels that a computation calls, and how often; of a conditional the first branch, where nobody asks for
    more."""
    for one in whole.get(name, {}).values():
        called = one.called
        if one.op in ("custom-call", "custom-call-start") and KERNELS.search(one.line):
            yield kernel_of(one.line), times
        elif one.op == "while":
            yield from calls(whole, called["body"][0], times * trips(whole, one))
        elif "branch_computations" in called:
            yield from calls(whole, called["branch_computations"][0], times)
        else:
            for inner in (*called.get("calls", ()), *called.get("to_apply", ())):
                yield from calls(whole, inner, times)


def trips(whole: Any, loop: Any) -> int:
    """Rounds of a loop: what the compiler knows, or the constant that its condition compares with."""
    if known := re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.line):
        return int(known[1])
    lines = [one.line for one in whole[loop.called["condition"][0]].values()]
    return max(
        (int(found[1]) for line in lines if (found := re.search(r" constant\((\d+)\)", line))), default=1
    )


def kernel_of(line: str) -> str:
    """The name of the kernel that a custom call runs: Mosaic GPU's is in its module, Mosaic TPU's in the operation's
    name."""
    found = re.search(r"(\w+)\)*/(?:pallas_call|mpmd_map)", line)
    return found[1] if found else "unnamed"


def promised(key: Row) -> list[set[str]]:
    """By the first table of docs/kernels.md: the kernels that must be inside, one of each set."""
    hopper = key["chip"] == "H200"
    if key["program"] == "training":
        backward = ("attention_dkv", "attention_dq") if hopper else ("attention_backward",)
        names = ["attention_forward", *backward]
        names += ["grouped_matmul", "grouped_matmul_matrices"] if key["model"] == "mixture" else []
        return [{name, "attention_backward_keys"} if "backward" in name else {name} for name in names]
    names = []
    if not hopper:
        names.append("append_token" if key["program"] == "decode" else "append_pages")
    if key["model"] != "MLA":
        names.append("paged_attention")
    elif not hopper or key["cache"] == "bfloat16":
        names.append("latent_paged_attention" if hopper else "paged_attention")
    if key["weights"] != "bfloat16":
        names.append("quantized_matmul")
    if key["model"] == "mixture":
        packed = hopper and key["weights"] != "bfloat16"
        names.append("grouped_matmul_quantized" if packed else "grouped_matmul")
    return [{name} for name in names]


def keys() -> list[Row]:
    """What is compiled."""
    train = {"program": ("training",), "weights": ("float32",), "cache": ("-",), "chip": CHIPS}
    serve = {"chips": (1,), "chip": CHIPS}
    some = [
        product(model=("dense", "mixture", "MLA"), chips=(1,), **train),
        *(
            product(program=(program,), model=("dense",), weights=(w,), cache=(c,), **serve)
            for program in ("decode", "chunk")
            for w, c in (("bfloat16", "bfloat16"), ("int8", "int8"), ("int4-g32", "int4"))
        ),
        product(
            program=("decode",),
            model=("mixture",),
            weights=("bfloat16", "int4-g32"),
            cache=("int8",),
            **serve,
        ),
        product(
            program=("decode",),
            model=("MLA",),
            weights=("bfloat16", "int4-g32"),
            cache=("bfloat16",),
            **serve,
        ),
    ]
    return [key for part in some for key in part]


def compiled(key: Row) -> Inside:
    """A program compiled, with the package's sizes of blocks."""
    from maxstack.kernels import tiles

    with tiles.trying({}):
        return inside(*(training(key) if key["program"] == "training" else serving(key)))


def faults(key: Row, found: Inside) -> list[str]:
    """What is not as it should be: a kernel that is not inside, a pool that is copied, weights that are."""
    what = ", ".join(key.values())
    missing = [one for one in promised(key) if not one & set(found.kernels)]
    said = [f"{what}: {' or '.join(sorted(one))} is not inside" for one in missing]
    # Whoever copies weights holds at least those of most of a layer; cuBLAS and what else a step needs are less.
    if found.layer and found.temporaries > found.layer / 2:
        said.append(
            f"{what}: holds {found.temporaries / 1e6:.0f} MB beside what it is given, so that it copies weights: "
            f"those of a layer are {found.layer / 1e6:.0f} MB"
        )
    return said + [f"{what}: copies a pool: {line[:120]}" for line in found.copies]


def words(found: Inside) -> str:
    """A cell."""
    return ", ".join(f"{name} {times}" for name, times in sorted(found.kernels.items())) or "none"


def grouped(rows: list[Row]) -> list[Row]:
    """Rows of one program on several chips as one, where they are the same."""
    merged: dict[tuple[str, ...], Row] = {}
    for row in rows:
        rest = {name: value for name, value in row.items() if name != "chip"}
        place = merged.setdefault(tuple(rest.values()), {**row, "chip": ""})
        place["chip"] += f"{', ' if place['chip'] else ''}{row['chip']}"
    return list(merged.values())


def apart(rows: list[Row]) -> list[Row]:
    """A row for each chip."""
    return [{**row, "chip": chip} for row in rows for chip in row["chip"].split(", ")]


def changed(key: Row, found: Inside) -> list[str]:
    """Where a program is not what the page says."""
    old = [row for row in apart(recorded(NAME)) if row.items() >= key.items()]
    if not old:
        return [f"{', '.join(key.values())} is not on the page"]
    now = words(found)
    return [] if old[0][CELL] == now else [f"{', '.join(key.values())}: {old[0][CELL]} -> {now}"]


def main() -> int:
    """Run the script; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME=VALUE,VALUE", help="some rows")
    parser.add_argument("--check", action="store_true", help="compare with the page and write nothing")
    args = parser.parse_args()
    os.environ["JAX_PLATFORMS"] = "cpu"
    sys.path.insert(0, str(ROOT))
    picked = {part.partition("=")[0]: part.partition("=")[2].split(",") for part in args.only}
    wanted = [key for key in keys() if all(key[name] in values for name, values in picked.items())]
    worse = []
    for key in wanted:
        begun = time.perf_counter()
        found = compiled(key)
        worse += (said := faults(key, found) + (changed(key, found) if args.check else []))
        told = f"{words(found)}; temporaries {found.temporaries / 1e6:.0f} MB; {time.perf_counter() - begun:.0f} s"
        print(f"{', '.join(key.values())}: {told}", *said, sep="\n  ", flush=True)
        if not args.check and not said:
            write([key | {CELL: words(found)}])
    return 1 if worse else 0


def write(new: list[Row]) -> None:
    """Rows onto the page, in the order of the keys; the others stay."""
    rows = {tuple(row[name] for name in NAMES): row for row in [*apart(recorded(NAME)), *new]}
    order = [tuple(key[name] for name in NAMES) for key in keys()]
    kept = [{name: rows[each][name] for name in (*NAMES, CELL)} for each in order if each in rows]
    put(NAME, f"{table(grouped(kept))}\n\nCompiled with {compilers()}.")


if __name__ == "__main__":
    raise SystemExit(main())
