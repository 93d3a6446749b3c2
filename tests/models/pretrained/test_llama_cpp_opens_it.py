"""GGUF files written here give llama.cpp the same tokens, for the packaged real model.

Needs a Python with llama-cpp-python, named by MAXSTACK_LLAMA_PYTHON (it builds from source, in minutes);
`make test-oracle LLAMA_PYTHON=…` runs it.
"""

import json
import os
import subprocess

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import maxstack

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
model = Llama(file, n_ctx=256, logits_all=True, verbose=False, type_k=0, type_v=0)
for prompt in prompts:
    model.reset()
    ids = model.tokenize(prompt.encode(), add_bos=False, special=True)
    model.eval(ids)
    print(json.dumps([ids, np.asarray(model.scores[len(ids) - 1], np.float64).tolist()]))
"""


@pytest.mark.parametrize("dtype", BOUNDS)
def test_llama_cpp_gives_the_same_tokens_and_log_probabilities(dtype, tmp_path):
    model, tokenizer = maxstack.load("smollm2-135m-instruct")
    file = tmp_path / "model.gguf"
    maxstack.save(model, tokenizer, file, format="gguf", dtype=dtype)
    done = subprocess.run(
        [str(PYTHON), "-c", SCRIPT],
        input=json.dumps([str(file), PROMPTS]),
        text=True,
        check=True,
        capture_output=True,
    )
    worst = 0.0
    for prompt, line in zip(PROMPTS, done.stdout.strip().splitlines(), strict=True):
        ids, logits = json.loads(line)
        assert ids == tokenizer.encode(prompt)
        theirs = np.asarray(jax.nn.log_softmax(jnp.asarray(logits)))
        ours = np.asarray(jax.nn.log_softmax(model(jnp.asarray([ids]))[0, -1]))
        top = np.argsort(-ours)[:10]
        assert theirs.argmax() == top[0]
        worst = max(worst, float(np.abs(theirs - ours)[top].max()))
    print(f"{dtype}: {worst:.2g}")
    assert worst < BOUNDS[dtype]
