"""Any model by name: a run of our own, a model folder, a GGUF file, a hub's repository, a packaged one."""

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

from jax.sharding import Mesh

from maxstack.config import UserError
from maxstack.data.tokenizer import Tokenizer, load_tokenizer
from maxstack.kernels.quantized_matmul import KINDS, Kind
from maxstack.models.files.gguf import GGUF
from maxstack.models.pretrained.folder import CONFIG_FILE, FILED, load_folder, read_json
from maxstack.models.pretrained.gguf import load_gguf
from maxstack.models.pretrained.places import place_of
from maxstack.models.run_model import load_run_model
from maxstack.models.transformer import Transformer

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model")


def load(
    name_or_path: str | os.PathLike[str], *, step: int | None = None,
    dtype: Literal["bfloat16", "float32"] | None = None, averaged: bool = False, mesh: Mesh | None = None,
    weights: Kind | None = None, as_filed: bool = False,
) -> tuple[Transformer, Tokenizer | None]:  # fmt: skip
    """Model and tokenizer of a run folder, a model folder (config.json and safetensors), a GGUF file, "hf:owner/name",
    "modelscope:owner/name" or a packaged model ("smollm2-135m-instruct"); without tokenizer files, None for it.

    `dtype` is the compute type; by default that of a run, float32 on a CPU, else that of the file. The weights of a
    foreign model are kept in it, those of a run in float32. `mesh` cuts a foreign model's weights over its devices.
    `weights` ("int8", "int4-g32", "int4-g128") holds those of linear layers in few bits, rounded to nearest while they
    are read, so that the model is never there in full: `models.packing` says what stays as it is.
    `as_filed` keeps the weights of a foreign model, on one device, in the file's type where that is bfloat16: half the
    bytes to move for whoever lays them out anew.
    `step` and `averaged` pick among the checkpoints of a run. The model rematerialises nothing.

    Raises UserError for a name that stands for nothing, and for whatever is wrong or not supported in what it stands
    for; RunError when a hub cannot be reached; CheckpointError for a damaged checkpoint.
    """
    if weights is not None and weights not in KINDS:
        raise UserError(f"weights {weights!r} are not known; these are: {', '.join(KINDS)}")
    place = place_of(name_or_path)
    if is_run(place):
        if mesh is not None:
            raise UserError(
                f"{place} is a run: only foreign models are loaded onto a mesh; resume the run instead"
            )
        return load_run_model(place, step=step, dtype=dtype, averaged=averaged, packed=weights)
    if step is not None or averaged:
        raise UserError(f"{place} is no run folder: it has neither steps nor an average of weights to choose")
    kept = FILED if as_filed and mesh is None and weights is None else None
    if file := gguf_in(place):
        return load_gguf_file(file, dtype=dtype, mesh=mesh, kept=kept, packed=weights)
    with ThreadPoolExecutor(1) as beside:  # weights are waited for, most of the time
        tokenizer = beside.submit(folder_tokenizer, place)
        model = load_folder(place, dtype=dtype, mesh=mesh, kept=kept, packed=weights)
        return model, tokenizer.result()


def load_gguf_file(file: Path, **options: Any) -> tuple[Transformer, Tokenizer]:
    """Model and tokenizer of a GGUF file; `options` as in `load_gguf`."""
    from maxstack.data.tokenizer import tokenizer_from_gguf

    with GGUF(file) as source, ThreadPoolExecutor(1) as beside:
        tokenizer = beside.submit(tokenizer_from_gguf, source.metadata)
        return load_gguf(source, **options), tokenizer.result()


def is_run(place: Path) -> bool:
    """Whether a place is a run folder or a checkpoint, or not there to be anything else."""
    if place.is_file():
        return False
    config = place / CONFIG_FILE
    foreign = config.is_file() and "model_type" in read_json(config)
    return not foreign and gguf_in(place) is None and not any(place.glob("*.safetensors*"))


def gguf_in(place: Path) -> Path | None:
    """The GGUF file that a place is, or alone holds."""
    if place.is_file():
        return place
    files = sorted(place.glob("*.gguf"))
    if len(files) > 1 and not (place / CONFIG_FILE).is_file():
        raise UserError(
            f"{place} holds {len(files)} GGUF files: name one of {', '.join(f.name for f in files)}"
        )
    return files[0] if len(files) == 1 and not (place / CONFIG_FILE).is_file() else None


def folder_tokenizer(folder: Path) -> Tokenizer | None:
    """The tokenizer of a model folder, or None where there is none."""
    return load_tokenizer(folder) if any((folder / name).is_file() for name in TOKENIZER_FILES) else None
