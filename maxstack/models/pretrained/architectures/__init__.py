"""The table of GGUF architectures: every kind of GGUF file that can be read and written."""

from maxstack.models.pretrained.architectures.architecture import Architecture, Facts
from maxstack.models.pretrained.architectures.deepseek import DEEPSEEK_V2, DEEPSEEK_V2_OLDER, DEEPSEEK_V3
from maxstack.models.pretrained.architectures.dense import (
    GLM4,
    GRANITE,
    INTERNLM2,
    INTERNLM3,
    LLAMA,
    OLMO2,
    PHI3,
    QWEN2,
    QWEN3,
    SMOLLM3,
)
from maxstack.models.pretrained.architectures.experts import GPT_OSS, MIXTRAL, QWEN2_MOE, QWEN3_MOE
from maxstack.models.pretrained.architectures.gemma import GEMMA, GEMMA2, GEMMA3
from maxstack.models.pretrained.architectures.gpt2 import GPT2
from maxstack.models.pretrained.architectures.rotary import FACTORS, TENSORS, factor_tensors

__all__ = ["ARCHITECTURES", "FACTORS", "TENSORS", "Architecture", "Facts", "factor_tensors"]

ARCHITECTURES: tuple[Architecture, ...] = (
    LLAMA,
    INTERNLM3,
    MIXTRAL,
    QWEN2,
    QWEN3,
    QWEN2_MOE,
    QWEN3_MOE,
    GEMMA,
    GEMMA2,
    GEMMA3,
    PHI3,
    INTERNLM2,
    SMOLLM3,
    GRANITE,
    OLMO2,
    GLM4,
    GPT2,
    GPT_OSS,
    DEEPSEEK_V2,
    DEEPSEEK_V2_OLDER,
    DEEPSEEK_V3,
)
"""In the order in which a model that several of them could hold is offered to them."""
