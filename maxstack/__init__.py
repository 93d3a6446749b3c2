"""maxstack: a language model's whole life in one JAX codebase.

    model, tokenizer = maxstack.load("runs/demo")
    logits_btv = model(tokens_bt)

Letters of shapes and einsum suffixes, the same everywhere (`q_btnh` is `[batch, position, heads, head size]`):

    b batch            t query position    s key position    d model width
    n query heads      k key/value heads   h head size       f feed-forward width
    e experts          v vocabulary        l layers          p cache page         g group
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from maxstack.models.load import load as load
    from maxstack.models.save import save as save

__version__ = "0.1.0"


def __getattr__(name: str):
    # jax is imported by the first use of maxstack.load or maxstack.save, not by `import maxstack`.
    if name == "load":
        from maxstack.models.load import load

        return load
    if name == "save":
        from maxstack.models.save import save

        return save
    raise AttributeError(f"module 'maxstack' has no attribute {name!r}")
