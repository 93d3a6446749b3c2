"""/v1/responses by the unmodified client: whole, streamed, with items of earlier turns, and nothing stored."""

import openai
import pytest

from maxstack.serve.http.items import messages_of
from maxstack.serve.http.said import CallArguments, CallStart, Reasoning, Text
from maxstack.serve.http.schemas.responses import Item
from maxstack.serve.http.written import Written
from tests.serve.http.serving import LETTERS

ASK = {
    "model": "tiny",
    "input": "hi",
    "max_output_tokens": 9,
    "extra_body": {"seed": 7, "logit_bias": LETTERS},
}


def test_an_input_is_answered_like_the_chat_that_it_is(client):
    chat = client.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": "hi"}], max_tokens=9, seed=7, logit_bias=LETTERS
    )
    done = client.responses.create(**ASK)
    assert done.output_text == chat.choices[0].message.content
    assert (done.status, done.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    assert (done.usage.input_tokens, done.usage.output_tokens) == (7, 9)
    assert (done.object, done.store, done.error) == ("response", False, None)


def test_a_stream_adds_up_to_the_response(client):
    whole = client.responses.create(**ASK)
    with client.responses.stream(**ASK) as stream:
        events = list(stream)
    kinds = [event.type for event in events]
    assert kinds[:4] == [
        "response.created", "response.in_progress", "response.output_item.added", "response.content_part.added",
    ]  # fmt: skip
    assert kinds[-4:] == [
        "response.output_text.done", "response.content_part.done", "response.output_item.done", "response.incomplete",
    ]  # fmt: skip
    said = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    assert said == whole.output_text == events[-1].response.output_text
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert events[-1].response.usage.output_tokens == 9


def test_what_ends_by_itself_is_completed(client):
    body = ASK["extra_body"] | {"logit_bias": {"256": 100}}
    with client.responses.stream(**ASK | {"extra_body": body}) as stream:
        final = stream.get_final_response()
    assert (final.status, final.output) == ("completed", [])


def test_text_has_logprobs_where_they_are_included(client):
    done = client.responses.create(**ASK, include=["message.output_text.logprobs"], top_logprobs=2)
    [item] = done.output
    found = item.content[0].logprobs
    assert "".join(one.token for one in found) == done.output_text
    assert {len(one.top_logprobs) for one in found} == {2}


def test_items_of_a_turn_become_one_message():
    items = [
        {
            "role": "user",
            "content": [{"type": "input_text", "text": "what"}, {"type": "input_text", "text": "?"}],
        },
        {
            "type": "reasoning",
            "id": "rs",
            "summary": [],
            "content": [{"type": "reasoning_text", "text": "hm"}],
        },
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "look"}]},
        {"type": "function_call", "call_id": "c1", "name": "f", "arguments": "{}"},
        {"type": "function_call", "call_id": "c2", "name": "g", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "c1", "output": "1"},
        {"type": "function_call_output", "call_id": "c2", "output": [{"type": "input_text", "text": "2"}]},
        {"role": "assistant", "content": "so"},
    ]
    messages = messages_of([Item.model_validate(item) for item in items])
    assert [message["role"] for message in messages] == ["user", "assistant", "tool", "tool", "assistant"]
    assert messages[0]["content"] == "what?"
    assert (messages[1]["content"], messages[1]["reasoning_content"]) == ("look", "hm")
    assert [call["id"] for call in messages[1]["tool_calls"]] == ["c1", "c2"]
    assert (messages[3]["tool_call_id"], messages[3]["content"]) == ("c2", "2")


@pytest.mark.parametrize("cut", [1, 3, 100])
def test_events_of_thoughts_text_and_calls_add_up_to_the_items(cut):
    """However the pieces are cut: as openai's own accumulation has it."""
    from openai.lib.streaming.responses._responses import ResponseStreamState
    from openai.types.responses import Response, ResponseStreamEvent
    from pydantic import TypeAdapter

    def pieces():
        for kind, text in ((Reasoning, "let me think"), (Text, "I look")):
            for i in range(0, len(text), cut):
                yield kind(text[i : i + cut])
        for index in range(2):
            yield CallStart(index, f"call{index}", "f")
            for i in range(0, 9, cut):
                yield CallArguments(index, '{"a":"b"}'[i : i + cut])

    written = Written()
    told = [*written.take(pieces(), []), *written.finish("completed")]
    state, adapter = (
        ResponseStreamState(input_tools=[], text_format=openai.omit),
        TypeAdapter(ResponseStreamEvent),
    )
    base = {"id": "r", "object": "response", "created_at": 0, "model": "m", "parallel_tool_calls": True}
    base |= {"tool_choice": "auto", "tools": []}
    whole = [
        {"type": "response.created", "response": base | {"output": []}}, *told,
        {"type": "response.completed", "response": base | {"output": written.items}},
    ]  # fmt: skip
    for number, event in enumerate(whole):
        state.handle_event(adapter.validate_python(event | {"sequence_number": number}))
    done = Response.model_validate(base | {"output": written.items})
    assert [item.type for item in done.output] == ["reasoning", "message", "function_call", "function_call"]
    assert done.output[0].content[0].text == "let me think"
    assert done.output_text == "I look"
    assert [item.arguments for item in done.output[2:]] == ['{"a":"b"}'] * 2
    assert {item.status for item in done.output} == {"completed"}


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"conversation": "conv_1"}, "conversation"),
        ({"background": True}, "background"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0].type"),
        (
            {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]},
            "input[0].content[0]",
        ),
        ({"input": [{"type": "function_call", "name": "f"}]}, "input[0].arguments"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"input": []}, "input"),
        ({"truncation": "auto"}, "truncation"),
    ],
)
def test_what_is_not_done_here_is_refused_by_name(client, changes, param):
    with pytest.raises(openai.BadRequestError) as failed:
        client.responses.create(**ASK | changes)
    assert failed.value.param == param


def test_nothing_is_stored(client):
    assert client.responses.create(**ASK, store=True).store is False
    with pytest.raises(openai.NotFoundError, match="stored"):
        client.responses.retrieve("resp_1")
