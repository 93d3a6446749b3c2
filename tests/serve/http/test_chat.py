"""/v1/chat/completions: messages of every role, tools, forms, log-probabilities, seeds, ends; whole and streamed."""

import dataclasses
import json

import openai
import pydantic
import pytest

from tests.serve.http import raw
from tests.serve.http.serving import LETTERS, SETTINGS, TEMPLATE, client_of, served

HI = [{"role": "user", "content": "hi"}]
ASK = {"model": "tiny", "messages": HI, "seed": 7, "logit_bias": LETTERS, "max_tokens": 8}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": name,
            "parameters": {
                "type": "object",
                "properties": {"on": {"type": "boolean"}},
                "required": ["on"],
                "additionalProperties": False,
            },
        },
    }
    for name in ("lamp", "fan")
]
SCHEMA = {
    "type": "object",
    "properties": {"size": {"enum": ["small", "large"]}, "sure": {"type": "boolean"}},
    "required": ["size", "sure"],
    "additionalProperties": False,
}
HERMES = "{# calls are <tool_call>{}</tool_call> #}" + TEMPLATE


@pytest.fixture(scope="module")
def caller(engine):
    """A client of a model whose template has calls."""
    with served(engine, dataclasses.replace(SETTINGS, chat_template=HERMES)) as url:
        yield client_of(url)


def prompt_of(url: str, **body) -> str:
    """What the model reads, as /tokenize has it."""
    answer = raw.post(url, body, path="/tokenize")
    assert answer.status == 200, answer.body
    return bytes(json.loads(answer.body)["tokens"]).decode()


def test_messages_of_every_role_and_form_are_rendered(url, client):
    call = {"id": "c1", "type": "function", "function": {"name": "lamp", "arguments": '{"on": true}'}}
    messages = [
        {"role": "developer", "content": "be brief"},
        {"role": "user", "content": [{"type": "text", "text": "turn "}, {"type": "text", "text": "on"}]},
        {"role": "assistant", "content": None, "tool_calls": [call], "refusal": None},
        {"role": "tool", "tool_call_id": "c1", "content": [{"type": "text", "text": "done"}]},
        {"role": "assistant", "content": "It is.", "reasoning_content": "hm"},
        {"role": "user", "content": "thanks", "name": "me"},
    ]
    text = prompt_of(url, messages=messages)
    assert text == 's:be brief\nu:turn on\na:[lamp {"on": true}]\nt:done\na:It is.\nu:thanks\na:'
    assert client.chat.completions.create(**ASK | {"messages": messages}).usage.prompt_tokens == len(text)


def test_the_last_message_can_be_gone_on_with(url, client):
    messages = [*HI, {"role": "assistant", "content": "well"}]
    going_on = {"continue_final_message": True, "add_generation_prompt": False}
    assert prompt_of(url, messages=messages, **going_on) == "u:hi\na:well"
    done = client.chat.completions.create(**ASK | {"messages": messages}, extra_body=going_on)
    assert done.usage.prompt_tokens == len("u:hi\na:well")


@pytest.mark.parametrize("kind", ["image_url", "input_audio", "file"])
def test_what_is_no_text_is_refused_by_its_place(client, kind):
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "see"}, {"type": kind, kind: {"url": "x"}}]}
    ]
    with pytest.raises(openai.BadRequestError, match=kind) as failed:
        client.chat.completions.create(**ASK | {"messages": messages})
    assert failed.value.param == "messages[0].content[1]"


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": "x", "wibble": 1}]}, "messages[0].wibble"),
        ({"messages": [{"role": "user", "content": "x", "tool_calls": []}], "n": "2"}, "n"),
        ({"top_logprobs": 21, "logprobs": True}, "top_logprobs"),
        ({"stop": ["a"] * 17}, "stop"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"store": True}, "store"),
        ({"n": 2, "extra_body": {"best_of": 3}, "stream": True}, "best_of"),
        ({"tools": [{"type": "function", "function": {"name": "bad name"}}]}, "tools[0].function.name"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema.schema"),
        ({"extra_body": {"priority": 101}}, "priority"),
        ({"temperature": True}, "temperature"),
    ],
)
def test_what_is_wrong_is_named(client, changes, param):
    with pytest.raises(openai.BadRequestError) as failed:
        client.chat.completions.create(**ASK | changes)
    assert failed.value.param == param


