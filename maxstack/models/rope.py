"""Rotary position embedding and its length scalings. Angles stay float32: bfloat16 rounds position 257 to 256."""

import dataclasses
import math
from typing import Literal, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from maxstack.config import UserError


class RopeTable(NamedTuple):
    """Cosine and sine [b, t, rotated / 2] in float32."""

    cos: Float[Array, "b t half"]
    sin: Float[Array, "b t half"]


# The tables that a model's layers share, by rotary config and head size.
RopeTables = dict[tuple["RopeConfig", int], RopeTable]


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeConfig:
    """Rotary embedding (Su et al. 2021, arXiv:2104.09864), halves layout: pairs are (i, i + rotated / 2)."""

    theta: float = 10_000.0
    """Base of the wavelengths (dimensionless)."""
    fraction: float = 1.0
    """Share of each head that is rotated, from its start (0 to 1)."""
    scaling: Literal["none", "linear", "dynamic", "yarn", "llama3", "longrope"] = "none"
    """How positions beyond the original context are handled; dynamic grows theta with each document's length, longrope
    has other frequencies for documents longer than the original context."""
    factor: float = 1.0
    """How many times longer the context is than the original (ratio)."""
    original_length: int = 8192
    """Context the model was first trained on (tokens)."""
    low_frequency_factor: float = 1.0
    """llama3: wavelengths above original_length / this are scaled in full (ratio)."""
    high_frequency_factor: float = 4.0
    """llama3: wavelengths below original_length / this are left alone (ratio)."""
    beta_fast: float = 32.0
    """yarn: rotations within the original context above which a frequency is left alone."""
    beta_slow: float = 1.0
    """yarn: rotations within the original context below which a frequency is scaled in full."""
    truncate: bool = True
    """yarn: the ramp from scaled to kept begins and ends at whole dimensions (GPT-OSS: at fractions of them)."""
    attention_factor: float | None = None
    """yarn, longrope: multiplies cosine and sine; None is what their papers give for the factor."""
    short_factors: tuple[float, ...] = ()
    """longrope: what each wavelength is multiplied by, in documents of up to original_length tokens (ratios)."""
    long_factors: tuple[float, ...] = ()
    """longrope: the same in longer documents (ratios)."""

    def __post_init__(self):
        if not 0.0 < self.fraction <= 1.0:
            raise UserError(f"rope.fraction is {self.fraction}: it must be in (0, 1]")
        if self.theta <= 1.0:
            raise UserError(f"rope.theta is {self.theta}: it must be above 1")
        if self.factor < 1.0:
            raise UserError(f"rope.factor is {self.factor}: it must be at least 1")
        if self.original_length < 1:
            raise UserError(f"rope.original_length is {self.original_length} tokens: it must be at least 1")
        if self.scaling == "longrope" and self.original_length < 2:
            raise UserError("rope.original_length is 1 token: longrope needs at least 2")
        for name, low, high in (
            ("low_frequency_factor", self.low_frequency_factor, self.high_frequency_factor),
            ("beta_slow", self.beta_slow, self.beta_fast),
        ):
            if not 0.0 < low < high:
                raise UserError(
                    f"rope.{name} is {low}: it must be above 0 and below its fast counterpart, {high}"
                )

    def rotated(self, head_size: int) -> int:
        """How many of a head's dimensions are rotated. Raises UserError when that is no whole number of pairs."""
        size = int(head_size * self.fraction)
        least = 4 if self.scaling == "dynamic" else 2  # dynamic scaling divides by size - 2
        if self.scaling == "longrope" and {len(self.short_factors), len(self.long_factors)} != {size // 2}:
            raise UserError(
                f"rope rotates {size // 2} pairs of dimensions, but has {len(self.short_factors)} short and "
                f"{len(self.long_factors)} long factors: one for each pair is needed"
            )
        if size % 2 or size < least:
            raise UserError(
                f"rope rotates {size} of {head_size} dimensions: that must be an even number from {least} on; "
                "change the head's size or rope.fraction"
            )
        return size

    def table(
        self, positions_bt: Int[Array, "b t"], head_size: int, lengths_bt: Int[Array, "b #t"] | None = None
    ) -> RopeTable:
        """Cosine and sine at each position. `lengths_bt` is the length of each token's document (tokens), which
        dynamic and longrope scaling go by; by default a row is one document that ends at its largest position."""
        size = self.rotated(head_size)
        if self.scaling in BY_LENGTH:
            lengths = document_lengths(positions_bt, None) if lengths_bt is None else lengths_bt
            frequencies = BY_LENGTH[self.scaling](self, size, lengths.astype(jnp.float32))
        else:
            frequencies = jnp.asarray(SCALINGS[self.scaling](self, size), jnp.float32)
        angles = positions_bt[..., None].astype(jnp.float32) * frequencies
        gain = self.gain()
        return RopeTable(jnp.cos(angles) * gain, jnp.sin(angles) * gain)

    def gain(self) -> float:
        """Factor on cosine and sine (YaRN: arXiv:2309.00071, section 3.4; LongRoPE: what Phi-3's code does)."""
        if self.scaling not in ("yarn", "longrope"):
            return 1.0
        if self.attention_factor is not None:
            return self.attention_factor
        if self.scaling == "yarn":
            return 0.1 * math.log(self.factor) + 1.0
        return math.sqrt(1.0 + math.log(self.factor) / math.log(self.original_length))


def plain_frequencies(config: RopeConfig, size: int) -> np.ndarray:
    """theta^(-2i / size), float64."""
    return config.theta ** -(np.arange(0, size, 2, dtype=np.float64) / size)


def linear_frequencies(config: RopeConfig, size: int) -> np.ndarray:
    """Positions divided by the factor (Chen et al. 2023, arXiv:2306.15595)."""
    return plain_frequencies(config, size) / config.factor


def llama3_frequencies(config: RopeConfig, size: int) -> np.ndarray:
    """Long wavelengths divided by the factor, short ones kept, a ramp between (Llama 3.1's reference code)."""
    frequencies = plain_frequencies(config, size)
    rotations = config.original_length * frequencies / (2 * math.pi)
    low, high = config.low_frequency_factor, config.high_frequency_factor
    keep = np.clip((rotations - low) / (high - low), 0.0, 1.0)
    return frequencies * (keep + (1.0 - keep) / config.factor)


def yarn_frequencies(config: RopeConfig, size: int) -> np.ndarray:
    """Interpolation for slow dimensions, none for fast ones, a ramp over dimensions (arXiv:2309.00071, section 3.2)."""

    def dimension(rotations: float) -> float:
        wavelength = config.original_length / (rotations * 2 * math.pi)
        return size * math.log(wavelength) / (2 * math.log(config.theta))

    low, high = dimension(config.beta_fast), dimension(config.beta_slow)
    if config.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, size - 1)
    ramp = np.clip((np.arange(size // 2) - low) / max(high - low, 1e-3), 0.0, 1.0)
    frequencies = plain_frequencies(config, size)
    return frequencies / config.factor * ramp + frequencies * (1.0 - ramp)


def dynamic_frequencies(
    config: RopeConfig, size: int, lengths_bt: Float[Array, "b t"]
) -> Float[Array, "b t half"]:  # fmt: skip
    """Base grown with the document's length once it passes the original context (dynamic NTK, as InternLM2 uses it).

    In cached decoding a key keeps the base of the length at which it was written, as in InternLM2's code: past the
    original context the logits are those of that procedure, not of one forward pass over the whole document.
    """
    longer = jnp.maximum(lengths_bt, config.original_length) / config.original_length
    base = config.theta * (config.factor * longer - (config.factor - 1.0)) ** (size / (size - 2))
    return base[..., None] ** -(jnp.arange(0, size, 2, dtype=jnp.float32) / size)


def longrope_frequencies(
    config: RopeConfig, size: int, lengths_bt: Float[Array, "b t"]
) -> Float[Array, "b t half"]:  # fmt: skip
    """One set of factors for short documents, another for long ones (LongRoPE, arXiv:2402.13753, as Phi-3 uses it).

    As with dynamic scaling, a cached key keeps the frequencies of the length at which it was written.
    """
    plain = plain_frequencies(config, size)
    short, long = (
        jnp.asarray(plain / np.asarray(f), jnp.float32) for f in (config.short_factors, config.long_factors)
    )
    return jnp.where(lengths_bt[..., None] > config.original_length, long, short)


def document_lengths(
    positions_bt: Int[Array, "b t"], segment_ids_bt: Int[Array, "b t"] | None
) -> Int[Array, "b #t"]:  # fmt: skip
    """Tokens of the document that each token is in: its largest position, and one. Without segments, of the row."""
    if segment_ids_bt is None:
        return jnp.max(positions_bt, axis=1, keepdims=True) + 1
    same = segment_ids_bt[:, :, None] == segment_ids_bt[:, None, :]
    return jnp.max(jnp.where(same, positions_bt[:, None, :], 0), axis=-1) + 1


SCALINGS = {
    "none": plain_frequencies,
    "linear": linear_frequencies,
    "llama3": llama3_frequencies,
    "yarn": yarn_frequencies,
}
BY_LENGTH = {"dynamic": dynamic_frequencies, "longrope": longrope_frequencies}


def rotate(x_btnh: Float[Array, "b t n h"], table: RopeTable) -> Float[Array, "b t n h"]:
    """Rotate the first dimensions of each head by the table's angles; computed in float32, returned in x's type."""
    half = table.cos.shape[-1]
    cos, sin = table.cos[:, :, None, :], table.sin[:, :, None, :]
    x = x_btnh[..., : 2 * half].astype(jnp.float32)
    first, second = x[..., :half], x[..., half:]
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], -1).astype(
        x_btnh.dtype
    )
    return turned if 2 * half == x_btnh.shape[-1] else jnp.concatenate([turned, x_btnh[..., 2 * half :]], -1)
