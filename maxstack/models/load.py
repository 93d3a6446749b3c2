"""A trained model by name: the run folder or checkpoint holds all that is needed to read it."""

import dataclasses
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp

from maxstack import checkpoint
from maxstack.config import UserError, from_dict
from maxstack.data.tokenizer import Tokenizer, load_tokenizer
from maxstack.models import tree
from maxstack.models.transformer import Transformer, TransformerConfig


def load(
    path: str | Path, *, step: int | None = None, dtype: Literal["bfloat16", "float32"] | None = None,
    averaged: bool = False,
) -> tuple[Transformer, Tokenizer | None]:  # fmt: skip
    """Model and tokenizer of a run folder or of one of its checkpoints; the tokenizer is None where none was saved.

    `step` picks a checkpoint (the newest by default), `dtype` the compute type, `averaged` the moving average of the
    weights in place of the weights. Raises UserError when there is nothing to read, CheckpointError when it is damaged.
    """
    folder = checkpoint_folder(Path(path))
    config = model_config(folder, step)
    if dtype is not None:
        config = dataclasses.replace(config, dtype=dtype)
    abstract = tree.abstract(lambda: config.build(jax.random.key(0)))
    shapes = tree.leaves(abstract)
    buffers = tree.buffer_names(abstract)
    group = "ema" if averaged else "params"
    target = {
        group: {name: shape for name, shape in shapes.items() if name not in buffers},
        "buffers": {name: shapes[name] for name in buffers},
    }
    state, _ = checkpoint.restore_partial(folder, target, step=step)
    arrays = {**state[group], **state.get("buffers", {})}
    model = tree.rebuild(abstract, {name: jnp.asarray(array) for name, array in arrays.items()})
    return model, run_tokenizer(folder)


def checkpoint_folder(path: Path) -> Path:
    """Where the checkpoints of a run folder, a checkpoint folder or a single checkpoint lie."""
    if not path.exists():
        raise UserError(f"{path}: no such folder; give a run folder, one that `maxstack train` wrote")
    return path / "checkpoints" if (path / "checkpoints").is_dir() else path


def model_config(folder: Path, step: int | None = None) -> TransformerConfig:
    """The model's configuration as the checkpoint keeps it."""
    meta = checkpoint.read_meta(folder, step)
    if "model" not in meta:
        raise UserError(
            f"{folder}: this checkpoint does not say what model it holds; it was not written by training"
        )
    return from_dict(meta["model"])


def run_tokenizer(folder: Path) -> Tokenizer | None:
    """The tokenizer saved beside the checkpoints."""
    for parent in (folder, *folder.parents[:2]):
        if (parent / "tokenizer" / "tokenizer.json").exists():
            return load_tokenizer(str(parent / "tokenizer"))
    return None
