"""Adapters as the PEFT library writes them: a folder with adapter_config.json and adapter_model.safetensors.

LoRA alone, of linear maps of the layers. What would change the model otherwise (offsets, whole modules, DoRA's
magnitudes, embeddings, experts) is refused by name: half an adapter is not the adapter.
"""

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from maxstack.config import UserError
from maxstack.models.adapters import HIGHEST_RANK, Adapter, LowRank
from maxstack.models.families import families
from maxstack.models.families.weights import LAYER_LEAF, Entry, Form, read_into
from maxstack.models.files import Safetensors, TensorSource
from maxstack.models.pretrained.folder import read_json
from maxstack.models.transformer import TransformerConfig

SETTINGS, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
KEY = re.compile(r"(?:base_model\.model\.)?(.+)\.lora_([AB])(?:\.\w+)?\.weight")
MOVED_BASE = ("pissa", "olora", "corda", "loftq")
"""Ways to begin that change the base model's own weights, which the folder does not hold."""


class Settings(NamedTuple):
    """What an adapter's config says."""

    rank: int
    alpha: float
    rslora: bool
    by_inputs: bool
    """Weights of the base model lie [inputs, outputs]."""
    ranks: Mapping[str, Any]
    alphas: Mapping[str, Any]

    def scale(self, module: str, rank: int) -> float:
        """The factor on a module's delta."""
        alpha = float(_of_module(self.alphas, module, self.alpha))
        return alpha / (math.sqrt(rank) if self.rslora else rank)

    def rank_of(self, module: str) -> int:
        """A module's rank."""
        return int(_of_module(self.ranks, module, self.rank))


def _of_module(patterns: Mapping[str, Any], module: str, default: Any) -> Any:
    for pattern, value in patterns.items():
        if re.fullmatch(rf"(?:.*\.)?(?:{pattern})", module):
            return value
    return default


def read_settings(folder: Path) -> Settings:
    """The config of a folder. Raises UserError for whatever is not LoRA alone."""
    values = read_json(folder / SETTINGS)
    where = folder / SETTINGS
    if values.get("peft_type") != "LORA":
        raise UserError(f"{where}: peft_type is {values.get('peft_type')!r}; only LORA adapters are served")
    refused = {
        "use_dora": "DoRA also learns a magnitude of each output",
        "modules_to_save": "it brings whole modules beside the low-rank factors",
        "trainable_token_indices": "it brings rows of the token table",
        "target_parameters": "it changes the weights of experts",
        "lora_bias": "it brings offsets",
        "use_bdlora": "its factors are block-diagonal",
        "alora_invocation_tokens": "it is switched on by tokens of the prompt",
    }  # fmt: skip
    for key, why in refused.items():
        if values.get(key):
            raise UserError(
                f"{where}: {key} is {values[key]!r}: {why}, which is not served. Train it without, or merge it into "
                "the model (merge_and_unload of PEFT) and serve that"
            )
    if values.get("bias", "none") != "none":
        raise UserError(
            f"{where}: bias is {values['bias']!r}: offsets are not served; train with bias 'none'"
        )
    begun = str(values.get("init_lora_weights", True)).lower()
    if begun.startswith(MOVED_BASE):
        raise UserError(
            f"{where}: init_lora_weights is {begun!r}, which changes the base model itself; convert the adapter to "
            "plain LoRA (path_initial_model_for_weight_conversion of PEFT) first"
        )
    return _settings(values, str(where))


def _settings(values: Mapping[str, Any], where: str) -> Settings:
    rank, alpha = values.get("r"), values.get("lora_alpha", values.get("r"))
    if not isinstance(rank, int) or isinstance(rank, bool) or not 1 <= rank <= HIGHEST_RANK:
        raise UserError(f"{where}: r is {rank!r}; it must be 1 to {HIGHEST_RANK}")
    if not isinstance(alpha, int | float) or isinstance(alpha, bool) or not math.isfinite(alpha):
        raise UserError(f"{where}: lora_alpha is {alpha!r}; it must be a number")
    patterns = [values.get(name) or {} for name in ("rank_pattern", "alpha_pattern")]
    for pattern in patterns:
        numbers = isinstance(pattern, dict) and all(type(v) in (int, float) for v in pattern.values())
        if not numbers or any(not _sound(key) for key in pattern):
            raise UserError(
                f"{where}: rank_pattern and alpha_pattern give a number to a module's name or pattern"
            )
    return Settings(
        rank, float(alpha), values.get("use_rslora") is True, values.get("fan_in_fan_out") is True, *patterns
    )


def _sound(pattern: str) -> bool:
    """Whether a name is a short pattern that cannot take for ever to match."""
    return (
        len(pattern) <= 200 and re.fullmatch(r"[\w.^$\\|()\-]*", pattern) is not None and _compiles(pattern)
    )


def _compiles(pattern: str) -> bool:
    try:
        re.compile(pattern)
    except re.error:
        return False
    return True


def read_peft(
    folder: Path, config: TransformerConfig, names: Mapping[tuple[int, int], Any], rank: int
) -> Adapter:
    """The adapter of a folder for a model of `config`; `names` are, by stack and place in its pattern, the linear maps
    that can have one. Raises UserError for whatever is wrong or not supported, a rank above `rank` included."""
    settings = read_settings(folder)
    file = folder / WEIGHTS
    if not file.is_file():
        pickled = (folder / "adapter_model.bin").is_file()
        also = " (adapter_model.bin is a pickle, which is not read)" if pickled else ""
        raise UserError(f"{folder} has no {WEIGHTS}{also}: save the adapter with safe_serialization=True")
    with Safetensors(file) as source:
        modules = _modules(source)
        places = _places(config, modules, str(file))
        found: dict[tuple[int, int, int, str], LowRank] = {}
        indices: dict[Any, tuple[np.ndarray, np.ndarray]] = {}
        for module, keys in modules.items():
            for entry in places[module]:
                stack, place, name = _spot(entry, module, names, str(file))
                if (stack, place, name) not in indices:
                    indices[stack, place, name] = _order(entry, config, settings.by_inputs)
                own = _factors(source, module, keys, settings, rank, entry.form, indices[stack, place, name])
                found[stack, place, entry.index[0], name] = own
    return found


def _modules(source: TensorSource) -> dict[str, dict[str, str]]:
    """By module of the base model: the names of its factors A and B."""
    modules: dict[str, dict[str, str]] = {}
    for name in source.names():
        match = KEY.fullmatch(name)
        if match is None:
            raise UserError(
                f"{source.where}: the tensor {name} is no factor of a LoRA of a linear map; what else an adapter may "
                "hold (offsets, magnitudes, embeddings, whole modules) is not served"
            )
        modules.setdefault(match.group(1), {})[match.group(2)] = name
    for module, keys in modules.items():
        if set(keys) != {"A", "B"}:
            raise UserError(f"{source.where}: {module} has only one of lora_A and lora_B")
    if not modules:
        raise UserError(f"{source.where} holds no tensors")
    return modules


def _places(config: TransformerConfig, modules: Mapping[str, Any], where: str) -> dict[str, list[Entry]]:
    """What each module is in our model, by the first family that holds the model and knows all modules."""
    unknown: list[str] = []
    for family in families():
        if not family.expresses(config):
            continue
        by_module: dict[str, list[Entry]] = {}
        for entry in family.entries(config):
            by_module.setdefault(entry.source.removesuffix(".weight"), []).append(entry)
        strange = [module for module in modules if module not in by_module]
        if not strange:
            return by_module
        unknown = unknown or strange
    raise UserError(
        f"{where}: the model has no module {', '.join(sorted(unknown)[:3]) or 'that a family of models knows'}: the "
        "adapter was made for another model"
    )


def _spot(
    entry: Entry, module: str, names: Mapping[tuple[int, int], Any], where: str
) -> tuple[int, int, str]:
    match = LAYER_LEAF.fullmatch(entry.leaf)
    if match is not None and len(entry.index) == 1:
        stack, place, name = int(match.group(1)), int(match.group(2)), match.group(3).removesuffix(".w")
        if name in names.get((stack, place), ()):
            return stack, place, name
    raise UserError(
        f"{where}: an adapter of {module} is not served here; those of these are: "
        f"{', '.join(sorted({name for found in names.values() for name in found}))}"
    )


def _order(entry: Entry, config: TransformerConfig, by_inputs: bool) -> tuple[np.ndarray, np.ndarray]:
    """Which rows of A's inputs and B's outputs the axes of our weight are, in the shapes of its inputs and outputs."""
    import jax

    from maxstack.models import tree

    leaves = tree.leaves(tree.abstract(lambda: config.build(jax.random.key(0))))
    shape = leaves[entry.leaf].shape[1:]
    inputs = 2 if entry.leaf.endswith("attention.o.w") else 1
    orders = []
    for axis in (1, 0):  # one tensor holds its own column numbers, the other its row numbers
        target = np.empty(shape, np.int32)
        read_into(target, entry.form, np.indices(entry.form.shape, np.int32)[axis])
        orders.append(target)
    of_inputs, of_outputs = orders[::-1] if by_inputs else orders
    ends = (0,) * (len(shape) - inputs)
    return of_inputs[(..., *ends)], of_outputs[(0,) * inputs]


def _factors(
    source: TensorSource, module: str, keys: Mapping[str, str], settings: Settings, most: int, form: Form,
    order: tuple[np.ndarray, np.ndarray],
) -> LowRank:  # fmt: skip
    """One module's factors in our shapes."""
    outputs, inputs = form.shape[::-1] if settings.by_inputs else form.shape
    rank = settings.rank_of(module)
    if rank > most:
        raise UserError(
            f"{source.where}: {module} has rank {rank}; this server has room for {most}: start it with more"
        )
    for name, shape in ((keys["A"], (rank, inputs)), (keys["B"], (outputs, rank))):
        if source.info(name).shape != shape:
            raise UserError(
                f"{source.where}: {name} has shape {list(source.info(name).shape)}, not {list(shape)}"
            )
    a, b = (source.read(keys[key]).astype(np.float32) for key in "AB")
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        raise UserError(f"{source.where}: {module} holds numbers that are not finite")
    of_inputs, of_outputs = order
    b = b * np.float32(settings.scale(module, rank))
    return LowRank(np.moveaxis(a[:, of_inputs], 0, -1), np.moveaxis(b[of_outputs], -1, 0))
