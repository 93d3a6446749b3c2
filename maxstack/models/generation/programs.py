"""Which form of the programs runs where: the one place that asks for the platform."""

import jax
from jaxtyping import Array

from maxstack.models.generation.stacked import stacked_programs
from maxstack.models.generation.state import Programs
from maxstack.models.generation.unstacked import unstacked_programs
from maxstack.models.generation.weights import for_accelerator, unstack
from maxstack.models.remat import platform
from maxstack.models.transformer import Transformer


def programs_for(model: Transformer, on: str | None = None) -> tuple[Programs, list[Array]]:
    """The programs for this model on a platform ("cpu", "cuda", "tpu"; by default the one at hand), and its weights as
    they take them. They are kept by config and tree, so that a second model of the same shape compiles nothing."""
    if (on or platform()) == "cpu":
        leaves, treedef = jax.tree.flatten(unstack(model))
        return unstacked_programs(model.config, treedef), leaves
    leaves, treedef = jax.tree.flatten(for_accelerator(model))
    return stacked_programs(model.config, treedef), leaves
