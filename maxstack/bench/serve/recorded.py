"""Decode steps that were compiled for chips, kept with the package: `--simulate NAME` predicts from them.

benchmarks/aot_decode.py writes steps.json. No chip was there: the times made of it are those of a roofline.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from maxstack.bench.serve.absent_chip import NumberOfPages, Setting, Weights
from maxstack.models import llama
from maxstack.models.transformer import TransformerConfig
from maxstack.serve.cost import CHIPS

FILE = Path(__file__).with_name("steps.json")
SHAPES: dict[str, dict[str, Any]] = {
    "8b": {"width": 4096, "depth": 32, "heads": 32, "kv_heads": 8, "feed_forward": 14_336},
    "70b": {"width": 8192, "depth": 80, "heads": 64, "kv_heads": 8, "feed_forward": 28_672},
}
"""Llama 3's (arXiv:2407.21783, table 3)."""
VOCABULARY = 128_256
LINKS = {"v5e": 200e9, "v5p": 600e9, "v6e": 448e9, "v7x": 1200e9}
"""Bytes a second between a chip and all its neighbours (cloud.google.com/tpu/docs/system-architecture)."""


@dataclass(frozen=True, kw_only=True)
class Named:
    """A step worth keeping."""

    topology: str
    shape: str
    weights: Weights
    kv: NumberOfPages

    @property
    def chip(self) -> str:
        """Its generation."""
        return self.topology.partition(":")[0]

    def plain(self) -> dict[str, str]:
        """For JSON."""
        return {
            "topology": self.topology, "chip": self.chip, "shape": self.shape, "weights": self.weights, "kv": self.kv,
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
    return Setting(
        config=config_of(named.shape), topology=named.topology, rows=rows, weights=named.weights, kv=named.kv
    )


def kept() -> dict[str, dict[str, Any]]:
    """What was recorded, by name."""
    return json.loads(FILE.read_text(encoding="utf-8")) if FILE.exists() else {}


def seconds(chip: str, step: dict[str, Any]) -> float:
    """A step's roofline: bytes or products, the longer, and what travels between the chips."""
    peaks = CHIPS[chip]
    return max(step["moved"] / peaks.bytes_a_second, step["flops"] / peaks.flops_a_second) + step["sent"] / LINKS[chip]
