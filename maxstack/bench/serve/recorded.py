"""Decode steps that were compiled for chips, kept with the package: `--simulate NAME` predicts from them.

benchmarks/aot_decode.py writes steps.json. No chip was there: the times made of it are those of a roofline.
"""

import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from maxstack.bench.serve.absent_chip import PAGE, PageNumbers, Setting, Weights
from maxstack.models import llama
from maxstack.models.account import account_of, layers
from maxstack.models.transformer import TransformerConfig
from maxstack.serve.cost import CHIPS, Cost

FILE = Path(__file__).with_name("steps.json")
SHAPES: dict[str, dict[str, Any]] = {
    "8b": {"width": 4096, "depth": 32, "heads": 32, "kv_heads": 8, "feed_forward": 14_336},
    "70b": {"width": 8192, "depth": 80, "heads": 64, "kv_heads": 8, "feed_forward": 28_672},
}
"""Llama 3's (arXiv:2407.21783, table 3)."""
VOCABULARY = 128_256
POOL_BYTES = 256 << 20
"""Of a layer's keys on a chip, at least."""
LINKS = {"v5e": 200e9, "v5p": 600e9, "v6e": 448e9, "v7x": 1200e9}
"""Bytes a second between a chip and all its neighbours (cloud.google.com/tpu/docs/system-architecture)."""


@dataclass(frozen=True, kw_only=True)
class Named:
    """A step worth keeping."""

    topology: str
    shape: str
    weights: Weights
    kv: PageNumbers

    @property
    def chip(self) -> str:
        """Its generation."""
        return self.topology.partition(":")[0]

    @property
    def chips(self) -> int:
        """Of the topology."""
        return math.prod(map(int, self.topology.partition(":")[2].split("x")))

    def plain(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "topology": self.topology, "chip": self.chip, "shape": self.shape, "weights": self.weights, "kv": self.kv,
            "chips": self.chips,
        }  # fmt: skip


SETTINGS = {
    "v6e-8b-int8": Named(topology="v6e:1x1", shape="8b", weights="int8", kv="bfloat16"),
    "v6e-8b-int8-kv8": Named(topology="v6e:1x1", shape="8b", weights="int8", kv="int8"),
    "v5p4-70b-bf16": Named(topology="v5p:2x2x1", shape="70b", weights="bfloat16", kv="bfloat16"),
    "v5p4-70b-int8": Named(topology="v5p:2x2x1", shape="70b", weights="int8", kv="bfloat16"),
    "v5p4-70b-int8-kv8": Named(topology="v5p:2x2x1", shape="70b", weights="int8", kv="int8"),
}


def config_of(shape: str) -> TransformerConfig:
    """A model of this shape."""
    return llama(vocab_size=VOCABULARY, tie_embeddings=False, dtype="bfloat16", **SHAPES[shape])


def setting_of(name: str, rows: int) -> Setting:
    """What is compiled."""
    named = SETTINGS[name]
    setting = Setting(
        config=config_of(named.shape), topology=named.topology, rows=rows, weights=named.weights, kv=named.kv
    )
    return replace(setting, pages=max(rows * setting.width, pool_pages(named)))


def pool_pages(named: Named) -> int:
    """Pages with which a layer's keys are twice what a chip's VMEM holds, as a server's are that fill its memory: XLA
    moves smaller ones there and back in each step."""
    shape = SHAPES[named.shape]
    size = shape["width"] // shape["heads"]
    page = shape["kv_heads"] // named.chips * PAGE * size * (2 if named.kv == "bfloat16" else 1)
    return POOL_BYTES // page


def kept() -> dict[str, dict[str, Any]]:
    """What was recorded, by name."""
    return json.loads(FILE.read_text(encoding="utf-8")) if FILE.exists() else {}


def seconds(chip: str, step: dict[str, Any]) -> float:
    """A step's roofline: bytes or products, the longer, and what travels between the chips."""
    peaks = CHIPS[chip]
    return (
        max(step["moved"] / peaks.bytes_a_second, step["flops"] / peaks.flops_a_second)
        + step["sent"] / LINKS[chip]
    )


def cost_of(record: dict[str, Any], *, of_bandwidth: float, of_products: float) -> Cost:
    """What plans cost, by the kept steps: what moves is so much a step, so much a token of the step, and the cache.

    Of the first two, those of the fewest and the most rows; of one step alone all is the step's. On all chips together,
    whose rates are added up.
    """
    few, many = record["steps"][0], record["steps"][-1]
    peaks, chips = CHIPS[record["chip"]], record["chips"]

    def of_all(step: dict[str, Any]) -> int:
        return chips * (step["moved"] - step["cache"])

    between = max(many["rows"] - few["rows"], 1)
    a_token = (of_all(many) - of_all(few)) / between
    sent = (many["sent"] - few["sent"]) / between
    counted = account_of(config_of(record["shape"]), 1)
    return Cost(
        weight_bytes=of_all(few) - few["rows"] * a_token,
        kv_bytes_a_token=chips * few["cache"] / few["rows"] / (few["length"] + 1),
        flops_a_token=2 * counted.matrix_parameters,
        attention_flops_a_pair=sum(
            repeats * block.attention.flops_per_key() for repeats, block in layers(config_of(record["shape"]))
        ),
        bytes_a_second=peaks.bytes_a_second * chips * of_bandwidth,
        flops_a_second=peaks.flops_a_second * chips * of_products,
        step_s=max(few["sent"] - few["rows"] * sent, 0.0) / LINKS[record["chip"]],
        bytes_a_token=a_token,
        seconds_a_token=sent / LINKS[record["chip"]],
    )
