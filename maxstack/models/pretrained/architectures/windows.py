"""Which layers see a window and which see everything, as llama.cpp says it, both ways."""

from collections.abc import Sequence
from typing import Any

from maxstack.config import UserError
from maxstack.models.families.keys import Keys

FULL, SLIDING = "full_attention", "sliding_attention"
PATTERN = "attention.sliding_window_pattern"


def usual(layers: int, period: int) -> list[str]:
    """Every `period`-th layer sees everything; with 0 none does."""
    return [SLIDING if not period or layer % period < period - 1 else FULL for layer in range(layers)]


def read_layer_types(keys: Keys, period: int) -> list[str]:
    """Each layer's kind: a list of which have a window, or the period, by default `period`."""
    layers, given = keys.whole("block_count"), keys.get(PATTERN, None)
    if isinstance(given, list):
        if len(given) != layers or any(one not in (0, 1) for one in given):
            raise UserError(
                f"{keys.where}: {keys.path}{PATTERN} is {given!r}: {layers} of true or false are needed"
            )
        return [SLIDING if one else FULL for one in given]
    return usual(layers, keys.whole(PATTERN, period, least=0))


def layer_type_keys(kinds: Sequence[str], period: int) -> dict[str, Any]:
    """The inverse of read_layer_types; what is usual is left out, since older versions of llama.cpp know no other."""
    if list(kinds) == usual(len(kinds), period):
        return {}
    return {PATTERN: [kind == SLIDING for kind in kinds]}