def test_logprobs_are_one_a_token_whole_and_streamed(client):
    asking = ASK | {"logprobs": True, "top_logprobs": 3}
    [whole] = client.chat.completions.create(**asking).choices
    found = whole.logprobs.content
    assert "".join(one.token for one in found) == whole.message.content
    assert all(bytes(one.bytes).decode() == one.token for one in found)
    assert {len(one.top_logprobs) for one in found} == {3}
    assert all(one.top_logprobs[0].logprob >= one.logprob for one in found)
    streamed = [
        one
        for chunk in client.chat.completions.create(**asking, stream=True)
        if chunk.choices[0].logprobs
        for one in chunk.choices[0].logprobs.content
    ]
    assert streamed == found
    assert client.chat.completions.create(**ASK).choices[0].logprobs is None


def test_the_same_seed_says_the_same_and_none_something_else(client):
    first, again = (client.chat.completions.create(**ASK).choices[0].message.content for _ in range(2))
    assert first == again
    free = ASK | {"seed": None}
    assert len({client.chat.completions.create(**free).choices[0].message.content for _ in range(3)}) > 1


def test_an_end_token_ends_and_can_be_put_off(client):
    ending = ASK | {"logit_bias": {"256": 100.0}}
    done = client.chat.completions.create(**ending)
    assert (done.choices[0].message.content, done.choices[0].finish_reason) == ("", "stop")
    later = client.chat.completions.create(**ending, extra_body={"min_tokens": 3})
    assert (later.usage.completion_tokens, later.choices[0].finish_reason) == (3, "stop")
    never = client.chat.completions.create(**ending, extra_body={"ignore_eos": True})
    assert (never.usage.completion_tokens, never.choices[0].finish_reason) == (8, "length")
    whole = client.chat.completions.create(**ASK).choices[0].message.content
    cut = client.chat.completions.create(**ASK, extra_body={"stop_token_ids": [ord(whole[4])]})
    assert cut.choices[0].message.content == whole[: whole.index(whole[4])]


def test_the_usage_so_far_is_in_each_chunk_where_asked_for(client):
    options = {"include_usage": True, "continuous_usage_stats": True}
    chunks = list(client.chat.completions.create(**ASK, stream=True, stream_options=options))
    counts = [chunk.usage.completion_tokens for chunk in chunks]
    assert counts == sorted(counts)
    assert counts[-1] == 8


def test_events_are_as_openai_writes_them(url):
    answer = raw.post(url, ASK | {"stream": True}, path="/v1/chat/completions")
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert answer.headers["cache-control"] == "no-cache"
    events = answer.body.split(b"\n\n")
    assert events[-2:] == [b"data: [DONE]", b""]
    chunks = [json.loads(event.removeprefix(b"data: ")) for event in events[:-2]]
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert (chunks[-1]["choices"][0]["delta"], chunks[-1]["choices"][0]["finish_reason"]) == ({}, "length")
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert not any("usage" in chunk for chunk in chunks)


def free(**changes):
    """Without the bias, which a form does not need."""
    return {"model": "tiny", "messages": HI, "seed": 5, "max_tokens": 120} | changes


def test_an_answer_fits_its_schema(client):
    class Shirt(pydantic.BaseModel):
        size: str
        sure: bool

    form = {"type": "json_schema", "json_schema": {"name": "shirt", "strict": True, "schema": SCHEMA}}
    done = client.chat.completions.create(**free(response_format=form))
    assert done.choices[0].finish_reason == "stop"
    assert {*json.loads(done.choices[0].message.content)} == {"size", "sure"}
    parsed = client.chat.completions.parse(**free(response_format=Shirt, max_tokens=200)).choices[0]
    assert parsed.finish_reason == "length" or isinstance(parsed.message.parsed, Shirt)
    text = client.responses.create(
        model="tiny", input="hi", text={"format": {"type": "json_schema", "name": "shirt", "schema": SCHEMA}}
    ).output_text
    assert {*json.loads(text)} == {"size", "sure"}


@pytest.mark.parametrize(
    ("form", "fits"),
    [
        ({"guided_choice": ["yes", "no"]}, lambda text: text in ("yes", "no")),
        ({"guided_regex": "[0-9]{3}-[ab]+"}, lambda text: text[:3].isdigit()),
        ({"guided_json": SCHEMA}, lambda text: {*json.loads(text)} == {"size", "sure"}),
        ({"guided_grammar": 'start: "left" | "right"'}, lambda text: text in ("left", "right")),
        ({"structured_outputs": {"choice": ["up"]}}, lambda text: text == "up"),
    ],
)
def test_answers_have_the_form_that_was_asked_for(client, form, fits):
    for stream in (False, True):
        done = client.chat.completions.create(**free(stream=stream, extra_body=form))
        text = (
            "".join(chunk.choices[0].delta.content or "" for chunk in done)
            if stream
            else done.choices[0].message.content
        )
        assert fits(text), text
    completed = client.completions.create(model="tiny", prompt="x", max_tokens=120, seed=1, extra_body=form)
    assert fits(completed.choices[0].text)


