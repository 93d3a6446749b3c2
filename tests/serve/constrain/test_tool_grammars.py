"""Whatever a model says under a grammar of tools, the parser of its style reads calls whose arguments fit."""

import functools
import json
import random

import jsonschema_rs
import pytest
from tokenizers import AddedToken
from tokenizers import Tokenizer as Inner

from maxstack.chat.parsing import STYLES, CallArguments, CallStart, Text, joined, parser_for
from maxstack.data.tokenizer import Tokenizer, byte_tokenizer
from maxstack.models.generation.params import SamplingParams
from maxstack.serve.constrain import Constraint, Grammars, ToolCalls

CITY = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 5},
        "days": {"type": "integer", "minimum": 0, "maximum": 99},
        "unit": {"type": "string", "enum": ["C", "F"]},
        "all": {"type": "boolean"},
    },
    "required": ["city", "days"],
    "additionalProperties": False,
}
NOTHING = {"type": "object", "properties": {}, "additionalProperties": False}
SCHEMAS = {"weather": CITY, "now": NOTHING}
TOOLS = [{"type": "function", "function": {"name": name, "parameters": s}} for name, s in SCHEMAS.items()]
PLAIN = SamplingParams()


@functools.cache
def tokenizer_of(style: str, special: bool) -> Tokenizer:
    """Bytes, and where `special` the style's marks as special tokens."""
    if not special:
        return byte_tokenizer()
    inner = Inner.from_str(byte_tokenizer().definition)
    inner.add_special_tokens([AddedToken(mark, special=True) for mark in STYLES[style].marks])
    return Tokenizer(inner.to_str(), {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"})


def said(style: str, special: bool, seed: int, **options) -> list:
    """The pieces of what somebody says who takes letters and what ends things before anything else."""
    tokenizer = tokenizer_of(style, special)
    made = grammars_of(style, special)
    bound = made.compile_now(Constraint("tools", ToolCalls(style=style, tools=TOOLS, **options)))
    draw, ids = random.Random(seed), []
    matching = bound.start(PLAIN, tokenizer.stop_ids, tokenizer.vocab_size)
    for _ in range(500):
        assert matching.fault is None, matching.fault
        allowed = matching.allowed()
        if matching.over or (256 in allowed and draw.random() < 0.5):
            text = tokenizer.decode(ids, skip_special=False)
            parser = parser_for(style, tools=TOOLS)
            return joined(parser.feed(text) + parser.end())
        marks = [i for i in allowed if i > 256 or chr(i) in '"}<,/\n'] if draw.random() < 0.6 else []
        plain = [i for i in allowed if i < 256 and (chr(i).isalnum() or chr(i) in ' <"{') and i < 128]
        ids.append(draw.choice(marks or plain or [i for i in allowed if i != 256]))
        matching.take(ids[-1:])
    return []  # it went on for too long


@functools.cache
def grammars_of(style: str, special: bool) -> Grammars:
    tokenizer = tokenizer_of(style, special)
    return Grammars(tokenizer, tokenizer.vocab_size, tokenizer.stop_ids)


def calls_of(pieces: list) -> list[tuple[str, str]]:
    names = {one.index: one.name for one in pieces if isinstance(one, CallStart)}
    texts = {one.index: one.text for one in pieces if isinstance(one, CallArguments)}
    return [(name, texts[index]) for index, name in names.items()]


OWN = ["hermes", "llama3", "internlm", "qwen3-coder"]


@pytest.mark.parametrize("special", [False, True], ids=["marks are text", "marks are tokens"])
@pytest.mark.parametrize("style", OWN)
def test_required_calls_are_calls_and_nothing_else(style, special):
    several = 0
    for seed in range(12):
        pieces = said(style, special, seed)
        calls = calls_of(pieces)
        assert len(calls) > 0 or not pieces
        assert not any(isinstance(one, Text) for one in pieces)
        several += len(calls) > 1
        for name, arguments in calls:
            value = json.loads(arguments)
            if style == "qwen3-coder" and "city" in value:
                value["city"] = value["city"][:5]  # the length of a text is not in its tags
            jsonschema_rs.validate(SCHEMAS[name], value)
    assert several or style == "qwen3-coder"  # whose texts seldom end by chance
    assert all(len(calls_of(said(style, special, seed, parallel=False))) <= 1 for seed in range(12))


@pytest.mark.parametrize("special", [False, True], ids=["marks are text", "marks are tokens"])
@pytest.mark.parametrize("style", OWN)
def test_where_calls_are_not_required_there_may_be_text_and_what_opens_a_call_becomes_one(style, special):
    tokenizer, made = tokenizer_of(style, special), grammars_of(style, special)
    optional = ToolCalls(style=style, tools=TOOLS, required=False)
    bound = made.compile_now(Constraint("tools", optional))

    def reach(text: str) -> list[int]:
        """What may come after a text."""
        matching = bound.start(PLAIN, tokenizer.stop_ids, tokenizer.vocab_size)
        matching.take(tokenizer.encode(text, special=True))
        assert matching.fault is None
        return matching.allowed()

    assert 256 in reach("Hello there")
    lead = "" if STYLES[style].bare else "I look. "
    assert {chr(i) for i in reach(lead + STYLES[style].written[0])} == {"w", "n"}
