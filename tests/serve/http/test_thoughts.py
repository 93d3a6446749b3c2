"""Models that think first: their thoughts are free and counted, and the form binds what comes after."""

import dataclasses
import json

import pytest
import tokenizers

from maxstack.data.chat import renderer_for
from maxstack.data.tokenizer import Tokenizer, byte_tokenizer
from maxstack.serve.constrain import Constraint
from maxstack.serve.http.manner import Manner, manner_of, with_tools_told
from maxstack.serve.http.thoughts import ThoughtTokens
from maxstack.serve.plan import Limits
from tests.serve.http.serving import SETTINGS, TEMPLATE, client_of, served, tiny_engine
from tests.serve.http.test_chat import HI, SCHEMA, TOOLS

TAGS = ("<think>", "</think>")
BEGIN, END = 257, 258
ONE = Limits(
    rows=1, page=8, pages=128, max_length=1024, chunks=((1, 64),), steps=(1,), tokens_a_step=72, waiting=4
)  # fmt: skip
CALLS = "{# <tool_call> </tool_call> #}"
OPENED = CALLS + TEMPLATE.replace("a:{% endif %}", "a:<think>{% endif %}") + "{# </think> #}"
FREE = CALLS + TEMPLATE + "{# <think></think> #}"
BARE = "{% for m in messages %}{{ m.role[0] }}:{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}a:{% endif %}"


def thinker() -> Tokenizer:
    """Bytes, and two tokens more for thoughts."""
    inner = tokenizers.Tokenizer.from_str(byte_tokenizer().inner.to_str())
    inner.add_special_tokens([tokenizers.AddedToken(tag, special=True) for tag in TAGS])
    return Tokenizer(inner.to_str(), {"eos_token": byte_tokenizer().token(256)})


@pytest.fixture(scope="module")
def engine():
    engine = tiny_engine(thinker(), ONE, buckets=(1,))
    yield engine
    engine.close()


# Of what may come next the random model says the tags first.
THINKING = {
    "model": "tiny", "messages": HI, "seed": 5, "max_tokens": 150, "logit_bias": {f"{BEGIN}": 100, f"{END}": 90},
    "extra_body": {"return_token_ids": True},
}  # fmt: skip
FORM = {"type": "json_schema", "json_schema": {"name": "shirt", "schema": SCHEMA}}


@pytest.mark.parametrize(("template", "marks"), [(OPENED, [END]), (FREE, [BEGIN, END])])
def test_a_form_binds_behind_the_thoughts(engine, template, marks):
    with served(engine, dataclasses.replace(SETTINGS, chat_template=template)) as url:
        client = client_of(url)
        done = client.chat.completions.create(**THINKING, response_format=FORM)
        assert done.choices[0].token_ids[: len(marks)] == marks
        assert {*json.loads(done.choices[0].message.content)} == {"size", "sure"}
        assert done.usage.completion_tokens_details.reasoning_tokens == len(marks)
        [choice] = client.chat.completions.create(**THINKING, tools=TOOLS, tool_choice="required").choices
        assert choice.token_ids[: len(marks)] == marks
        assert choice.message.tool_calls[0].function.name in ("lamp", "fan")
        answer = client.responses.create(
            model="tiny", input="hi", max_output_tokens=150,
            text={"format": {"type": "json_schema", "name": "shirt", "schema": SCHEMA}},
            extra_body={"logit_bias": THINKING["logit_bias"], "seed": 5},
        )  # fmt: skip
        assert {*json.loads(answer.output_text)} == {"size", "sure"}
        assert answer.usage.output_tokens_details.reasoning_tokens == len(marks)


def test_thoughts_are_counted_in_streams_too(engine):
    with served(engine, dataclasses.replace(SETTINGS, chat_template=OPENED)) as url:
        asking = {"model": "tiny", "messages": HI, "max_tokens": 6, "logit_bias": {"97": 100}}
        told = client_of(url).chat.completions.create(**asking)
        assert told.usage.completion_tokens_details.reasoning_tokens == 6
        *_, last = client_of(url).chat.completions.create(
            **asking, stream=True, stream_options={"include_usage": True}
        )
        assert last.usage.completion_tokens_details.reasoning_tokens == 6


