"""Which layers see a window and which see everything, as config.json's `layer_types` or older keys say it."""

from collections.abc import Sequence
from typing import Any

from maxstack.config import UserError
from maxstack.models.families.keys import Keys

FULL, SLIDING = "full_attention", "sliding_attention"


def read_windows(keys: Keys, usual: Sequence[bool] | None = None) -> list[int | None]:
    """The window of each layer (tokens), None where it sees everything.

    A window counts only with `use_sliding_window`, for the layers that `layer_types` names; without that, for those of
    which `usual` says so, or from `max_window_layers` on.
    """
    first, layers = keys.whole("max_window_layers", 28, least=0), keys.whole("num_hidden_layers")
    usual = [i >= first for i in range(layers)] if usual is None else usual
    keys.skip("sliding_window")  # when it is switched off
    window = keys.whole("sliding_window", None) if keys.flag("use_sliding_window", False) else None
    kinds = keys.choices("layer_types", [SLIDING if window and has else FULL for has in usual], FULL, SLIDING)
    if window is None and SLIDING in kinds:
        raise UserError(
            f"{keys.where}: {keys.path}layer_types has {SLIDING}, but there is no sliding_window in use"
        )
    return [window if kind == SLIDING else None for kind in kinds]


def window_keys(windows: Sequence[int | None]) -> dict[str, Any]:
    """The inverse of read_windows."""
    with_window = [i for i, window in enumerate(windows) if window]
    return {
        "use_sliding_window": bool(with_window), "sliding_window": next(filter(None, windows), None),
        "layer_types": [SLIDING if window else FULL for window in windows],
        # What versions of transformers go by that do not know layer_types.
        "max_window_layers": with_window[0] if with_window else len(windows),
    }  # fmt: skip
