"""Answers are taken apart alike however they come, and nothing of them is lost."""

import itertools
import json
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from maxstack.chat.parsing import (
    STYLES,
    CallArguments,
    CallStart,
    Reasoning,
    Text,
    joined,
    parser_for,
    style_for,
)
from maxstack.chat.parsing.json_value import Came, JsonValue
from maxstack.config import UserError

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
            },
        },
    },
    {"type": "function", "function": {"name": "now"}},
]
WEATHER = '{"city": "Zürich", "days": 1}'


def parsed(style: str, text: str, cuts=(), **options):
    parser = parser_for(style, ids=lambda: "id", **{"tools": TOOLS} | options)
    pieces = []
    for a, b in itertools.pairwise([0, *sorted(cuts), len(text)]):
        pieces += parser.feed(text[a:b])
    return joined(pieces + parser.end())


def call(index: int, name: str, arguments: str):
    start = CallStart(index, "id", name)
    return [start, CallArguments(index, arguments)] if arguments else [start]


def hermes(name: str, arguments: str) -> str:
    return f'<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>'


def llama(name: str, arguments: str) -> str:
    return f'{{"name": "{name}", "parameters": {arguments}}}'


def internlm(name: str, arguments: str) -> str:
    return f"<|action_start|><|plugin|>\n{llama(name, arguments)}<|action_end|>"


def coder(city: str, days: str) -> str:
    return (
        f"<tool_call>\n<function=get_weather>\n<parameter=city>\n{city}\n</parameter>\n"
        f"<parameter=days>\n{days}\n</parameter>\n</function>\n</tool_call>"
    )


