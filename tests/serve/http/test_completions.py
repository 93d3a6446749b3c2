"""/v1/completions: prompts of every form, echo, scores, and what lm-eval's local-completions asks and reads."""

import dataclasses

import openai
import pytest

from maxstack.models.generation import SamplingParams
from tests.serve.http.serving import LETTERS

ASK = {"model": "tiny", "seed": 3, "max_tokens": 8, "logit_bias": LETTERS}
END = 256


def test_text_is_completed_whole_and_as_a_stream(client):
    whole = client.completions.create(prompt=["one", "two"], **ASK)
    assert [choice.index for choice in whole.choices] == [0, 1]
    assert whole.usage.prompt_tokens == 2 * (1 + 3)
    streamed = ["", ""]
    for chunk in client.completions.create(prompt=["one", "two"], stream=True, **ASK):
        streamed[chunk.choices[0].index] += chunk.choices[0].text
    assert streamed == [choice.text for choice in whole.choices]


def test_the_four_forms_of_a_prompt_are_one(client):
    ids = [END, *b"one"]
    forms = ["one", ["one"], ids, [ids]]
    texts = [client.completions.create(prompt=prompt, **ASK).choices[0].text for prompt in forms]
    assert len({*texts}) == 1
    assert len(texts[0]) == 8


def test_a_raw_prompt_may_name_special_tokens_and_begins_once(client):
    def told(**changes):
        extra = {"return_token_ids": True} | changes
        done = client.completions.create(prompt="<|endoftext|>a", **ASK, extra_body=extra)
        return done.choices[0].prompt_token_ids

    assert told() == [END, *b"a"]
    assert told(parse_special=False) == [END, *b"<|endoftext|>a"]
    assert told(parse_special=False, add_special_tokens=False) == [*b"<|endoftext|>a"]


def loglikelihood(client, prompt, **changes):
    """As lm-eval asks for it."""
    asking = {"model": "tiny", "temperature": 0, "max_tokens": 1, "logprobs": 1, "seed": 1234, "echo": True}
    return client.completions.create(prompt=prompt, **asking | changes)


def test_a_scored_prompt_has_an_entry_a_token_the_first_null_and_one_more(client, engine):
    prompts = [[END, *b"the cat"], [END, *b"sat"]]
    done = loglikelihood(client, prompts)
    for prompt, choice in zip(prompts, done.choices, strict=True):
        found = choice.logprobs
        lengths = {
            len(found.tokens),
            len(found.token_logprobs),
            len(found.top_logprobs),
            len(found.text_offset),
        }
        assert lengths == {len(prompt) + 1}
        assert (found.token_logprobs[0], found.top_logprobs[0]) == (None, None)
        assert found.tokens[1:-1] == [chr(token) for token in prompt[1:]]
        assert choice.text.startswith(bytes(prompt[1:]).decode())
        for value, top in zip(found.token_logprobs[1:], found.top_logprobs[1:], strict=True):
            assert len(top) == 1
            # lm-eval calls a token greedy where the two numbers are equal, to the last bit
            assert value <= max(top.values())
        assert found.token_logprobs[-1] == max(found.top_logprobs[-1].values())


def test_scores_are_the_models_own(client, engine):
    import jax
    import jax.numpy as jnp
    import numpy as np

    from tests.models.tiny import build
    from tests.serve.driven import CONFIG

    prompt = [END, *b"the cat sat"]
    found = loglikelihood(client, prompt).choices[0].logprobs
    logits = build(dataclasses.replace(CONFIG, vocab_size=257))(jnp.asarray([prompt]))
    wanted = jax.nn.log_softmax(logits[0])[np.arange(len(prompt) - 1), np.asarray(prompt[1:])]
    # Float32 sums over pages instead of the whole row.
    np.testing.assert_allclose(found.token_logprobs[1:-1], wanted, atol=1e-4)


