"""The model of a run folder or checkpoint, which hold all that is needed to read it."""

import dataclasses
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp

from maxstack import checkpoint
from maxstack.checkpoint import CheckpointError
from maxstack.config import UserError, from_dict
from maxstack.data.tokenizer import Tokenizer, load_tokenizer
from maxstack.kernels.quantized_matmul import Kind
from maxstack.models import tree
from maxstack.models.packing import Packing
from maxstack.models.transformer import Transformer, TransformerConfig


def load_run_model(
    path: Path, *, step: int | None = None, dtype: Literal["bfloat16", "float32"] | None = None,
    averaged: bool = False, packed: Kind | None = None,
) -> tuple[Transformer, Tokenizer | None]:  # fmt: skip
    """Model and tokenizer of a run folder or of one of its checkpoints; the tokenizer is None where none was saved.

    `step` picks a checkpoint (the newest by default), `dtype` the compute type, `averaged` the moving average of the
    weights in place of the weights; `packed` holds those of linear layers in few bits. The model rematerialises
    nothing, however it was trained. Raises UserError when there is nothing to read or the tokenizer is another one than
    the checkpoint's, CheckpointError when it is damaged.
    """
    place = checkpoint_place(path, step)
    checkpoint.check(place)  # before anything it says is believed
    # How the training run saved memory is no part of the model: only a backward pass profits, and "offload"
    # is refused on a CPU even without one. Not only there: a checkpoint should be the same model on every machine.
    config = dataclasses.replace(model_config(place), remat="none")
    if dtype is not None:
        config = dataclasses.replace(config, dtype=dtype)
    abstract = tree.abstract(lambda: config.build(jax.random.key(0)))
    shapes = tree.leaves(abstract)
    buffers = tree.buffer_names(abstract)
    group = "ema" if averaged else "params"
    if averaged and not any(name.startswith("ema/") for name in checkpoint.describe(place).arrays):
        raise UserError(
            f"{place} keeps no average of the weights: train with --optim.ema-decay, or take the weights"
        )
    target = {
        group: {name: shape for name, shape in shapes.items() if name not in buffers},
        "buffers": {name: shapes[name] for name in buffers},
    }
    state, _ = checkpoint.restore_partial(place, target, strict=True, verify_by="none")  # checked above
    arrays = {**state[group], **state.get("buffers", {})}
    del state
    if packed is None:
        model = tree.rebuild(abstract, {name: jnp.asarray(array) for name, array in arrays.items()})
        return model, run_tokenizer(place)
    packing, kept = Packing(abstract, packed), {}
    for name in list(arrays):  # each is let go of as soon as it is packed
        kept |= packing(name, jnp.asarray(arrays.pop(name)))
    return tree.rebuild(packing.abstract, kept), run_tokenizer(place)


def checkpoint_place(path: Path, step: int | None = None) -> Path:
    """The folder of one checkpoint, given it, a folder of checkpoints or a run folder. UserError when not there."""
    if not path.exists():
        raise UserError(f"{path}: no such folder; give a run folder, one that `maxstack train` wrote")
    try:
        return checkpoint.locate(path, step)
    except CheckpointError as error:  # not damaged: asked for in the wrong place
        raise UserError(
            f"{error}; give a run folder, one that `maxstack train` wrote, and a step it has"
        ) from error


def model_config(place: Path) -> TransformerConfig:
    """The model's configuration as the checkpoint keeps it."""
    meta = checkpoint.read_meta(place)
    if "model" not in meta:
        raise UserError(
            f"{place}: this checkpoint does not say what model it holds; it was not written by training"
        )
    return from_dict(meta["model"])


def run_tokenizer(place: Path) -> Tokenizer | None:
    """The tokenizer saved beside the checkpoints. Raises UserError when it is not the one that the model learned."""
    for parent in (place, *place.parents[:2]):
        if (parent / "tokenizer" / "tokenizer.json").exists():
            tokenizer = load_tokenizer(str(parent / "tokenizer"))
            learned = checkpoint.read_meta(place).get("tokenizer", tokenizer.fingerprint)
            if learned != tokenizer.fingerprint:
                raise UserError(
                    f"{parent / 'tokenizer'} ({tokenizer.fingerprint[:12]}) is not the tokenizer that {place} was "
                    f"trained with ({learned[:12]}): token ids would mean other text. Put that one back; it lies in "
                    "the run's prepared data, and resuming the run writes it again"
                )
            return tokenizer
    return None
