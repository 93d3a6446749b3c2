"""A row of the table of families: what its config.json says, and where its weights lie."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

from maxstack.config import UserError
from maxstack.models.block import BlockConfig
from maxstack.models.families.keys import Keys
from maxstack.models.families.weights import Entry, Table, entries
from maxstack.models.rope import RopeConfig
from maxstack.models.transformer import StackConfig, TransformerConfig

MOST_BEYOND = 16
"""How many layers behind the last a file may hold, where a family knows of such."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """One kind of model folder. Adding a family is adding a row, a test case and its golden files."""

    name: str
    """How people call it."""
    model_types: tuple[str, ...]
    """`model_type` of config.json, the first being the one that is written."""
    architecture: str
    """The class name written into config.json for transformers."""
    config: Callable[[Keys], TransformerConfig]
    """What config.json says, as our config. Reads every key that it understands; the others are refused."""
    keys: Callable[[TransformerConfig], dict[str, Any]]
    """The inverse: config.json's keys for a config that this family can express (any other may give anything)."""
    table: Callable[[TransformerConfig], Table]
    """Leaf to tensor of the file."""
    absent: tuple[str, ...] = ()
    """Leaves of a layer that no tensor holds: they keep their initial value, which must not matter."""
    harmless: frozenset[str] = frozenset()
    """Keys of config.json that change nothing here, beside those of keys.HARMLESS."""
    spellings: tuple[tuple[str, str], ...] = ()
    """Patterns of names that tensors have in some files, and what the table calls them (as of re.sub)."""
    unused: tuple[str, ...] = ()
    """Patterns (regular expressions) of tensors in the file that are not needed, such as stored rotary frequencies."""
    beyond: tuple[str, ...] = ()
    """The same for layers behind the last, such as those that predict further tokens; {layer} is their number."""

    def read(self, keys: Keys) -> TransformerConfig:
        """Our config. Raises UserError for a missing key, a value that is not supported, an unknown key."""
        config = self.config(keys)
        if unknown := keys.unread(self.harmless):
            raise UserError(
                f"{keys.where}: unknown {', '.join(f'{name}={shown(keys, name)}' for name in unknown)} for a "
                f"{self.name} model. A key that is not understood might change the model, so it is not "
                "ignored; if it does not matter, remove it from config.json"
            )
        return config

    def entries(self, config: TransformerConfig) -> list[Entry]:
        """Where every weight lies in the file."""
        return entries(config, self.table(config), self.absent)

    def not_needed(self, config: TransformerConfig) -> list[str]:
        """Patterns of tensors that may lie in the file of such a model and are not read."""
        further = "|".join(str(config.depth + i) for i in range(MOST_BEYOND))
        return [*self.unused, *(pattern.replace("{layer}", f"({further})") for pattern in self.beyond)]

    def expresses(self, config: TransformerConfig) -> bool:
        """Whether this family's config.json can say this config: writing and reading it gives it back."""
        try:
            again = self.read(Keys(self.keys(config), self.name))
        except (UserError, AttributeError, KeyError, TypeError, ValueError):
            return False
        # What the model computes is compared, not how it is run or trained.
        return untrained(again) == dataclasses.replace(
            untrained(config), remat=again.remat, dtype=again.dtype
        )


def untrained(config: TransformerConfig) -> TransformerConfig:
    """The config with those fields of its parts that only training looks at at their usual values."""

    def part(config: Any) -> Any:
        usual = {field.name: field.default for field in dataclasses.fields(config)}
        return dataclasses.replace(
            config, **{name: usual[name] for name in getattr(config, "training_only", ())}
        )

    def block(config: BlockConfig) -> BlockConfig:
        return dataclasses.replace(config, feed_forward=part(config.feed_forward))

    stacks = tuple(
        dataclasses.replace(stack, pattern=tuple(block(one) for one in stack.pattern))
        for stack in config.stacks
    )
    return dataclasses.replace(config, stacks=stacks)


def shown(keys: Keys, path: str) -> str:
    """The value of a key, shortened for a message."""
    value: Any = keys.values
    for name in path.split("."):
        value = value.get(name) if isinstance(value, dict) else None
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


# What most families share.


def rope_keys(keys: Keys) -> Keys:
    """The rotary settings: `rope_parameters`, or the older `rope_scaling` with `rope_theta` beside it."""
    if "rope_parameters" in keys:
        keys.skip("rope_scaling", "rope_theta")
        return keys.nested("rope_parameters")
    return keys.nested("rope_scaling")


def read_rope(
    keys: Keys, *, theta: float = 10_000.0, fraction: float = 1.0, original: int | None = None
) -> RopeConfig:
    """RopeConfig of a config.json whose layers all rotate alike, in either spelling.

    `original` is the length before scaling (tokens) where the family keeps it outside of the rotary settings.
    """
    inner = rope_keys(keys)
    outer_theta = float(keys.number("rope_theta", theta))
    longest = keys.whole("max_position_embeddings", 2048)
    return rope_from(inner, theta=outer_theta, longest=longest, fraction=fraction, original=original)


