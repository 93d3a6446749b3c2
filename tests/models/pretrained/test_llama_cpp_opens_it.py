"""GGUF files written here give llama.cpp the same tokens: the packaged real model, tiny ones of each architecture.

Needs a Python with llama-cpp-python, named by MAXSTACK_LLAMA_PYTHON (it builds from source, in minutes);
`make test-oracle LLAMA_PYTHON=…` runs it.
"""

import json
import os
import subprocess
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import maxstack
from maxstack.models.pretrained.architectures import ARCHITECTURES
from maxstack.models.transformer import Transformer
from tests.models.pretrained.tiny_gguf import TOKENIZER, golden_model, random_model

PYTHON = os.environ.get("MAXSTACK_LLAMA_PYTHON") or None
pytestmark = [
    pytest.mark.oracle,
    pytest.mark.skipif(PYTHON is None, reason="set MAXSTACK_LLAMA_PYTHON to a Python with llama-cpp-python"),
]
PROMPTS = ("The capital of France is", "Once upon a time", "def fibonacci(n):\n", "今天天气很好，")
# Float32 sums in another order: 1.1e-5 was measured. llama.cpp quantizes activations too when weights are Q8_0: 0.24.
BOUNDS = {"float32": 2e-4, "q8_0": 0.5}
SCRIPT = """
import json, sys
import numpy as np
from llama_cpp import Llama
file, prompts = json.loads(sys.stdin.read())
model = Llama(file, n_ctx=256, logits_all=True, verbose=False, type_k=0, type_v=0, n_threads=1)
for prompt in prompts:
    model.reset()
    text = isinstance(prompt, str)
    ids = model.tokenize(prompt.encode(), add_bos=False, special=True) if text else prompt
    model.eval(ids)
    print(json.dumps([ids, np.asarray(model.scores[:len(ids)], np.float64).tolist()]))
"""


def llama_cpp(file, prompts) -> list[tuple[list[int], np.ndarray]]:
    """Ids and logits [t, v] of each prompt, a text or ids."""
    done = subprocess.run(
        [str(PYTHON), "-c", SCRIPT],
        input=json.dumps([str(file), list(prompts)]),
        text=True,
        check=True,
        capture_output=True,
    )
    answers = [json.loads(line) for line in done.stdout.strip().splitlines()]
    return [(ids, np.asarray(logits)) for ids, logits in answers]


@pytest.mark.parametrize("dtype", BOUNDS)
def test_llama_cpp_gives_the_same_tokens_and_log_probabilities(dtype, tmp_path):
    model, tokenizer = maxstack.load("smollm2-135m-instruct")
    file = tmp_path / "model.gguf"
    maxstack.save(model, tokenizer, file, format="gguf", dtype=dtype)
    worst = 0.0
    for prompt, (ids, logits) in zip(PROMPTS, llama_cpp(file, PROMPTS), strict=True):
        assert ids == tokenizer.encode(prompt)
        theirs = np.asarray(jax.nn.log_softmax(jnp.asarray(logits[-1])))
        ours = np.asarray(jax.nn.log_softmax(model(jnp.asarray([ids]))[0, -1]))
        top = np.argsort(-ours)[:10]
        assert theirs.argmax() == top[0]
        worst = max(worst, float(np.abs(theirs - ours)[top].max()))
    print(f"{dtype}: {worst:.2g}")
    assert worst < BOUNDS[dtype]


class Case(NamedTuple):
    """A tiny model: a golden one's config.json with other values for some keys."""

    golden: str
    family: str | None
    """As which it is written."""
    architecture: str
    changes: dict[str, Any] = {}
    """What llama.cpp cannot do as the golden model has it."""
    random: bool = False
    """With random weights, where the golden ones do not fit."""
    bound: float = 2e-5
    """Of the largest logit; float32 sums in another order made 5e-6 at most."""


