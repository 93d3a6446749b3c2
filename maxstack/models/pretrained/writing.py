"""A model as a folder that transformers opens: written beside its place, read again and compared, then put there."""

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

import maxstack
from maxstack.config import RunError, UserError
from maxstack.data.tokenizer import Tokenizer
from maxstack.models import tree
from maxstack.models.families import Family, family_for
from maxstack.models.families.weights import Entry, write_from
from maxstack.models.files.source import LazyTensor, TensorInfo, dtype_of
from maxstack.models.files.write_safetensors import write_safetensors
from maxstack.models.pretrained.folder import load_folder
from maxstack.models.pretrained.reading import together
from maxstack.models.transformer import Transformer

MANIFEST = "maxstack_export.json"
SHARD_BYTES = 5 * 10**9
FileDtype = Literal["float32", "float16", "bfloat16"]


def save_folder(
    model: Transformer, tokenizer: Tokenizer | None, folder: Path, *, dtype: FileDtype | None = None,
    family: str | None = None, shard_bytes: int = SHARD_BYTES, made: str = "",
) -> dict[str, Any]:  # fmt: skip
    """Write a model folder; returns the manifest that lies in it.

    `dtype` is the type of the file's weights (default: the model's own), `family` the family to write when several
    hold the model, `made` a line for the model card. The folder is written under another name and read again: its
    logits have to equal those of the model with weights rounded to `dtype`. Nothing is left behind when that fails.

    Raises UserError for a model that no family holds and a folder that is there already, RunError when what was written
    is not what was meant.
    """
    check_target(folder)
    row = family_for(model.config, prefer=family)
    kind: FileDtype = dtype or natural(model)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with beside(folder) as work:
        write_safetensors(work, tensors(row, model, kind), shard_bytes=shard_bytes)
        write_json(work / "config.json", config_keys(row, model, tokenizer, kind))
        write_json(work / "generation_config.json", token_keys(tokenizer))
        if tokenizer is not None:
            tokenizer.save(work)
        again = load_folder(work, dtype=model.config.dtype, kept=natural(model))
        manifest = manifest_of(row, model, kind, work, again)
        (work / "README.md").write_text(card(row, model, kind, made, manifest), encoding="utf-8")
        write_json(work / MANIFEST, manifest)
        os.replace(work, folder)
    return manifest


def check_target(target: Path) -> None:
    """Raise UserError when something is there that would be overwritten."""
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise UserError(f"{target} is there already: name a new place, or remove it first")


@contextlib.contextmanager
def beside(target: Path) -> Iterator[Path]:
    """A folder on the same file system, gone at the end whatever happens (unless it was renamed)."""
    work = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    work.chmod(0o777 & ~umask())
    try:
        yield work
    finally:
        shutil.rmtree(work, ignore_errors=True)


def umask() -> int:
    """The process's mask for new files; there is no way to read it without setting it."""
    mask = os.umask(0o022)
    os.umask(mask)
    return mask


def natural(model: Transformer) -> FileDtype:
    """The type of the model's matrices."""
    kind = str(tree.leaves(model)["embedding.table"].dtype)
    return kind if kind in ("float32", "float16", "bfloat16") else "float32"  # type: ignore[return-value]


def tensors(row: Family, model: Transformer, dtype: FileDtype) -> Iterator[LazyTensor]:
    """The file's tensors in the order of the model; buffers, such as a router's balancing bias, keep their type."""
    host, buffers = HostLeaves(tree.leaves(model)), tree.buffer_names(model)
    for source, parts in by_tensor(row.entries(model.config)):
        kind = str(host.arrays[parts[0].leaf].dtype) if parts[0].leaf in buffers else dtype
        yield source, TensorInfo(parts[0].form.shape, kind), partial(joined, parts, host, kind)


def by_tensor(entries: Sequence[Entry]) -> Iterator[tuple[str, list[Entry]]]:
    """Each tensor of the file with its parts; those that share leaves one after another."""
    for _, group in together(entries):
        found: dict[str, list[Entry]] = {}
        for entry in group:
            found.setdefault(entry.source, []).append(entry)
        yield from found.items()


class HostLeaves:
    """Leaves on the host: the few that were asked for last."""

    MOST = 4

    def __init__(self, arrays: Mapping[str, jax.Array]):
        self.arrays = arrays
        self.copies: dict[str, np.ndarray] = {}

    def __getitem__(self, leaf: str) -> np.ndarray:
        if leaf not in self.copies:
            while len(self.copies) >= self.MOST:
                del self.copies[next(iter(self.copies))]
            self.copies[leaf] = np.asarray(self.arrays[leaf])
        return self.copies[leaf]