def test_a_scored_prompt_has_its_last_entry_also_where_the_model_ends(client):
    """Without it, an evaluation drops the last token of the answer, and prints chance."""
    prompt = [END, *b"end"]
    done = loglikelihood(client, prompt, logit_bias={str(END): 100.0})
    assert len(done.choices[0].logprobs.token_logprobs) == len(prompt) + 1
    assert done.choices[0].logprobs.tokens[-1] == "<|endoftext|>"


def test_with_max_tokens_0_a_prompt_is_only_scored(client):
    prompt = [END, *b"only"]
    done = loglikelihood(client, prompt, max_tokens=0)
    scored = loglikelihood(client, prompt)
    [choice] = done.choices
    assert (choice.text, choice.finish_reason, done.usage.completion_tokens) == ("only", "length", 0)
    assert choice.logprobs.token_logprobs == scored.choices[0].logprobs.token_logprobs[:-1]
    with pytest.raises(openai.BadRequestError, match="only with echo"):
        loglikelihood(client, prompt, max_tokens=0, echo=False)


def test_offsets_point_at_the_tokens_and_a_stream_has_the_same_logprobs(client):
    asking = ASK | {"logprobs": 2, "echo": True, "prompt": "näh "}
    [whole] = client.completions.create(**asking).choices
    for token, offset in zip(whole.logprobs.tokens[-8:], whole.logprobs.text_offset[-8:], strict=True):
        assert whole.text[offset] == token
    parts = [chunk.choices[0] for chunk in client.completions.create(**asking, stream=True)]
    assert "".join(part.text for part in parts) == whole.text
    for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
        joined = [one for part in parts for one in getattr(part.logprobs, name)]
        assert joined == getattr(whole.logprobs, name)


def test_the_best_are_the_likeliest_of_all_that_were_tried(client):
    asking = ASK | {"prompt": "pick", "logprobs": 0}
    tried = client.completions.create(**asking, n=4).choices
    best = client.completions.create(**asking, n=2, best_of=4).choices
    by_sum = sorted(tried, key=lambda choice: -sum(choice.logprobs.token_logprobs))
    assert [choice.text for choice in best] == [choice.text for choice in by_sum[:2]]
    with pytest.raises(openai.BadRequestError, match="best_of"):
        client.completions.create(**ASK, prompt="pick", n=3, best_of=2)


def test_answers_are_those_of_the_engine(client, engine):
    import asyncio

    params = SamplingParams(
        max_tokens=8,
        temperature=1.0,
        seed=3,
        logit_bias=[(int(token), bias) for token, bias in LETTERS.items()],
    )
    whole = client.completions.create(prompt="same", **ASK).choices[0].text
    assert asyncio.run(engine.complete("same", params)).text == whole
    stop = whole[3:5]
    [stopped] = client.completions.create(prompt="same", **ASK, stop=[stop, "@"]).choices
    assert (stopped.text, stopped.finish_reason) == (whole[: whole.index(stop)], "stop")


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"suffix": "end"}, "suffix"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [[]]}, "prompt[0]"),
        ({"prompt": [1, "a"]}, "prompt[1]"),
        ({"prompt": [-1]}, "prompt[0]"),
        ({"n": 129}, "n"),
        ({"logprobs": 21}, "logprobs"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"n": 100, "max_tokens": 100_000}, "max_tokens"),
        ({"stop": [""]}, "stop[0]"),
    ],
)
def test_what_is_wrong_is_named(client, changes, param):
    with pytest.raises(openai.BadRequestError) as failed:
        client.completions.create(**ASK | {"prompt": "x"} | changes)
    assert failed.value.param == param


def test_a_prompt_that_is_too_long_is_told_with_the_numbers(client):
    with pytest.raises(openai.BadRequestError, match="256") as failed:
        client.completions.create(**ASK | {"prompt": "x" * 300})
    assert failed.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError, match="token id"):
        client.completions.create(**ASK | {"prompt": [100_000]})