# llama.cpp looks GELU up in a table of float16: 2e-4 (GPT-2) to 1.1e-3 (Gemma 3) were measured.
GELU = 3e-3
YARN = {
    "beta_slow": 1.0,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
    "rope_theta": 100.0,
    "rope_type": "yarn",
}
LONGROPE = {
    "long_factor": [1.5, 2.25, 3.0], "short_factor": [1.0, 1.1, 1.2], "original_max_position_embeddings": 512,
    "partial_rotary_factor": 0.75, "rope_theta": 100.0, "rope_type": "longrope",
}  # fmt: skip
V2 = {
    "rms_norm_eps": 1e-6, "num_hidden_layers": 27, "rope_parameters": YARN | {"mscale": 0.707, "mscale_all_dim": 0.707},
}  # fmt: skip
V3 = {
    "rms_norm_eps": 1e-6, "attention_bias": False, "rope_parameters": YARN | {"mscale": 1.0, "mscale_all_dim": 1.0},
}  # fmt: skip
DEFAULT_ROPE = {"rope_theta": 100.0, "rope_type": "default"}
CASES = (
    Case("llama-plain", "llama", "llama"),
    Case("llama-linear", "llama", "llama"),
    Case("llama-yarn", "llama", "llama", {"rope_parameters": YARN}),
    Case("internlm3-qkv-bias", "internlm3", "llama"),
    Case("mistral-no-window", "mistral", "llama"),
    Case("mixtral-plain", "mixtral", "llama"),
    Case("mixtral-linear", "mixtral", "llama"),
    Case("gemma-plain", "gemma", "gemma", bound=GELU),
    # Attention's factor is not a key but goes by the sizes: by the head's, and by width / heads in the largest model.
    Case("gemma2-plain", "gemma2", "gemma2", {"query_pre_attn_scalar": 10}, bound=GELU),
    Case(
        "gemma2-plain", "gemma2", "gemma2", {"query_pre_attn_scalar": 5, "num_hidden_layers": 46, "layer_types": None},
        random=True, bound=3 * GELU,  # of 46 layers
    ),
    Case("gemma3-plain", "gemma3", "gemma3", {"query_pre_attn_scalar": 10}, bound=GELU),
    Case("gemma3-linear", "gemma3", "gemma3", {"query_pre_attn_scalar": 10}, bound=GELU),
    Case("phi3-plain", "phi3", "phi3", {"sliding_window": None}),
    Case("phi3-long", "phi3", "phi3"),
    Case("phi3-gain", "phi3", "phi3"),
    # llama.cpp takes the long factors by the context that is asked for, of at least 256 tokens.
    Case(
        "phi3-short", "phi3", "phi3",
        {"max_position_embeddings": 2048, "original_max_position_embeddings": 512, "rope_parameters": LONGROPE},
    ),
    Case("internlm2-plain", "internlm2", "internlm2"),
    Case("qwen2-plain", None, "llama"),  # qwen2's heads are as wide as the model
    Case("qwen2-plain", "qwen2", "qwen2", {"head_dim": 6, "hidden_size": 36}, random=True),
    Case("qwen3-plain", "qwen3", "qwen3"),
    Case("qwen3-yarn", "qwen3", "qwen3", {"rope_parameters": YARN}),
    Case("qwen2moe-plain", "qwen2_moe", "qwen2moe"),
    Case("qwen3moe-plain", "qwen3_moe", "qwen3moe"),
    Case("olmo2-plain", "olmo2", "olmo2", {"head_dim": 6, "hidden_size": 36}, random=True),
    Case("granite-plain", "granite", "granite"),
    Case("granite-yarn", "granite", "granite", {"rope_parameters": YARN}),
    Case("glm4-plain", "glm4", "glm4"),
    Case("glm4-yarn", "glm4", "glm4", {"rope_parameters": YARN | {"partial_rotary_factor": 0.5}}),
    Case("smollm3-plain", "smollm3", "smollm3"),
    Case("gpt2-plain", "gpt2", "gpt2", bound=GELU),
    Case("gpt2-inner", "gpt2", "gpt2", bound=GELU),
    Case("gptoss-full-first", "gpt_oss", "gpt-oss"),
    Case("gptoss-plain", "gpt_oss", "gpt-oss", {"rope_parameters": DEFAULT_ROPE}),
    # Queries without a latent are for models of 26 or 27 layers.
    Case("deepseek2-plain", "deepseek_v2", "deepseek2", V2, random=True),
    Case("deepseek3-plain", "deepseek_v3", "deepseek2"),
    Case("deepseek3-yarn", "deepseek_v3", "deepseek2", V3, random=True),
)  # fmt: skip


def model_of(case: Case) -> tuple[Transformer, np.ndarray]:
    """The model with its tokens [b, t]."""
    return (random_model if case.random else golden_model)(case.golden, case.changes)


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.golden}-{case.architecture}")
def test_llama_cpp_computes_each_architecture_alike(case, tmp_path):
    model, tokens = model_of(case)
    manifest = maxstack.save(model, TOKENIZER, tmp_path / "model.gguf", format="gguf", family=case.family)
    assert manifest["family"] == case.architecture
    theirs = np.asarray([logits for _, logits in llama_cpp(tmp_path / "model.gguf", tokens.tolist())])
    ours = np.asarray(jax.jit(lambda model, tokens: model(tokens))(model, jnp.asarray(tokens)))
    difference = np.abs(theirs - ours).max() / np.abs(ours).max()
    print(f"{case.golden} as {case.architecture}: {difference:.2g}")
    assert difference < case.bound
    assert np.mean(theirs.argmax(-1) == ours.argmax(-1)) > (0.98 if case.bound >= GELU else 0.999)


# Rows that are multiples of a block of 32.
SMALLER = {
    "qwen3moe-plain": {"hidden_size": 64, "moe_intermediate_size": 32},
    "gptoss-full-first": {"hidden_size": 64, "intermediate_size": 32},
    "deepseek3-plain": {
        "hidden_size": 64,
        "moe_intermediate_size": 32,
        "kv_lora_rank": 32,
        "q_lora_rank": 32,
    },
    "gemma3-plain": {"hidden_size": 64, "intermediate_size": 64, "query_pre_attn_scalar": 10},
}


@pytest.mark.parametrize("name", SMALLER)
def test_llama_cpp_opens_eight_bits(name, tmp_path):
    """The weights are those that are read again here. llama.cpp rounds activations to 8 bits too, which may change the
    choice of an expert: half of the tokens are held to the bound."""
    model, tokens = random_model(name, SMALLER[name])
    file = tmp_path / "model.gguf"
    maxstack.save(model, TOKENIZER, file, format="gguf", dtype="q8_0")
    again, _ = maxstack.load(file, dtype="float32")
    theirs = np.asarray([logits for _, logits in llama_cpp(file, tokens.tolist())])
    ours = np.asarray(jax.jit(lambda model, tokens: model(tokens))(again, jnp.asarray(tokens)))
    apart = np.abs(theirs - ours).max(-1) / np.abs(ours).max()
    print(f"{name}: {np.median(apart):.2g}, at most {apart.max():.2g}")
    assert np.median(apart) < 0.05


def test_every_row_of_the_table_is_computed():
    assert {case.architecture for case in CASES} == {row.name for row in ARCHITECTURES}