def joined(parts: Sequence[Entry], host: HostLeaves, dtype: str) -> np.ndarray:
    """One tensor of the file from the leaves that it holds."""
    tensor = np.empty(parts[0].form.shape, dtype_of(dtype))
    for part in parts:
        write_from(tensor, part.form, host[part.leaf][part.index])
    return tensor


def config_keys(
    row: Family, model: Transformer, tokenizer: Tokenizer | None, dtype: FileDtype
) -> dict[str, Any]:
    """config.json."""
    return {
        "architectures": [row.architecture], "model_type": row.model_types[0], "torch_dtype": dtype,
        **row.keys(model.config), **token_keys(tokenizer),
    }  # fmt: skip


def token_keys(tokenizer: Tokenizer | None) -> dict[str, Any]:
    """Begin and end ids, for config.json and generation_config.json."""
    if tokenizer is None:
        return {}
    ends = tokenizer.stop_ids
    ids = {
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": list(ends) if len(ends) > 1 else tokenizer.eos_id,
    }
    return {key: value for key, value in ids.items() if value is not None}


def manifest_of(
    row: Family, model: Transformer, dtype: FileDtype, folder: Path, again: Transformer
) -> dict[str, Any]:
    """What was written, and how far its logits are from the model's. Raises RunError when they are not those meant."""
    rounded = rounded_to(model, dtype)
    tokens = probe(model)
    meant, given, exact = (np.asarray(run(m, tokens)) for m in (rounded, again, model))
    largest = float(np.abs(exact).max())
    # The same program on the same numbers; the bound only allows for sums in another order.
    if not np.abs(given - meant).max() <= 1e-4 * largest:
        raise RunError(
            f"{folder}: what was written gives other logits than the model (they differ by "
            f"{np.abs(given - meant).max():.3g} of {largest:.3g}); nothing was kept. This is a fault of maxstack"
        )
    return {
        "maxstack": maxstack.__version__, "family": row.name, "dtype": dtype, "model_sha256": fingerprint(model),
        "files_sha256": {f.name: file_hash(f) for f in sorted(folder.iterdir()) if f.is_file()},
        "largest_logit_difference": float(np.abs(given - exact).max()), "largest_logit": largest,
    }  # fmt: skip


def rounded_to(model: Transformer, dtype: FileDtype) -> Transformer:
    """The model with its weights rounded as the file rounds them."""
    kind, buffers = jnp.dtype(dtype), tree.buffer_names(model)
    arrays = {
        name: a if name in buffers or a.dtype == kind else a.astype(kind).astype(a.dtype)
        for name, a in tree.leaves(model).items()
    }
    return tree.rebuild(model, arrays)


def probe(model: Transformer) -> jax.Array:
    """Token ids that reach over the whole vocabulary."""
    length = min(32, model.config.max_length)
    return jnp.asarray(np.linspace(0, model.config.vocab_size - 1, length, dtype=np.int32)[None])


@jax.jit
def run(model: Transformer, tokens_bt: jax.Array) -> jax.Array:
    """Logits."""
    return model(tokens_bt)


def fingerprint(model: Transformer) -> str:
    """sha256 over names, types and values of all weights."""
    digest = hashlib.sha256()
    for name, array in sorted(tree.leaves(model).items()):
        digest.update(f"{name} {array.dtype} {array.shape}".encode())
        digest.update(np.ascontiguousarray(np.asarray(array)).view(np.uint8).data)
    return digest.hexdigest()


def file_hash(file: Path) -> str:
    """sha256 of a file."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def write_json(file: Path, values: Mapping[str, Any]) -> None:
    """An indented JSON object."""
    file.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def card(row: Family, model: Transformer, dtype: FileDtype, made: str, manifest: Mapping[str, Any]) -> str:
    """A model card: what it is, how it was made, how it is opened."""
    count = sum(array.size for array in tree.leaves(model).values())
    return "\n".join(
        [
            "---", "library_name: transformers", "tags: [maxstack]", "---", "",
            f"# {row.name} model of {count / 1e6:,.1f} million parameters", "",
            made or "Written by maxstack from a model in memory.", "",
            f"- architecture: {row.architecture}, {model.config.depth} layers, width {model.config.width}, "
            f"vocabulary {model.config.vocab_size}",
            f"- weights: {dtype}; logits differ from the model they were written from by at most "
            f"{manifest['largest_logit_difference']:.3g} (largest logit {manifest['largest_logit']:.3g}), read again "
            f"from these files", "",
            "```python", "from transformers import AutoModelForCausalLM, AutoTokenizer",
            "model = AutoModelForCausalLM.from_pretrained(FOLDER)", "```", "",
            "```python", "import maxstack", "model, tokenizer = maxstack.load(FOLDER)", "```", "",
        ]
    )  # fmt: skip
