"""Grouped products as XLA compiles them: on the CPU in blocks of rows (`blocked`), elsewhere by XLA's ragged dot.

The platform is the one that is compiled for, not the one at hand: a program compiled ahead for a TPU on a machine
without one gets the TPU's form. The custom derivative stands outside of the choice, so that either form keeps the
same three arrays for the backward pass and a gradient nobody reads is not computed.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from maxstack.kernels.grouped_matmul import blocked, ragged


def grouped_matmul(
    x_td: Float[Array, "t d"], w_edf: Float[Array, "e d f"], group_sizes_e: Int[Array, "e"]
) -> Float[Array, "t f"]:
    """Each row times its group's matrix, summed in float32 or wider, in the dtype of the rows."""
    if x_td.shape[0] == 0:
        return jnp.zeros((0, w_edf.shape[2]), x_td.dtype)
    return _product(*_equally_varying(x_td, w_edf, group_sizes_e))


@jax.custom_vjp
def _product(x_td, w_edf, group_sizes_e):
    return _rows(x_td, w_edf, group_sizes_e, transposed=False)


def _product_fwd(x_td, w_edf, group_sizes_e):
    return _product(x_td, w_edf, group_sizes_e), (x_td, w_edf, group_sizes_e)


def _product_bwd(kept, dy_tf):
    x_td, w_edf, group_sizes_e = kept
    dx_td = _rows(dy_tf, w_edf, group_sizes_e, transposed=True)
    dw_edf = jax.lax.platform_dependent(
        x_td, dy_tf, group_sizes_e, cpu=partial(blocked.matrices), default=ragged.matrices
    )
    return dx_td, dw_edf, None


_product.defvjp(_product_fwd, _product_bwd)


def _rows(x_td, w_edf, group_sizes_e, *, transposed):
    forms = {"cpu": blocked.rows, "default": ragged.rows}
    forms = {platform: partial(form, transposed=transposed) for platform, form in forms.items()}
    return jax.lax.platform_dependent(x_td, w_edf, group_sizes_e, **forms)


def _equally_varying(*arrays):
    """Inside `jax.shard_map` all vary over the same mesh axes: loops want it, and a shared matrix's gradient is
    then summed over the devices by the transpose of this cast, outside of the custom derivative."""
    axes = frozenset().union(*map(blocked.varying, arrays))
    return tuple(jax.lax.pcast(a, tuple(sorted(axes - blocked.varying(a))), to="varying") for a in arrays)
