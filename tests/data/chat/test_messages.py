"""Messages in OpenAI's shape; what is wrong with one is named, with its place."""

import re

import pytest

from maxstack.config import UserError
from maxstack.data.chat.messages import checked_messages, checked_tools

USER = {"role": "user", "content": "Hi"}


def call(**function) -> dict:
    return {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": function}]}


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ("Hi", "must be a list of messages, not str"),
        ({"role": "user"}, "must be a list"),
        ([], "no messages"),
        (["Hi"], r"messages\[0\] must be an object"),
        ([{"role": "bot", "content": ""}], r"messages\[0\] has role 'bot'; roles are system"),
        ([{"content": "x"}], "role None"),
        ([USER, {"role": "assistant"}], r"messages\[1\] has no content"),
        ([{"role": "user", "content": 3}], "content must be text, not int"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}], "is image_url: only text"),
        ([{"role": "user", "content": [{"type": "input_audio"}]}], "input_audio"),
        ([{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "odd"}]}], r"content\[1\] must be"),
        ([{"role": "user", "content": [{"type": "text"}]}], r"content\[0\].text must be text"),
        ([{**USER, "weight": 0.5}], "has weight, which is not supported"),
        ([{**USER, "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}], "only an assistant calls tools"),
        ([{**USER, "reasoning_content": "x"}], "only an assistant"),
        ([{"role": "assistant", "content": "", "reasoning_content": 3}], "reasoning_content must be text"),
        ([call(name="f", arguments="{'a': 1}")], r"tool_calls\[0\].function.arguments is not JSON"),
        ([call(name="f", arguments="[1]")], "must be a JSON object"),
        ([call(name="f", arguments={"a": {1, 2}})], "not plain JSON"),
        ([call(name="f")], "must be a JSON object, got None"),
        ([call(name="", arguments={})], r"tool_calls\[0\] must be"),
        ([{"role": "assistant", "tool_calls": "f()"}], "must be a list of calls"),
        ([{"role": "assistant", "tool_calls": [{"type": "custom", "name": "f", "arguments": {}}]}], "only function"),
        ([{"role": "tool", "content": "x", "tool_call_id": 3}], "tool_call_id must be text"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named(messages, words):
    with pytest.raises(UserError, match=words):
        checked_messages(messages)


@pytest.mark.parametrize(
    ("tools", "words"),
    [
        ("f", "must be a list"),
        ([{"type": "function", "function": {}}], re.escape("tools[0] must be")),
        ([{"type": "web_search", "function": {"name": "f"}}], "only function"),
        ([{"type": "function", "function": {"name": "f", "parameters": {"a": object()}}}], "not plain JSON"),
    ],
)
def test_what_is_wrong_with_a_tool_is_named(tools, words):
    with pytest.raises(UserError, match=words):
        checked_tools(tools)


def test_forms_that_mean_the_same_become_the_same():
    [plain] = checked_messages([USER])
    [parts] = checked_messages(
        [{"role": "user", "content": [{"type": "text", "text": "H"}, {"type": "text", "text": "i"}]}]
    )
    assert plain == parts == USER
    [as_text] = checked_messages([call(name="f", arguments='{"a": 1}')])
    [as_object] = checked_messages([call(name="f", arguments={"a": 1})])
    [bare] = checked_messages(
        [{"role": "assistant", "content": None, "tool_calls": [{"name": "f", "arguments": {"a": 1}}]}]
    )
    assert as_text == as_object == bare
    [thought] = checked_messages([{"role": "assistant", "content": "", "reasoning": "hm"}])
    assert thought["reasoning_content"] == thought["thinking"] == "hm"
    schema = {"name": "f", "parameters": {}}
    assert checked_tools([schema]) == checked_tools([{"type": "function", "function": schema}])
    assert checked_tools([]) is None


def test_nothing_of_the_callers_is_changed_and_halves_of_surrogates_are_mended():
    given = [
        {"role": "user", "content": "a\ud83dz", "name": None},
        call(name="f", arguments={"a": ["\ud83d"]}),
    ]
    before = repr(given)
    done = checked_messages(given)
    assert repr(given) == before
    assert done[0] == {"role": "user", "content": "a�z"}
    assert done[1]["tool_calls"][0]["function"]["arguments"] == {"a": ["�"]}
