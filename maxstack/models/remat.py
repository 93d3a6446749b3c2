"""Named rematerialisation policies: what a layer keeps for its backward pass.

| name      | kept for each layer                          | memory     | time                                   |
|-----------|----------------------------------------------|------------|----------------------------------------|
| none      | everything                                   | most       | least                                  |
| dots      | results of weight products and of attention  | high       | element-wise parts again               |
| attention | layer input, attention output and log-sum-exp| low        | all products but attention's again     |
| full      | layer input                                  | least      | the whole forward again (about +1/3)   |
| offload   | layer input, in host memory                  | least      | as full, plus transfers the backend hides |
"""

from collections.abc import Callable
from typing import Literal

import jax

from maxstack.config import UserError

Remat = Literal["none", "dots", "attention", "full", "offload"]


def rematerialised(layer: Callable, name: Remat) -> Callable:
    """`layer` with the policy `name`. Raises UserError for offload where the devices have no host memory space."""
    if name == "none":
        return layer
    policies = jax.checkpoint_policies
    if name == "offload":
        if platform() == "cpu":
            raise UserError(
                "remat 'offload' needs an accelerator with pinned host memory, and this is compiled for cpu: use "
                "'full', which keeps the same arrays on the device"
            )
        policy = policies.save_and_offload_only_these_names(
            names_which_can_be_saved=[], names_which_can_be_offloaded=["layer_input"],
            offload_src="device", offload_dst="pinned_host",
        )  # fmt: skip
    else:
        policy = {
            "full": policies.nothing_saveable,
            "attention": policies.save_only_these_names("attn_out", "attn_lse"),
            "dots": policies.save_only_these_names("product", "attn_out", "attn_lse"),
        }[name]
    return jax.checkpoint(layer, policy=policy, prevent_cse=False)


def platform() -> str:
    """What is compiled for: the devices of the mesh set by `jax.set_mesh`, there or only described; or the default."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform
