"""Grouped products as XLA compiles them: on the CPU in blocks of rows (`blocked`), elsewhere by XLA's ragged dot.

The platform is the one that is compiled for, not the one at hand: a program compiled ahead for a TPU on a machine
without one gets the TPU's form.
"""

from functools import partial

import jax
from jaxtyping import Array, Float, Int

from maxstack.kernels.grouped_matmul import blocked, ragged
from maxstack.kernels.quantized_matmul.weight import QuantizedWeight


def rows(
    x_td: Float[Array, "t d"], w: Array | QuantizedWeight, group_sizes_e: Int[Array, "e"], transposed: bool = False
) -> Float[Array, "t f"]:  # fmt: skip
    """Each row times the matrix of its group, summed in float32 or wider, in the dtype of the rows.

    `transposed` is the other way around: a matrix is [f, d], or [d, f] of quantized weights, which are [f, d] else.
    """
    forms = {"cpu": blocked.rows, "default": ragged.rows}
    forms = {platform: partial(form, transposed=transposed) for platform, form in forms.items()}
    return jax.lax.platform_dependent(x_td, w, group_sizes_e, **forms)


def matrices(
    x_td: Float[Array, "t d"], dy_tf: Float[Array, "t f"], group_sizes_e: Int[Array, "e"]
) -> Float[Array, "e d f"]:
    """xᵀ·dy over the rows of each group, summed in float32 or wider; 0 for a group without rows."""
    forms = {"cpu": blocked.matrices, "default": ragged.matrices}
    return jax.lax.platform_dependent(x_td, dy_tf, group_sizes_e, **forms)
