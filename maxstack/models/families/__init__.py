"""The table of families: every kind of model folder that can be read and written."""

from collections.abc import Mapping
from typing import Any

from maxstack.config import UserError
from maxstack.models.families.deepseek import DEEPSEEK_V2, DEEPSEEK_V3
from maxstack.models.families.experts import MIXTRAL, QWEN2_MOE, QWEN3_MOE
from maxstack.models.families.family import Family
from maxstack.models.families.gemma import GEMMA, GEMMA2, GEMMA3
from maxstack.models.families.glm import GLM, GLM4
from maxstack.models.families.gpt2 import GPT2
from maxstack.models.families.gpt_oss import GPT_OSS
from maxstack.models.families.granite import GRANITE
from maxstack.models.families.internlm import INTERNLM, INTERNLM2, INTERNLM3
from maxstack.models.families.keys import Keys
from maxstack.models.families.llama import LLAMA
from maxstack.models.families.mistral import MISTRAL
from maxstack.models.families.olmo2 import OLMO2
from maxstack.models.families.phi import PHI3
from maxstack.models.families.qwen import QWEN2, QWEN3
from maxstack.models.families.smollm3 import SMOLLM3
from maxstack.models.transformer import TransformerConfig

FAMILIES: tuple[Family, ...] = (
    LLAMA,
    MISTRAL,
    QWEN2,
    QWEN3,
    SMOLLM3,
    GRANITE,
    OLMO2,
    INTERNLM3,
    INTERNLM2,
    INTERNLM,
    GEMMA,
    GEMMA2,
    GEMMA3,
    PHI3,
    GLM,
    GLM4,
    GPT2,
    MIXTRAL,
    QWEN2_MOE,
    QWEN3_MOE,
    DEEPSEEK_V2,
    DEEPSEEK_V3,
    GPT_OSS,
)
"""In the order in which a model that several of them could hold is offered to them."""
_REGISTERED: list[Family] = []


def families() -> tuple[Family, ...]:
    """Those of the project, then those that were registered."""
    return (*FAMILIES, *_REGISTERED)


def register_family(family: Family) -> Family:
    """Let `family` be read and written like the project's own. Raises UserError when its name or a type is taken."""
    for other in families():
        same = other.name == family.name or set(other.model_types) & set(family.model_types)
        if same and other is not family:
            raise UserError(
                f"family {family.name} ({', '.join(family.model_types)}): there is {other.name} "
                f"({', '.join(other.model_types)}) already; take another name and model_type"
            )
    if family not in families():
        _REGISTERED.append(family)
    return family


def family_of(values: Mapping[str, Any], where: str) -> Family:
    """The family of a config.json. Raises UserError, with the list of those that are supported, for any other."""
    kind = values.get("model_type")
    for family in families():
        if kind in family.model_types:
            return family
    known = ", ".join(f"{family.name} ({', '.join(family.model_types)})" for family in families())
    raise UserError(f"{where}: model_type {kind!r} is not supported; these are: {known}")


def read_config(values: Mapping[str, Any], where: str) -> tuple[Family, TransformerConfig]:
    """The family and our config of a config.json. Raises UserError for whatever is not understood."""
    if values.get("quantization_config") is not None:
        method = values["quantization_config"].get("quant_method", "unknown")
        raise UserError(
            f"{where}: the weights are quantized ({method}), which is not read yet; take the unquantized model, or "
            "a GGUF file"
        )
    family = family_of(values, where)
    return family, family.read(Keys(values, where))


def family_for(config: TransformerConfig, *, prefer: str | None = None) -> Family:
    """The family that can hold `config`. Raises UserError when none can, or `prefer` (a name or model_type) cannot."""
    if prefer is not None:
        wanted = [f for f in families() if prefer in (f.name, *f.model_types)]
        if not wanted:
            raise UserError(
                f"no family {prefer!r}: the known ones are {', '.join(f.name for f in families())}"
            )
        if not wanted[0].expresses(config):
            raise UserError(
                f"the {wanted[0].name} family cannot hold this model: its config.json has no way to say it"
            )
        return wanted[0]
    for family in families():
        if family.expresses(config):
            return family
    raise UserError(
        "no family of models holds this one (the supported ones are "
        f"{', '.join(f.name for f in families())}): keep it as a maxstack checkpoint"
    )