def rope_from(
    inner: Keys, *, theta: float, longest: int, fraction: float = 1.0, original: int | None = None
) -> RopeConfig:
    """RopeConfig of one mapping of rotary settings. `longest` is max_position_embeddings (tokens)."""
    kind = inner.get("rope_type", None) or inner.get("type", "default")
    inner.skip("type", "rope_type", "original_max_position_embeddings")
    base: dict[str, Any] = {"theta": float(inner.number("rope_theta", theta)), "fraction": fraction}
    fraction_inside = inner.number("partial_rotary_factor", None)
    if fraction_inside is not None:
        base["fraction"] = float(fraction_inside)
    original = original or inner.whole("original_max_position_embeddings", longest)
    if kind in ("default", "none"):
        inner.skip("factor")
        return RopeConfig(**base)
    if kind in ("longrope", "su"):
        gain = inner.number("attention_factor", None)
        return RopeConfig(
            **base, scaling="longrope", original_length=original,
            factor=float(inner.number("factor", max(longest / original, 1.0))),
            attention_factor=None if gain is None else float(gain),
            short_factors=inner.numbers("short_factor"), long_factors=inner.numbers("long_factor"),
        )  # fmt: skip
    factor = float(inner.number("factor"))
    if kind == "linear":
        return RopeConfig(**base, scaling="linear", factor=factor)
    if kind == "dynamic":
        return RopeConfig(**base, scaling="dynamic", factor=factor, original_length=longest)
    if kind == "llama3":
        return RopeConfig(
            **base, scaling="llama3", factor=factor, original_length=original,
            low_frequency_factor=float(inner.number("low_freq_factor")),
            high_frequency_factor=float(inner.number("high_freq_factor")),
        )  # fmt: skip
    if kind == "yarn":
        return RopeConfig(
            **base, scaling="yarn", factor=factor, original_length=original,
            beta_fast=float(inner.number("beta_fast", 32)), beta_slow=float(inner.number("beta_slow", 1)),
            attention_factor=yarn_gain(inner, factor), truncate=inner.flag("truncate", True),
        )  # fmt: skip
    raise UserError(
        f"{inner.where}: {inner.path}rope_type is {kind!r}: supported are default, linear, dynamic, llama3, "
        "yarn and longrope"
    )


def yarn_gain(inner: Keys, factor: float) -> float | None:
    """YaRN's factor on cosine and sine; DeepSeek's `mscale` keys say it as a ratio of two logarithms."""

    def logarithmic(scale: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0

    given = inner.number("attention_factor", None)
    mscale, all_dims = inner.number("mscale", None), inner.number("mscale_all_dim", None)
    if given is not None:
        return float(given)
    if mscale and all_dims:
        return logarithmic(mscale) / logarithmic(all_dims)
    return None


def rope_settings(rope: RopeConfig) -> dict[str, Any]:
    """`rope_theta` and `rope_scaling` of a rotary config: the inverse of read_rope (without its fraction)."""
    keys: dict[str, Any] = {"rope_theta": rope.theta}
    if rope.scaling == "none":
        return keys
    scaling: dict[str, Any] = {"rope_type": rope.scaling, "factor": rope.factor}
    if rope.scaling in ("llama3", "yarn", "longrope"):
        scaling["original_max_position_embeddings"] = rope.original_length
    if rope.scaling == "llama3":
        scaling |= {
            "low_freq_factor": rope.low_frequency_factor,
            "high_freq_factor": rope.high_frequency_factor,
        }
    if rope.scaling == "yarn":
        scaling |= {"beta_fast": rope.beta_fast, "beta_slow": rope.beta_slow}
    if not rope.truncate:
        scaling["truncate"] = False
    if rope.scaling == "longrope":
        scaling |= {"short_factor": list(rope.short_factors), "long_factor": list(rope.long_factors)}
    if rope.scaling in ("yarn", "longrope") and rope.attention_factor is not None:
        scaling["attention_factor"] = rope.attention_factor
    return keys | {"rope_scaling": scaling}


def first_blocks(config: TransformerConfig) -> Sequence[Any]:
    """The layers' configs, first to last."""
    return [block for stack in config.stacks for _ in range(stack.repeats) for block in stack.pattern]


def stacks_of(blocks: Sequence[BlockConfig]) -> tuple[StackConfig, ...]:
    """The layers' configs, first to last, as stacks: each time the pattern that covers most layers by repeating."""
    stacks: list[StackConfig] = []
    start = 0
    while start < len(blocks):
        left = len(blocks) - start
        size, repeats = max(
            ((size, repeats_of(blocks[start:], size)) for size in range(1, left // 2 + 1)),
            key=lambda found: found[0] * found[1] if found[1] > 1 else 1,
            default=(1, 1),
        )
        if repeats == 1:
            size = 1
        stacks.append(StackConfig(pattern=tuple(blocks[start : start + size]), repeats=repeats))
        start += size * repeats
    return tuple(stacks)


def repeats_of(blocks: Sequence[BlockConfig], size: int) -> int:
    """How often the first `size` layers follow each other from the start."""
    repeats = 1
    while blocks[repeats * size : (repeats + 1) * size] == blocks[:size]:
        repeats += 1
    return repeats