@pytest.mark.parametrize(
    ("form", "param"),
    [
        ({"guided_regex": "((("}, "guided_regex"),
        ({"guided_json": {"type": "wibble"}}, "guided_json"),
        ({"guided_grammar": "start: ("}, "guided_grammar"),
        ({"guided_choice": ["a"], "guided_regex": "b"}, "guided_choice"),
        ({"response_format": {"type": "json_object"}, "guided_choice": ["a"]}, "guided_choice"),
    ],
)
def test_a_bad_form_is_one_400_that_names_it(client, engine, form, param):
    with pytest.raises(openai.BadRequestError) as failed:
        client.chat.completions.create(**free(extra_body=form))
    assert failed.value.param == param
    assert engine.dead is None


@pytest.mark.parametrize("stream", [False, True])
def test_a_required_call_is_made(caller, stream):
    asking = free(tools=TOOLS, tool_choice="required", parallel_tool_calls=False)
    if stream:
        with caller.chat.completions.stream(**asking) as events:
            [choice] = events.get_final_completion().choices
    else:
        [choice] = caller.chat.completions.create(**asking).choices
    assert choice.finish_reason == "tool_calls"
    [call] = choice.message.tool_calls
    assert call.function.name in ("lamp", "fan")
    assert isinstance(json.loads(call.function.arguments)["on"], bool)


def test_a_named_call_is_that_one_and_goes_back_with_its_result(caller):
    named = {"type": "function", "function": {"name": "fan"}}
    [choice] = caller.chat.completions.create(**free(tools=TOOLS, tool_choice=named)).choices
    [call] = choice.message.tool_calls
    assert call.function.name == "fan"
    talk = [*HI, choice.message, {"role": "tool", "tool_call_id": call.id, "content": "ok"}]
    assert caller.chat.completions.create(**ASK | {"messages": talk}, tools=TOOLS).choices[0].message.content
    by_response = caller.responses.create(
        model="tiny",
        input="hi",
        tools=[{"type": "function", **TOOLS[1]["function"]}],
        tool_choice={"type": "function", "name": "fan"},
        max_output_tokens=120,
    )
    assert [(item.type, item.name) for item in by_response.output] == [("function_call", "fan")]


@pytest.mark.parametrize("stream", [False, True])
def test_calls_are_told_from_text(caller, stream):
    """The model says what it is made to say, its own affair otherwise."""
    said = 'I call<tool_call>{"name": "lamp", "arguments": {"on": true}}</tool_call>'
    asking = free(tools=TOOLS, extra_body={"guided_choice": [said]})
    if not stream:
        message = caller.chat.completions.create(**asking).choices[0].message
        assert message.tool_calls[0].function.arguments == '{"on": true}'
        assert "I call" in message.content
        return
    with caller.chat.completions.stream(**asking) as events:
        [choice] = events.get_final_completion().choices
    assert choice.message.tool_calls[0].function.name == "lamp"
    assert choice.finish_reason == "tool_calls"


def test_reasoning_is_told_from_the_answer_of_a_model_that_opens_it(engine):
    template = TEMPLATE.replace("a:{% endif %}", "a:<think>{% endif %}") + "{# </think> #}"
    with served(engine, dataclasses.replace(SETTINGS, chat_template=template)) as url:
        client = client_of(url)
        [choice] = client.chat.completions.create(**ASK).choices
        assert len(choice.message.reasoning_content) == 8
        assert not choice.message.content
        chunks = client.chat.completions.create(**ASK, stream=True)
        said = "".join(getattr(chunk.choices[0].delta, "reasoning_content", None) or "" for chunk in chunks)
        assert said == choice.message.reasoning_content
        done = client.responses.create(model="tiny", input="hi", max_output_tokens=8)
        assert done.output[0].type == "reasoning"


def test_a_model_without_a_template_completes_and_does_not_chat(engine):
    with served(engine, dataclasses.replace(SETTINGS, chat_template=None)) as url:
        answer = raw.post(url, ASK, path="/v1/chat/completions")
        assert (answer.status, answer.error["code"]) == (400, "no_chat_template")
        assert raw.post(url, {"prompt": "x", "max_tokens": 1}).status == 200
