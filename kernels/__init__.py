"""Kernels: plain functions of arrays. They import jax and numpy only.

Each folder holds one operation: `__init__` (the function that is called, and the static choice of a backend),
`reference` (the obvious form, float32 inside) and one file a backend. Letters of shapes: `b` batch, `t` query
position or token, `s` key position, `n` query heads, `k` kv heads, `g` query heads of one kv head, `h` head size,
`d` model, `f` feed-forward, `e` experts, `v` vocabulary.
"""


class Unsupported(NotImplementedError):
    """A backend cannot serve this call; the message says which backend, what it cannot do and what can."""
