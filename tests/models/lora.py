"""Adapters as PEFT writes them, of random numbers, and models with their deltas in the weights."""

import json
from pathlib import Path

import numpy as np

from maxstack.models import Transformer, tree
from maxstack.models.families import Family, family_for
from maxstack.models.files.source import TensorInfo
from maxstack.models.files.write_safetensors import write_safetensors
from maxstack.models.pretrained.folder import load_tensors
from maxstack.models.pretrained.writing import tensors

LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def write_adapter(
    folder: Path, model: Transformer, *, rank: int = 3, seed: int = 0, targets=LAYERS, family: str | None = None,
    ranks=None, size: float = 0.5, **settings,
) -> tuple[Path, dict[str, np.ndarray]]:  # fmt: skip
    """A folder with an adapter, and the delta of each tensor of the base model, computed as PEFT does."""
    row = family_for(model.config, prefer=family)
    values = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": 6,
        "target_modules": list(targets),
        "bias": "none",
    }
    values |= settings | ({"rank_pattern": ranks} if ranks else {})
    rng, written, deltas = np.random.default_rng(seed), {}, {}
    for source, (outputs, inputs) in matrices(row, model).items():
        module = source.removesuffix(".weight")
        if module.rpartition(".")[2] not in targets:
            continue
        if settings.get("fan_in_fan_out"):
            outputs, inputs = inputs, outputs
        own = next((r for name, r in (ranks or {}).items() if module.endswith(name)), rank)
        a = rng.standard_normal((own, inputs)).astype(np.float32) * inputs**-0.5
        b = rng.standard_normal((outputs, own)).astype(np.float32) * size
        written |= {f"base_model.model.{module}.lora_{n}.weight": x for n, x in (("A", a), ("B", b))}
        scale = values["lora_alpha"] / (own**0.5 if settings.get("use_rslora") else own)
        delta = scale * (b @ a)
        deltas[source] = delta.T if settings.get("fan_in_fan_out") else delta
    save(folder, values, written)
    return folder, deltas


def matrices(row: Family, model: Transformer) -> dict[str, tuple[int, int]]:
    """Of the tensors of a file, those with two axes."""
    return {e.source: e.form.shape for e in row.entries(model.config) if len(e.form.shape) == 2}  # type: ignore


def save(folder: Path, values: dict, written: dict[str, np.ndarray]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(values))
    infos = [(name, TensorInfo(x.shape, str(x.dtype)), lambda x=x: x) for name, x in written.items()]
    write_safetensors(folder, infos)
    (folder / "model.safetensors").rename(folder / "adapter_model.safetensors")


class InMemory:
    """Tensors of a file that is none."""

    where = "a test's tensors"

    def __init__(self, arrays: dict[str, np.ndarray]):
        self.arrays = arrays

    def names(self):
        return tuple(self.arrays)

    def info(self, name):
        return TensorInfo(self.arrays[name].shape, str(self.arrays[name].dtype))

    def read(self, name, start=0, stop=None):
        return self.arrays[name][start:stop].copy()

    def close(self):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass


def with_deltas(model: Transformer, deltas: dict[str, np.ndarray], family: str | None = None) -> Transformer:
    """The model whose tensors, as they lie in a file, have the deltas added: W + scale · B A."""
    row = family_for(model.config, prefer=family)
    arrays = {name: make() for name, _, make in tensors(row, model, "float32")}
    for name, delta in deltas.items():
        arrays[name] = arrays[name] + delta.astype(np.float32)
    merged = load_tensors(row, model.config, InMemory(arrays), dtype=model.config.dtype)  # type: ignore[arg-type]
    return tree.rebuild(model, tree.leaves(merged))
