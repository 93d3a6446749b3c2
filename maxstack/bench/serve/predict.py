"""What a chip would give under a load: the real scheduler, on the time of a decode step compiled for that chip."""

import logging
from pathlib import Path
from typing import Any

from maxstack.bench.serve import recorded
from maxstack.config import UserError
from maxstack.models.transformer import TransformerConfig
from maxstack.serve.cost import CHIPS, Cost
from maxstack.serve.load import Load
from maxstack.serve.plan import Limits
from maxstack.serve.simulate import Report, Target, simulate

log = logging.getLogger(__name__)

GIB = 2**30
MEMORY_GIB = {"v5e": 16, "v5p": 95, "v6e": 32, "v7x": 192, "a100": 80, "h100": 80, "h200": 141}
"""Of a chip (cloud.google.com/tpu/docs/system-architecture, NVIDIA's data sheets)."""
OF_BANDWIDTH, OF_PRODUCTS = 0.8, 0.5
"""Shares of the peaks that are expected to be reached."""


def predict(model: str | None, chip: str, load: Load, target_s: dict[str, float]) -> Report:
    """Serve a load on one chip, or as a step that was compiled before and kept by name. Raises UserError for a chip
    that is not known, or too small."""
    if chip not in CHIPS and chip not in recorded.kept():
        raise UserError(
            f"--simulate {chip}: no such chip is known; there are {', '.join(CHIPS)}, and steps compiled before: "
            f"{', '.join(recorded.kept())}"
        )
    if "e2e" in target_s:
        raise UserError("--goodput e2e: the simulator counts by ttft and tpot; leave e2e out")
    target = None
    if target_s:
        target = Target(ttft_s=target_s.get("ttft", 1e9), tpot_s=target_s.get("tpot", 1e9))
    if chip not in CHIPS:
        record = recorded.kept()[chip]
        cost = recorded.cost_of(record, of_bandwidth=OF_BANDWIDTH, of_products=OF_PRODUCTS)
        return simulate(recorded_limits(record, cost), cost, load, target=target)
    if model is None:
        raise UserError(f"--simulate {chip} wants --model")
    config = config_of(model)
    limits = limits_on(config, chip)
    cost = formula(config, chip)
    if chip in TPUS:
        from maxstack.bench.serve.compiled_step import compiled_step, cost_of

        step = compiled_step(config, chip, limits.rows, config.dtype)
        cost = cost_of(
            step, cost, CHIPS[chip], limits.rows, of_bandwidth=OF_BANDWIDTH, of_products=OF_PRODUCTS
        )
        log.info(
            "by the compiler's count a token takes %.2f GFLOP besides attention; the model's sizes say %.2f",
            cost.flops_a_token / 1e9,
            formula(config, chip).flops_a_token / 1e9,
        )
    else:
        log.info("no compiler tells the cost of a step on %s: it is computed from the model's sizes", chip)
    return simulate(limits, cost, load, target=target)


TPUS = ("v5e", "v5p", "v6e", "v7x")


def config_of(model: str) -> TransformerConfig:
    """Of a run file, of a folder with config.json (weights or not), or of any model by name; for accelerators, so in
    bfloat16."""
    import dataclasses

    from maxstack.config import load_run
    from maxstack.models.families import read_config
    from maxstack.models.pretrained.folder import CONFIG_FILE, read_json

    file = Path(model)
    config: Any
    if file.suffix == ".py":
        config = load_run(file).model
    elif (file / CONFIG_FILE).is_file() and "model_type" in read_json(file / CONFIG_FILE):
        _, config = read_config(read_json(file / CONFIG_FILE), str(file / CONFIG_FILE))
    else:
        from maxstack.models.load import load

        config = load(model)[0].config
    return dataclasses.replace(config, dtype="bfloat16")


def formula(config: TransformerConfig, chip: str) -> Cost:
    """From the model's sizes alone."""
    from maxstack.models.account import account_of, cache_bytes, layers

    peaks, counted = CHIPS[chip], account_of(config, 1)
    return Cost(
        weight_bytes=2 * counted.parameters,
        kv_bytes_a_token=cache_bytes(config, "bfloat16"),
        flops_a_token=2 * counted.matrix_parameters,
        attention_flops_a_pair=sum(
            repeats * block.attention.flops_per_key() for repeats, block in layers(config)
        ),
        bytes_a_second=peaks.bytes_a_second * OF_BANDWIDTH,
        flops_a_second=peaks.flops_a_second * OF_PRODUCTS,
    )


def recorded_limits(record: dict[str, Any], cost: Cost) -> Limits:
    """As the server would choose them on these chips, for the model of a step that was kept."""
    from maxstack.serve.sizes import ACCELERATOR_SHARE, KERNEL_PAGE

    config = recorded.config_of(record["shape"])
    memory = MEMORY_GIB[record["chip"]] * GIB * record["chips"]
    room = ACCELERATOR_SHARE * (memory - cost.weight_bytes)
    return limits_of(config, int(room // (KERNEL_PAGE * cost.kv_bytes_a_token)))


def limits_on(config: TransformerConfig, chip: str) -> Limits:
    """As the server would choose them on a chip with this memory."""
    from maxstack.models.account import account_of
    from maxstack.models.paged.pools import page_bytes
    from maxstack.serve.sizes import ACCELERATOR_SHARE, KERNEL_PAGE, MOST_LENGTH

    length = min(config.max_length, MOST_LENGTH)
    weights, memory = 2 * account_of(config, 1).parameters, MEMORY_GIB[chip] * GIB
    room = ACCELERATOR_SHARE * (memory - weights)
    pages = int(room // page_bytes(config, KERNEL_PAGE, config.dtype))
    width = -(-length // KERNEL_PAGE)
    if pages < width:
        raise UserError(
            f"--simulate {chip}: {weights / 1e9:.1f} GB of weights leave {max(room, 0) / 1e9:.1f} GB of its "
            f"{memory / 1e9:.1f} GB for the cache, less than one sequence of {length} tokens needs; several chips are "
            "not simulated: choose a larger one"
        )
    return limits_of(config, pages)


def limits_of(config: TransformerConfig, pages: int) -> Limits:
    """With room for so many pages."""
    from maxstack.serve.sizes import ACCELERATOR_CHUNKS, ACCELERATOR_ROWS, KERNEL_PAGE, MOST_LENGTH

    length = min(config.max_length, MOST_LENGTH)
    width = -(-length // KERNEL_PAGE)
    return Limits(
        rows=ACCELERATOR_ROWS, page=KERNEL_PAGE, pages=min(pages, ACCELERATOR_ROWS * width), max_length=length,
        chunks=ACCELERATOR_CHUNKS, tokens_a_step=ACCELERATOR_ROWS + max(r * t for r, t in ACCELERATOR_CHUNKS),
        waiting=100_000,
    )  # fmt: skip
