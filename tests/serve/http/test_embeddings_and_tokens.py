"""Embeddings, and text to tokens and back."""

import asyncio
import json

import numpy as np
import openai
import pytest

from tests.serve.http import raw
from tests.serve.http.serving import settle

SENTENCES = ["the cat", "a much longer sentence about nothing in particular"]


@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_embeddings_are_the_engines_of_length_one(client, engine, pooling):
    done = client.embeddings.create(model="tiny", input=SENTENCES, extra_body={"pooling": pooling})
    for text, one in zip(SENTENCES, done.data, strict=True):
        wanted = asyncio.run(engine.embed(text, pooling)).vector
        # float32 of another batch's sums
        np.testing.assert_allclose(one.embedding, wanted / np.linalg.norm(wanted), atol=1e-5)
    assert [one.index for one in done.data] == [0, 1]
    assert done.usage.prompt_tokens == sum(len(text) + 1 for text in SENTENCES)


def test_base64_and_floats_and_tokens_are_the_same(client, url):
    ids = [256, *b"the cat"]
    by_client = client.embeddings.create(model="tiny", input=[ids]).data[0].embedding  # base64 on the way
    body = {"model": "tiny", "input": "the cat", "encoding_format": "float"}
    answer = json.loads(raw.post(url, body, path="/v1/embeddings").body)
    np.testing.assert_allclose(answer["data"][0]["embedding"], by_client, atol=1e-6)
    longer = (
        client.embeddings.create(model="tiny", input="the cat", extra_body={"normalize": False})
        .data[0]
        .embedding
    )
    assert abs(np.linalg.norm(longer) - 1) > 1e-3


def test_fewer_dimensions_are_refused_with_the_number(client):
    with pytest.raises(openai.BadRequestError, match="dimensions: this model's vectors have"):
        client.embeddings.create(model="tiny", input="x", dimensions=3)
    with pytest.raises(openai.BadRequestError, match="256"):
        client.embeddings.create(model="tiny", input="x" * 300)


def test_a_deadline_that_passes_is_504_for_vectors_too(url, engine):
    body = {"model": "tiny", "input": ["x" * 200] * 8, "timeout_s": 0.0001}
    answer = raw.post(url, body, path="/v1/embeddings")
    assert (answer.status, answer.error["code"]) == (504, "deadline_exceeded")
    settle(engine)


def test_tokens_of_text_and_of_messages_and_back(url):
    def told(path, body):
        answer = raw.post(url, body, path=path)
        assert answer.status == 200, answer.body
        return json.loads(answer.body)

    text = told("/tokenize", {"prompt": "né", "return_token_strs": True})
    assert text["tokens"] == [256, *"né".encode()]
    assert (text["count"], text["max_model_len"]) == (4, 256)
    assert text["token_strs"] == ["<|endoftext|>", "n", "\ufffd", "\ufffd"]
    assert told("/tokenize", {"prompt": "né", "add_special_tokens": False})["count"] == 3
    # as lm-eval asks for the end token's id
    assert told("/tokenize", {"prompt": "<|endoftext|>", "add_special_tokens": False})["tokens"] == [256]
    chat = told("/tokenize", {"messages": [{"role": "user", "content": "hi"}]})
    assert bytes(chat["tokens"]) == b"u:hi\na:"
    assert told("/detokenize", {"tokens": text["tokens"]})["prompt"] == "<|endoftext|>né"
    assert raw.post(url, {"tokens": [9999]}, path="/detokenize").status == 400
    assert raw.post(url, {}, path="/tokenize").status == 400
    info = raw.ask(url, b"", path="/tokenizer_info", method="GET")
    assert json.loads(info.body)["eos_token_id"] == 256
