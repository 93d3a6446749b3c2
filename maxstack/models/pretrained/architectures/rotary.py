"""Rotary settings of a GGUF file, both ways: keys, and tensors with a factor for each frequency."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from maxstack.config import UserError
from maxstack.models.families.keys import Keys
from maxstack.models.pretrained.architectures.architecture import Facts
from maxstack.models.rope import RopeConfig, llama3_frequencies, plain_frequencies

FACTORS, LONG, SHORT = "rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"
TENSORS = (FACTORS, LONG, SHORT)
USUAL_SCALINGS = ("none", "linear", "yarn")


def plain(value: Any) -> Any:
    """A value of the metadata; a float is kept in float32, and its shortest decimal is what was meant."""
    return float(str(np.float32(value))) if isinstance(value, float | np.floating) else value


def near(value: float, other: float) -> bool:
    """Whether two numbers are the same but for the rounding to float32."""
    return math.isclose(value, other, rel_tol=3e-7)


def read_scaling(keys: Keys, *allowed: str) -> dict[str, Any]:
    """`rope_theta` and `rope_scaling`. `allowed` are the scalings that the architecture knows (USUAL_SCALINGS)."""
    found: dict[str, Any] = {"rope_theta": keys.number("rope.freq_base", 10_000.0)}
    factor = keys.number("rope.scaling.factor", None)
    original = keys.whole("rope.scaling.original_context_length", None)
    allowed = allowed or USUAL_SCALINGS
    # A factor without a type is linear.
    usual = "linear" if factor not in (None, 0.0, 1.0) and "linear" in allowed else "none"
    kind = keys.expect("rope.scaling.type", usual, *allowed)
    if kind == "none":
        return found
    found["rope_scaling"] = {"rope_type": kind, "factor": factor or 1.0}
    if kind == "yarn":
        # llama.cpp's own, which it does not read from the file in these architectures.
        for name, value in (("beta_fast", 32.0), ("beta_slow", 1.0), ("ext_factor", 1.0)):
            keys.expect(f"rope.scaling.yarn_{name}", value)
        if original:
            found["rope_scaling"]["original_max_position_embeddings"] = original
    return found


def scaling_keys(keys: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of read_scaling."""
    found: dict[str, Any] = {"rope.freq_base": float(keys.get("rope_theta", 10_000.0))}
    scaling = keys.get("rope_scaling") or {}
    kind = scaling.get("rope_type", scaling.get("type"))
    if kind in ("linear", "yarn"):
        found |= {"rope.scaling.type": kind, "rope.scaling.factor": float(scaling["factor"])}
    if kind == "yarn":
        found["rope.scaling.original_context_length"] = scaling["original_max_position_embeddings"]
    return found


def with_llama3(found: dict[str, Any], facts: Facts, where: str) -> dict[str, Any]:
    """With the scaling whose result llama.cpp keeps as one factor for each frequency. UserError for another one."""
    factors = facts.factors.get(FACTORS)
    if factors is None:
        return found
    factor = round(float(factors.max()), 3)
    rope = RopeConfig(theta=found["rope_theta"], scaling="llama3", factor=factor)
    if not np.allclose(factors, llama3_factors(rope, 2 * factors.size), rtol=1e-4):
        raise UserError(f"{where}: its rotary factors ({FACTORS}) are not those of Llama 3.1 to 3.3")
    scaling = {
        "rope_type": "llama3", "factor": factor, "low_freq_factor": rope.low_frequency_factor,
        "high_freq_factor": rope.high_frequency_factor, "original_max_position_embeddings": rope.original_length,
    }  # fmt: skip
    return found | {"rope_scaling": scaling}


def llama3_factors(rope: RopeConfig, size: int) -> np.ndarray:
    """By what each frequency of a head of `size` is divided."""
    return (plain_frequencies(rope, size) / llama3_frequencies(rope, size)).astype(np.float32)


def read_longrope(keys: Keys, facts: Facts, longest: int) -> dict[str, Any]:
    """LongRoPE's settings, of which the factors are tensors. `longest` is the context's length (tokens)."""
    found: dict[str, Any] = {"rope_theta": keys.number("rope.freq_base", 10_000.0)}
    original = keys.whole("rope.scaling.original_context_length", longest)
    if LONG not in facts.factors or SHORT not in facts.factors:
        keys.expect("rope.scaling.type", "none")
        return found
    keys.expect("rope.scaling.type", "longrope")
    short, long = ([plain(x) for x in facts.factors[name]] for name in (SHORT, LONG))
    scaling = {
        "rope_type": "longrope", "short_factor": short, "long_factor": long,
        "original_max_position_embeddings": original,
    }  # fmt: skip
    gain = float(keys.number("rope.scaling.attn_factor", 1.0))
    usual = RopeConfig(
        scaling="longrope", factor=max(longest / original, 1.0), original_length=original
    ).gain()
    return found | {
        "original_max_position_embeddings": original,
        "rope_scaling": scaling if near(gain, usual) else scaling | {"attention_factor": gain},
    }


def longrope_keys(keys: Mapping[str, Any], rope: RopeConfig) -> dict[str, Any]:
    """The inverse of read_longrope, but for the tensors."""
    found: dict[str, Any] = {
        "rope.freq_base": float(keys["rope_theta"]),
        "rope.scaling.original_context_length": keys["original_max_position_embeddings"],
    }
    if rope.scaling == "longrope":
        found |= {"rope.scaling.type": "longrope", "rope.scaling.attn_factor": rope.gain()}
    return found


def factor_tensors(rope: RopeConfig | None, head_size: int) -> dict[str, np.ndarray]:
    """The tensors that hold a scaling's factors, by name; none for most scalings."""
    if rope is None:
        return {}
    if rope.scaling == "llama3":
        return {FACTORS: llama3_factors(rope, rope.rotated(head_size))}
    if rope.scaling == "longrope":
        return {
            SHORT: np.asarray(rope.short_factors, np.float32),
            LONG: np.asarray(rope.long_factors, np.float32),
        }
    return {}