CASES = {
    "hermes: text, two calls, text": (
        "hermes",
        f"Let me see.\n{hermes('get_weather', WEATHER)}\n{hermes('now', '{}')}\nDone. ",
        [Text("Let me see."), *call(0, "get_weather", WEATHER), *call(1, "now", "{}"), Text("Done. ")],
    ),
    "hermes: the name comes last": (
        "hermes",
        '<tool_call>{"arguments": {"a": [1, "}"]}, "name": "f"}</tool_call>',
        call(0, "f", '{"a": [1, "}"]}'),
    ),
    "hermes: no arguments": ("hermes", '<tool_call>{"name": "f"}</tool_call>', call(0, "f", "{}")),
    "hermes: null for arguments": (
        "hermes", '<tool_call>{"name": "f", "arguments": null}</tool_call>', call(0, "f", "{}"),
    ),
    "hermes: arguments in a text": (
        "hermes", '<tool_call>{"name": "f", "arguments": "{\\"a\\": 1}"}</tool_call>', call(0, "f", '{"a": 1}'),
    ),
    "hermes: an end inside of a text": (
        "hermes",
        hermes("f", '{"a": "</tool_call>\\u00e9\\""}'),
        call(0, "f", '{"a": "</tool_call>\\u00e9\\""}'),
    ),
    "hermes: not closed": ("hermes", '<tool_call>{"name": "f", "arguments": {"a": 1}}', call(0, "f", '{"a": 1}')),
    "hermes: cut in the arguments": (
        "hermes", 'x<tool_call>{"name": "f", "arguments": {"a": "b', [Text("x"), *call(0, "f", '{"a": "b')],
    ),
    "hermes: cut in the name": ("hermes", '<tool_call>\n{"name": "f', [Text('<tool_call>\n{"name": "f')]),
    "hermes: cut in the mark": ("hermes", "a <tool_ca", [Text("a <tool_ca")]),
    "hermes: no JSON": ("hermes", "<tool_call>f()</tool_call> x", [Text("<tool_call>f()</tool_call> x")]),
    "hermes: no JSON, then a call": (
        "hermes", f"<tool_call>f{hermes('now', '{}')}", [Text("<tool_call>f"), *call(0, "now", "{}")],
    ),
    "hermes: wrong later on": (
        "hermes", '<tool_call>{"name": "f", "arguments": {"a": 1}, oh', [*call(0, "f", '{"a": 1}'), Text("oh")],
    ),
    "hermes: wrong inside": (
        "hermes", '<tool_call>{"name": "f", "arguments": {"a": oh', [*call(0, "f", '{"a": '), Text("oh")],
    ),
    "hermes: arguments that are none": (
        "hermes",
        '<tool_call>{"name": "f", "arguments": [1]}</tool_call>',
        [Text('<tool_call>{"name": "f", "arguments": [1]}</tool_call>')],
    ),
    "hermes: text only": ("hermes", "  a < b\n", [Text("  a < b\n")]),
    "hermes: nothing": ("hermes", "", []),
    "hermes: thoughts": (
        "{{ '<think></think>' }} <tool_call>",
        f"<think>\nA <tool_call>?\n</think>\n\n{hermes('now', '{}')}",
        [Reasoning("A <tool_call>?"), *call(0, "now", "{}")],
    ),
    "llama3: bare": ("llama3", llama("get_weather", WEATHER), call(0, "get_weather", WEATHER)),
    "llama3: marked": ("llama3", "<|python_tag|>" + llama("now", "{}"), call(0, "now", "{}")),
    "llama3: two": (
        "llama3",
        f"{llama('now', '{}')}; {llama('get_weather', WEATHER)}",
        [*call(0, "now", "{}"), *call(1, "get_weather", WEATHER)],
    ),
    "llama3: of type function": (
        "llama3", '{"type": "function", "name": "now", "parameters": {}}', call(0, "now", "{}"),
    ),
    "llama3: an answer in JSON": (
        "llama3", '{"name": "Bob", "parameters": {"a": 1}} ', [Text('{"name": "Bob", "parameters": {"a": 1}} ')],
    ),
    "llama3: other JSON": ("llama3", ' {"a": 1}', [Text(' {"a": 1}')]),
    "llama3: a program": ("llama3", "<|python_tag|>print(1)", [Text("<|python_tag|>print(1)")]),
    "llama3: text": ("llama3", "Hello {", [Text("Hello {")]),
    "llama3: text after a call": ("llama3", f"{llama('now', '{}')}\n; so", [*call(0, "now", "{}"), Text("; so")]),
    "internlm": (
        "internlm", f"I look.{internlm('get_weather', WEATHER)}\n", [Text("I look."), *call(0, "get_weather", WEATHER)],
    ),
    "internlm: a program": (
        "internlm", "<|action_start|><|interpreter|>\n1<|action_end|>",
        [Text("<|action_start|><|interpreter|>\n1<|action_end|>")],
    ),
    "qwen3-coder": (
        "qwen3-coder",
        "So:\n" + coder('Zü"rich\n a', "3"),
        [Text("So:"), *call(0, "get_weather", '{"city": "Zü\\"rich\\n a", "days": 3}')],
    ),
    "qwen3-coder: what is no number is text": (
        "qwen3-coder", coder("5", "some"), call(0, "get_weather", '{"city": "5", "days": "some"}'),
    ),
    "qwen3-coder: no parameters": (
        "qwen3-coder", "<tool_call>\n<function=now>\n</function>\n</tool_call>", call(0, "now", "{}"),
    ),
    "qwen3-coder: cut": (
        "qwen3-coder",
        "<tool_call><function=get_weather><parameter=city>\na\n</para",
        call(0, "get_weather", '{"city": "a\\n</para'),
    ),
    "qwen3-coder: JSON instead": (
        "qwen3-coder", hermes("now", "{}"), [Text(hermes("now", "{}"))],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_answers_are_taken_apart_however_they_are_cut(case):
    style, text, wanted = CASES[case]
    assert parsed(style, text) == wanted
    assert parsed(style, text, range(1, len(text))) == wanted
    for cut in range(1, len(text)):
        assert parsed(style, text, [cut]) == wanted


BITS = st.sampled_from(
    ["<tool_call>", "</tool_call>", "\n", " ", '{"name": "now", ', '"arguments": {}', '"parameters": ', "{", "}",
     '"a": "b"', ", ", "<function=now>", "<function=get_weather>", "<parameter=city>", "</parameter>", "</function>",
     "<|action_start|>", "<|plugin|>", "<|action_end|>", "<|python_tag|>", ";", "text", "é", "\\", '"', "1", "null",
     "<think>", "</think>", "[", "]", ":", WEATHER, hermes("now", "{}"), internlm("now", "{}"), coder("x", "1")]
)  # fmt: skip


@settings(max_examples=400, deadline=None, derandomize=True)
@given(bits=st.lists(BITS, max_size=12), style=st.sampled_from(sorted(STYLES)), data=st.data())
@example(bits=["{", ";", "{"], style="llama3", data=None)
def test_any_text_gives_the_same_pieces_in_any_partition_and_valid_beginnings(bits, style, data):
    text = "".join(bits)
    whole = parsed(style, text)
    assert parsed(style, text, range(1, len(text))) == whole
    if data is not None and text:
        cuts = data.draw(st.lists(st.integers(0, len(text)), max_size=5))
        assert parsed(style, text, cuts) == whole
    for piece in whole:
        if isinstance(piece, CallArguments):
            assert begins_json(piece.text)
        elif isinstance(piece, Text) and style != "llama3":
            assert piece.text in text or len(whole) > 1
    if not any(isinstance(piece, CallStart) for piece in whole):
        assert whole == ([Text(text)] if text else [])


def begins_json(text: str) -> bool:
    value = JsonValue()
    came = [value.push(char) for char in text]
    return Came.BAD not in came and Came.LAST not in came[:-1]


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    value=st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
        max_leaves=12,
    ),
    indent=st.sampled_from([None, 1]),
    wrong=st.integers(0, 200),
    char=st.sampled_from('}]{[",:x1-.e\\ \n'),
)  # fmt: skip
def test_json_is_known_from_what_is_none(value, indent, wrong, char):
    text = json.dumps({"v": value}, indent=indent, ensure_ascii=bool(wrong % 2))
    assert [JsonValueOf(text)[-1], set(JsonValueOf(text)[:-1])] == [Came.LAST, {Came.MORE}]
    at = wrong % len(text)
    other = text[:at] + char + text[at + 1 :]
    came = JsonValueOf(other)
    try:
        json.loads(other)
        valid = True
    except ValueError:
        valid = False
    assert (Came.BAD not in came and came[-1] is Came.LAST and Came.LAST not in came[:-1]) == valid


