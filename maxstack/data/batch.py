"""What a training step reads."""

from typing import Any, NamedTuple


class Batch(NamedTuple):
    """Packed rows, all `[b, t]`: numpy from the loader, jax arrays (or their specs) inside a step."""

    tokens: Any
    """int32 token ids; 0 where the row is padding."""
    labels: Any
    """int32, the next token of the same document, also past the end of the row; 0 where `weights` is 0."""
    segment_ids: Any
    """int32, 1, 2, … for the documents of a row in order; 0 where the row is padding."""
    positions: Any
    """int32, counted from 0 at the start of each segment of a row."""
    weights: Any
    """float32, 1 where the label counts towards the loss, 0 elsewhere."""
