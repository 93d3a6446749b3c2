"""The unmodified openai client against a real server."""

import openai
import pytest

from tests.serve.http.serving import LETTERS, SETTINGS, served, settle

ASK = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "seed": 7, "logit_bias": LETTERS}


def test_a_chat_is_answered_and_counted(client):
    done = client.chat.completions.create(**ASK, max_tokens=9)
    [choice] = done.choices
    assert done.id.startswith("chatcmpl-")
    assert (done.object, done.model) == ("chat.completion", "tiny")
    assert choice.message.role == "assistant"
    assert len(choice.message.content) == 9
    assert choice.message.content.isalpha()
    assert choice.finish_reason == "length"
    assert done.usage.prompt_tokens == len("u:hi\na:")
    assert (done.usage.completion_tokens, done.usage.total_tokens) == (9, 16)


def test_a_stream_adds_up_to_the_answer(client, engine):
    whole = client.chat.completions.create(**ASK, max_tokens=12, n=3)
    chunks = list(
        client.chat.completions.create(
            **ASK, max_tokens=12, n=3, stream=True, stream_options={"include_usage": True}
        )
    )
    said = dict.fromkeys(range(3), "")
    ends = {}
    for chunk in chunks[:-1]:
        assert chunk.usage is None
        [choice] = chunk.choices
        said[choice.index] += choice.delta.content or ""
        assert choice.index not in ends, "something came after the end"
        if choice.finish_reason:
            ends[choice.index] = choice.finish_reason
    assert said == {choice.index: choice.message.content for choice in whole.choices}
    assert len({*said.values()}) == 3
    assert ends == dict.fromkeys(range(3), "length")
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == 36
    assert len({chunk.id for chunk in chunks}) == 1
    settle(engine)


def test_text_is_completed_whole_and_as_a_stream(client):
    asking = {"model": "tiny", "seed": 3, "max_tokens": 8, "logit_bias": LETTERS}
    whole = client.completions.create(prompt=["one", "two"], **asking)
    assert [choice.index for choice in whole.choices] == [0, 1]
    assert whole.usage.prompt_tokens == 2 * (1 + 3)
    streamed = ["", ""]
    for chunk in client.completions.create(prompt=["one", "two"], stream=True, **asking):
        streamed[chunk.choices[0].index] += chunk.choices[0].text
    assert streamed == [choice.text for choice in whole.choices]
    ids = client.completions.create(prompt=[256, *b"one"], **asking)
    assert ids.choices[0].text == whole.choices[0].text


def test_models_are_listed_and_others_are_not_found(client):
    assert [model.id for model in client.models.list()] == ["tiny", "gpt-tiny"]
    assert client.models.retrieve("gpt-tiny").root == "tiny"
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        client.models.retrieve("other")
    with pytest.raises(openai.NotFoundError) as failed:
        client.chat.completions.create(**ASK | {"model": "other"})
    assert (failed.value.code, failed.value.param) == ("model_not_found", "model")


def test_a_key_is_asked_for_everywhere_but_of_health(engine):
    import dataclasses

    settings = dataclasses.replace(SETTINGS, api_keys=("right", "other"))
    with served(engine, settings) as url:
        for key, fits in (("right", True), ("other", True), ("righ", False), ("", False)):
            client = openai.OpenAI(base_url=f"{url}/v1", api_key=key or "x", max_retries=0)
            if fits:
                assert client.models.list().data
            else:
                with pytest.raises(openai.AuthenticationError) as failed:
                    client.models.list()
                assert failed.value.code == "invalid_api_key"


def test_what_is_unknown_or_out_of_bounds_is_one_400_that_names_it(client):
    with pytest.raises(openai.BadRequestError) as failed:
        client.chat.completions.create(**ASK, extra_body={"wibble": 1})
    assert (failed.value.param, failed.value.code) == ("wibble", "unknown_parameter")
    with pytest.raises(openai.BadRequestError) as failed:
        client.chat.completions.create(
            **ASK | {"messages": [{"role": "user", "content": [{"type": "text"}]}]}
        )
    assert failed.value.param == "messages[0].content[0]"
    with pytest.raises(openai.BadRequestError) as failed:
        client.chat.completions.create(**ASK, temperature=3)
    assert failed.value.param == "temperature"
