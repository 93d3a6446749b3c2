"""A model in a format that others read."""

import os
from pathlib import Path
from typing import Any

from maxstack.config import UserError
from maxstack.data.tokenizer import Tokenizer
from maxstack.models.packing import refuse_packed
from maxstack.models.pretrained.writing import SHARD_BYTES, save_folder
from maxstack.models.transformer import Transformer

FORMATS = ("hf", "gguf")


def save(
    model: Transformer, tokenizer: Tokenizer | None, path: str | os.PathLike[str], *, format: str = "hf",
    dtype: str | None = None, family: str | None = None, shard_bytes: int = SHARD_BYTES, made: str = "",
) -> dict[str, Any]:  # fmt: skip
    """Write a model, read it again, compare logits, and only then give it its name; returns the manifest.

    `format` is "hf" (a folder of safetensors, config.json and tokenizer files, which transformers opens) or "gguf" (a
    file for llama.cpp). `dtype` is float32, float16 or bfloat16, for GGUF also q8_0 and q4_0; by default the model's
    own. `family` names the family to write when several hold the model.

    Raises UserError for a model that the format cannot hold or a place that is taken, RunError when what was written is
    not what was meant; nothing is left behind then.
    """
    refuse_packed(model, f"save {path}")
    target = Path(path).expanduser()
    if format == "gguf":
        from maxstack.models.pretrained.gguf_writing import save_gguf

        return save_gguf(model, tokenizer, target, dtype=dtype, family=family)
    if format != "hf":
        raise UserError(f"format is {format!r}: it may be {' or '.join(FORMATS)}")
    if dtype not in (None, "float32", "float16", "bfloat16"):
        raise UserError(f"dtype {dtype!r} is for GGUF files; a model folder has float32, float16 or bfloat16")
    return save_folder(
        model,
        tokenizer,
        target,
        dtype=dtype,
        family=family,
        shard_bytes=shard_bytes,
        made=made,  # type: ignore[arg-type]
    )
