"""The same model with its layers in longer patterns, so that some of them can be changed and others not."""

import dataclasses

import jax

from maxstack.config import UserError
from maxstack.models import tree
from maxstack.models.transformer import StackConfig, Transformer


def regroup(model: Transformer, period: int, stack: int = 0) -> Transformer:
    """`model` with `period` layers in the pattern of a stack, which must be a multiple of the layers it has now.

    With a period of 2, "stacks.0.layers.0" is every layer of an even number and "stacks.0.layers.1" every other. The
    weights of the stack are copied, the others shared. Raises UserError for a period that does not divide the layers.
    """
    old = model.config.stacks[stack]
    now = len(old.pattern)
    if period < 1 or period % now or old.repeats % (period // now):
        raise UserError(
            f"stack {stack} has {old.repeats} times a pattern of {now} layers: a period of {period} does not divide "
            "them"
        )
    times = period // now
    new = StackConfig(pattern=old.pattern * times, repeats=old.repeats // times)
    stacks = (*model.config.stacks[:stack], new, *model.config.stacks[stack + 1 :])
    config = dataclasses.replace(model.config, stacks=stacks)
    arrays: dict[str, jax.Array] = {}
    for name, array in tree.leaves(model).items():
        before, inside, rest = name.partition(f"stacks.{stack}.layers.")
        if before or not inside:
            arrays[name] = array
            continue
        place, _, leaf = rest.partition(".")
        for turn in range(times):
            arrays[f"{inside}{int(place) + turn * now}.{leaf}"] = array[turn::times]
    return tree.rebuild(tree.abstract(lambda: config.build(jax.random.key(0))), arrays)