@pytest.mark.parametrize(
    ("prompt", "said", "count"),
    [
        ("a:", "<think>ab</think>cd", 17),
        ("a:<think>\n", "ab</think>cd", 10),
        ("a:", "ab<think>cd</think>", 0),
        ("a:", "<thin", 0),
        ("a:<think>", "abc", 3),
    ],
)
def test_tokens_of_thoughts_are_counted_with_their_tags_and_no_others(prompt, said, count):
    counter = ThoughtTokens(byte_tokenizer(), TAGS, prompt)
    assert sum(counter.take([byte]) for byte in said.encode()) == count
    assert ThoughtTokens(byte_tokenizer(), TAGS, prompt).take(said.encode()) == count


@pytest.mark.parametrize(
    ("prompt", "bound"),
    [
        ("a:<think>\n", Constraint("regex", "5", after="</think>")),
        ("a:", Constraint("regex", "5", after="</think>", opening="<think>")),
        ("a:<think>\n\n</think>\n\n", Constraint("regex", "5")),
    ],
)
def test_where_a_form_begins_is_seen_by_the_prompt(prompt, bound):
    manner = manner_of(renderer_for(byte_tokenizer(), OPENED), byte_tokenizer(), None)
    assert manner.bound(Constraint("regex", "5"), prompt) == bound
    plain = Manner(manner.style, None, has_tools=True)
    assert plain.bound(Constraint("regex", "5"), prompt) == Constraint("regex", "5")


def test_a_named_parser_keeps_the_thoughts_of_the_template():
    renderer = renderer_for(byte_tokenizer(), OPENED)
    manner = manner_of(renderer, byte_tokenizer(), "llama3")
    assert (manner.style.name, manner.thoughts) == ("llama3", TAGS)


def test_a_call_can_be_required_of_a_template_that_knows_no_tools(engine):
    """Tools are told in the system message, calls are in Hermes' form, and a result goes back as text."""
    with served(engine, dataclasses.replace(SETTINGS, chat_template=BARE)) as url:
        client = client_of(url)
        asking = {"model": "tiny", "messages": HI, "seed": 5, "max_tokens": 120, "tools": TOOLS}
        [choice] = client.chat.completions.create(**asking, tool_choice="required").choices
        assert choice.finish_reason == "tool_calls"
        [call, *_] = choice.message.tool_calls
        assert isinstance(json.loads(call.function.arguments)["on"], bool)
        talk = [*HI, choice.message, {"role": "tool", "tool_call_id": call.id, "content": "done"}]
        assert client.chat.completions.create(**asking | {"messages": talk, "max_tokens": 1}).choices


def test_tools_are_told_and_calls_and_results_written_in_plain_messages():
    call = {"id": "1", "function": {"name": "lamp", "arguments": {"on": True}}}
    results = [{"role": "tool", "tool_call_id": f"{i}", "content": f"r{i}"} for i in range(2)]
    talk = [
        {"role": "system", "content": "Be kind."}, {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "Yes.", "tool_calls": [call, call]}, *results,
    ]  # fmt: skip
    system, user, assistant, told = with_tools_told(talk, TOOLS)
    assert system["content"].startswith("Be kind.\n\n")
    assert json.dumps(TOOLS[0]["function"]) in system["content"]
    assert user == talk[1]
    wanted = '<tool_call>\n{"name": "lamp", "arguments": {"on": true}}\n</tool_call>'
    assert assistant == {"role": "assistant", "content": f"Yes.\n{wanted}\n{wanted}"}
    assert told["role"] == "user"
    assert [told["content"].count(f"r{i}") for i in range(2)] == [1, 1]