def JsonValueOf(text: str) -> list[Came]:
    value = JsonValue()
    return [value.push(char) for char in text]


def test_without_tools_nothing_is_a_call():
    assert parsed("hermes", hermes("now", "{}"), tools=[]) == [Text(hermes("now", "{}"))]
    assert parsed("llama3", llama("other", "{}"), tools=None) == call(0, "other", "{}")


TEMPLATES = Path(__file__).parents[2] / "goldens" / "chat" / "templates"
EXPECTED = {
    "qwen2.5": "hermes", "qwen3": "hermes", "qwq": "hermes", "llama-3.1": "llama3", "llama-3.2": "llama3",
    "llama-2": None, "gemma-3": None, "smollm2": None, "phi-4": None,
}  # fmt: skip


@pytest.mark.parametrize("name", EXPECTED)
def test_a_style_is_known_from_the_template(name):
    style = style_for((TEMPLATES / f"{name}.jinja").read_text())
    assert (style.name if style else None) == EXPECTED[name]


def test_a_style_is_known_from_the_vocabulary_or_by_its_name():
    plain = (TEMPLATES / "internlm2.jinja").read_text()
    assert style_for(plain) is None
    assert style_for(plain, ("<|plugin|>", "<|action_start|>")).name == "internlm"
    assert style_for("{{ '<tool_call><function=f><parameter=a>' }}").name == "qwen3-coder"
    assert style_for("") is None
    named = parser_for("{{ '<think></think>' }}", style="llama3", tools=TOOLS)
    assert [type(one) for one in named.feed(f"<think>a</think>{llama('now', '{}')}")] == [
        Reasoning,
        CallStart,
        CallArguments,
    ]
    with pytest.raises(UserError, match="known are hermes"):
        style_for("klingon")


def test_calls_have_ids_of_their_own():
    parser = parser_for("hermes")
    found = [one for one in parser.feed(hermes("a", "{}") * 2) if isinstance(one, CallStart)]
    assert [one.name for one in found] == ["a", "a"]
    assert len({one.id for one in found}) == 2
    assert all(one.id.startswith("call_") for one in found)
