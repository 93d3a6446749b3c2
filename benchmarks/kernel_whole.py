"""Whole programs compiled for chips that are not there: which kernels are inside, and how often each is called.

    python benchmarks/kernel_whole.py                                     # writes the table of docs/kernels.md
    python benchmarks/kernel_whole.py --only program=decode chip=H200     # some of its rows, the others stay
    python benchmarks/kernel_whole.py --check                             # writes nothing, fails where a program changed

The programs are those that the trainer and the server run: a step of training, a decode step of all rows, a chunk of
prompts. Sizes of layers are real, layers few: their number is that of a scan and costs no time.
"""

import argparse
import dataclasses
import math
import os
import re
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from kernel_programs import TPUS, Row, Table, product  # beside this file
from kernel_table import TABLES, compile_rows, compilers, put, recorded  # beside this file

NAME = "whole"
LAYERS, VOCABULARY = 3, 32_768
ROWS, WIDTH, PAGES, CHUNK = 16, 16, 2048, 256
"""Of a step of the server: rows, pages of each, pages of a layer's pool, tokens of a chunk."""
CHIPS = ("H200", *TPUS)
KERNELS = re.compile(r'custom_call_target="(?:tpu_custom_call|mosaic_gpu\w*)"')


class Inside(NamedTuple):
    """What a compiled program holds."""

    kernels: Counter[str]
    """Calls of each in a run."""
    copies: list[str]
    """Instructions that copy a pool."""
    temporaries: int
    """Bytes beside arguments and results."""


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
        "mixture": of(BlockConfig(AttentionConfig(heads=32, kv_heads=4, head_size=128), mixture)),
        "MLA": of(BlockConfig(latent, FeedForwardConfig(size=10_944))),
    }


def training(key: Row) -> Any:
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
        return compiled_step(plan, step, abstract_batch(plan, 1, 2, 2048), plan.abstract(config)), None


def serving(key: Row) -> tuple[Any, Any]:
    """A step of the server, and the pools that it is given."""
    from maxstack.bench.serve.absent_chip import Setting, made
    from tests.kernels.chips import as_users_compile

    weights: Any = key["weights"]
    kv: Any = key["cache"]
    setting = Setting(
        config=models()[key["model"]], topology="", rows=2 if key["program"] == "chunk" else ROWS, width=WIDTH,
        pages=PAGES, weights=weights, kv=kv, chunk=CHUNK if key["program"] == "chunk" else 0,
    )  # fmt: skip
    with as_users_compile():
        step = made(setting, devices_of(key["chip"], int(key["chips"])))
    return step.compiled, step.pools


def devices_of(chip: str, count: int) -> list[Any]:
    """So many devices of a topology description."""
    from tests.kernels.chips import device_of

    first = device_of(chip.lower())
    return [first] if count == 1 else list(first.client.devices())[:count]


def inside(program: Any, pools: Any = None) -> Inside:
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
    return Inside(kernels, copies, program.memory_analysis().temp_size_in_bytes)


def calls(whole: Any, name: str, times: int) -> Iterator[tuple[str, int]]:
    """The kernels that a computation calls, and how often; of a conditional the first branch, where nobody asks for
    more."""
    for one in whole.get(name, {}).values():
        called = one.called
        if KERNELS.search(one.line):
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
    return max((int(found[1]) for line in lines if (found := re.search(r" constant\((\d+)\)", line))), default=1)


def kernel_of(line: str) -> str:
    """The name of the kernel that a custom call runs: what stands in front of the call in its operation's name."""
    source = re.search(r'op_name="([^"]*)"', line)
    found = re.search(r"(\w+)\)*/(?:pallas_call|mpmd_map|custom_mgpu_call)", source[1] if source else "")
    return found[1] if found else "unnamed"
