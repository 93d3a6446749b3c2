"""Constraints become grammars, or are refused in words: nothing that a client sends takes the server along."""

import asyncio
import contextlib
import functools
import json
import random
import threading
import time
from pathlib import Path

import jsonschema_rs
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from maxstack.config import UserError
from maxstack.data.tokenizer import byte_tokenizer, load_tokenizer, train_bpe
from maxstack.models.generation.params import SamplingParams
from maxstack.serve.constrain import (
    BadConstraint,
    Bounds,
    Compiled,
    Constraint,
    Grammars,
    ToolCalls,
    grammars,
)
from maxstack.serve.constrain.matching import bits_below, bits_of
from maxstack.serve.constrain.vocabulary import Words
from tests.serve.constrain.schemas import schemas

GOLDENS = Path(__file__).parents[2] / "goldens" / "tokenizers"
BYTES = byte_tokenizer()
PLAIN = SamplingParams()


@pytest.fixture(scope="module")
def by_bytes():
    made = Grammars(BYTES, 257, BYTES.stop_ids)
    yield made
    made.close()


def said(bound: Compiled, tokenizer, seed: int, most: int = 300) -> tuple[str, bool]:
    """What somebody who takes any token that may come would say, and whether it came to an end."""
    draw, matching, ids = random.Random(seed), bound.start(PLAIN, tokenizer.stop_ids, bound.vocab_size), []
    for _ in range(most):
        assert matching.fault is None, matching.fault
        allowed = matching.allowed()
        over = matching.over or (allowed and set(allowed) <= set(tokenizer.stop_ids))
        if over or (set(allowed) & set(tokenizer.stop_ids) and draw.random() < 0.5):
            return tokenizer.decode(ids), True
        ids.append(draw.choice([one for one in allowed if one not in tokenizer.stop_ids]))
        matching.take(ids[-1:])
    return tokenizer.decode(ids), False


@settings(max_examples=60, deadline=None, derandomize=True)
@given(schema=schemas(), seed=st.integers(0, 9))
def test_what_a_schemas_grammar_lets_through_is_valid(by_bytes, schema, seed):
    text, over = said(by_bytes.compile_now(Constraint("json_schema", schema)), BYTES, seed)
    if over:
        jsonschema_rs.validate(schema, json.loads(text))


KINDS = ["bytes", "bpe", "sentencepiece bpe", "sentencepiece unigram", "no prefix"]


@functools.cache
def tokenizer_of(kind: str):
    if kind == "bytes":
        return BYTES
    if kind == "bpe":
        return train_bpe(['{"name": "the weather", "n": 12}, {"cities": ["Zürich", "Bern"]}'] * 30, 340)
    names = {"sentencepiece bpe": "bpe", "sentencepiece unigram": "unigram", "no prefix": "bpe_no_prefix"}
    return load_tokenizer(GOLDENS / f"{names[kind]}.model")


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_tokenizer_writes_what_its_grammar_says(kind):
    tokenizer = tokenizer_of(kind)
    made = Grammars(
        tokenizer, tokenizer.vocab_size + 7, tokenizer.stop_ids
    )  # a table with more rows than tokens
    schema = {"type": "object", "properties": {"name": {"type": "string", "maxLength": 9}}, "required": ["name"],
              "additionalProperties": False}  # fmt: skip
    bound = made.compile_now(Constraint("json_schema", schema))
    for seed in range(12):
        text, over = said(bound, tokenizer, seed)
        assert over
        jsonschema_rs.validate(schema, json.loads(text))
    choice = made.compile_now(Constraint("choice", ["the weather", "größer", "12"]))
    assert {said(choice, tokenizer, seed)[0] for seed in range(30)} == {"the weather", "größer", "12"}


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=30, deadline=None, derandomize=True)
@given(text=st.text(max_size=20))
def test_text_is_cut_into_tokens_that_say_it_again(kind, text):
    words = words_of(kind)
    ids = words(text)
    written = b"".join(words.tokens[i] for i in ids)
    known = set(b"".join(words.tokens))
    if known >= set(text.encode()):
        assert written == text.encode()
    assert not set(ids) & set(words.special_token_ids)


@functools.cache
def words_of(kind: str) -> Words:
    return Words(tokenizer_of(kind), tokenizer_of(kind).vocab_size, ())


def nested(depth: int, key: str = "properties"):
    schema = {"type": "string"}
    for _ in range(depth):
        schema = {"type": "object", key: {"a": schema}} if key == "properties" else {key: [schema, True]}
    return schema


REFUSED = [
    ("regex", "(", "unclosed group"), ("regex", "a\\", "backslash"), ("regex", "", "one character"),
    ("regex", 5, "one character"), ("regex", "(?=a)b", "look-around"), ("regex", r"(a)\1", "backreference"),
    ("regex", "(" * 100 + ")" * 100, "nested more than 64"), ("regex", "a" * 300_000, "300,000 bytes"),
    ("regex", "(a{1000}){1000}", "too many"), ("regex", "\ud800", "plain JSON"),
    ("json_schema", nested(500), "nested more than 64"), ("json_schema", nested(300, "anyOf"), "nested more than 64"),
    ("json_schema", "{", "not JSON"), ("json_schema", "[" * 100_000, "not JSON"), ("json_schema", [], "not list"),
    ("json_schema", False, "not bool"), ("json_schema", {"type": "foo"}, "Invalid type"),
    ("json_schema", {"$ref": "https://example.org/s"}, "nothing is fetched"),
    ("json_schema", {"properties": {"a": {"$ref": "other.json#/x"}}}, "nothing is fetched"),
    ("json_schema", {"$ref": "#/$defs/gone"}, "does not exist"), ("json_schema", {"$ref": "#"}, "grammar"),
    ("json_schema", {"const": float("inf")}, "JSON compliant"), ("json_schema", {1, 2}, "plain JSON"),
    ("json_schema", {"not": {"type": "string"}}, "Unimplemented"), ("json_schema", {"enum": []}, "Unsatisfiable"),
    ("json_schema", {"type": "integer", "minimum": 2, "maximum": 1}, "Unsatisfiable"),
    ("json_schema", {"type": "string", "pattern": "("}, "unclosed"), ("json_object", {}, "takes no value"),
    ("grammar", "start: /(/", "unclosed"), ("grammar", "what", "neither Lark nor GBNF"), ("grammar", "\0", "neither"),
    ("grammar", "start: start", "grammar"), ("grammar", "start: " + "(" * 99, "nested more than 64"),
    ("grammar", 'start: %json {"$ref": "http://localhost/x"}', "not present"), ("grammar", "start: @x", "unknown"),
    ("grammar", "root ::= a\n" + "\n".join(f"r{i} ::= r{i + 1}" for i in range(6000)), "write it in Lark"),
    ("choice", [], "one text or more"), ("choice", "abc", "one text or more"), ("choice", ["a", ""], "no text"),
    ("choice", [1], "no text"), ("choice", ["a"] * 5000, "at most 4096"), ("poem", "x", "kinds are"),
    ("tools", {}, "must be ToolCalls"), ("tools", ToolCalls(style="hermes", tools=[]), "0 tools"),
    ("tools", ToolCalls(style="klingon", tools=[]), "no style"),
    ("tools", ToolCalls(style="hermes", tools=[{"function": {"name": 'f", "x'}}]), "no name for a function"),
    ("tools", ToolCalls(style="hermes", tools=[{"function": {}}]), "name"),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "value", "words"), REFUSED)
def test_what_cannot_be_used_is_refused_in_words(by_bytes, kind, value, words):
    with pytest.raises(BadConstraint) as failure:
        by_bytes.compile_now(Constraint(kind, value))
    assert words in str(failure.value)
    assert len(str(failure.value)) < 700
    assert "\n" not in str(failure.value)


HOSTILE = [
    ("regex", "(x+x+)+y"), ("regex", "(a*)*b"), ("regex", ".{0,100000}"), ("regex", "a{1000000}"),
    ("regex", "a" * 200_000), ("regex", "(a?){200}a{200}"), ("regex", r"\w{5000}"),
    ("json_schema", {"enum": [f"value {i}" for i in range(15_000)]}),
    ("json_schema", {"type": "object", "properties": {f"k{i}": {"type": "string"} for i in range(3000)}}),
    ("json_schema", {"type": "string", "minLength": 10**9}), ("json_schema", {"type": "array", "minItems": 10**7}),
    ("json_schema", {"type": "string", "pattern": "(a{1000}){1000}"}),
    ("json_schema", {"$defs": {f"a{i}": {"allOf": [{"$ref": f"#/$defs/a{i + 1}"}] * 2} for i in range(40)}
                     | {"a40": {}}, "$ref": "#/$defs/a0"}),
    ("json_schema", {"$defs": {"n": {"properties": {"next": {"$ref": "#/$defs/n"}}}}, "$ref": "#/$defs/n"}),
    ("grammar", "start: " + " ".join(f'"x{i}"' for i in range(15_000))), ("grammar", 'start: a{1000000}\na: "x"'),
    ("grammar", 'start: ("a"|"b"){0,100000}'), ("choice", ["x" * 60_000, "y"]),
    ("choice", [f"choice number {i}" for i in range(4000)]),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "value"), HOSTILE)
def test_hostile_ones_are_refused_or_answered_within_bounds(by_bytes, kind, value):
    begun = time.thread_time()
    try:
        bound = by_bytes.compile_now(Constraint(kind, value))
    except BadConstraint:
        return
    finally:
        assert time.thread_time() - begun < 10  # of CPU; without bounds some take minutes
    matching = bound.start(PLAIN, BYTES.stop_ids, 257)
    for _ in range(50):
        ids = matching.allowed()
        if matching.fault or matching.over or ids[-1] == BYTES.eos_id:
            break
        matching.take(ids[-1:])


@settings(max_examples=150, deadline=None, derandomize=True)
@given(text=st.text(alphabet="ab01.*+?|(){}[]^$\\-,:&~<>/\"' \nxpLPsdw=!#%@", min_size=1, max_size=24))
def test_any_text_as_regex_and_grammar_is_taken_or_refused(by_bytes, text):
    for constraint in (Constraint("regex", text), Constraint("grammar", f"start: {text}")):
        try:
            bound = by_bytes.compile_now(constraint)
        except BadConstraint:
            continue
        matching = bound.start(PLAIN, BYTES.stop_ids, 257)
        if ids := matching.allowed():
            matching.take(ids[:1])


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                [
                    "type",
                    "properties",
                    "items",
                    "$ref",
                    "enum",
                    "const",
                    "anyOf",
                    "allOf",
                    "oneOf",
                    "required",
                    "pattern",
                    "minimum",
                    "maxLength",
                    "$defs",
                    "additionalProperties",
                    "prefixItems",
                    "format",
                    "x-guidance",
                    "not",
                ]
            ),
            inner,
            max_size=3,
        )
    ),
    max_leaves=8,
)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(schema=JSON)
def test_any_json_as_schema_is_taken_or_refused(by_bytes, schema):
    with contextlib.suppress(BadConstraint):
        by_bytes.compile_now(Constraint("json_schema", schema))


def test_compiling_is_off_the_event_loop_kept_and_given_up_in_time(monkeypatch):
    made = Grammars(BYTES, 257, BYTES.stop_ids, Bounds(kept=2, seconds=0.2))
    threads, let_go, slow = [], threading.Event(), []
    grammar_of = grammars.grammar_of

    def watched(constraint, *rest):
        threads.append(threading.current_thread().name)
        if constraint.value in slow:
            let_go.wait(10)
        return grammar_of(constraint, *rest)

    monkeypatch.setattr(grammars, "grammar_of", watched)

    async def run():
        first = await made.compile(Constraint("regex", "a"))
        assert await made.compile(Constraint("regex", "a")) is first
        await made.compile(Constraint("json_schema", {"type": "integer"}))
        again = await made.compile(Constraint("json_schema", '{"type": "integer"}'))
        assert again.matcher is not None
        await made.compile(Constraint("choice", ["b"]))
        assert await made.compile(Constraint("regex", "a")) is not first  # the third has taken its place
        slow.append("never")
        with pytest.raises(BadConstraint, match="took more than"):
            await made.compile(Constraint("regex", "never"))

    asyncio.run(run())
    let_go.set()
    made.close()
    assert all(name.startswith("maxstack-grammar") for name in threads)


@given(vocab=st.integers(1, 200), ids=st.lists(st.integers(0, 250)))
def test_bits_are_those_of_their_tokens(vocab, ids):
    def tokens(words) -> list[int]:
        return np.nonzero(np.unpackbits(words.astype("<u4").view(np.uint8), bitorder="little"))[0].tolist()

    assert tokens(bits_below(vocab)) == list(range(vocab))
    assert tokens(bits_of(ids, vocab)) == sorted({one for one in ids if one < vocab})


AFTER = [("json_schema", {"const": 5}), ("regex", "5"), ("choice", ["5"]), ("grammar", 'start: "5"')]


@pytest.mark.parametrize(("kind", "value"), AFTER)
def test_a_form_may_begin_after_the_thoughts(by_bytes, kind, value):
    bound = by_bytes.compile_now(Constraint(kind, value, after="</think>"))
    matching = bound.start(PLAIN, BYTES.stop_ids, 257)
    matching.take(list(b"Is 5 < 6? </thin"))
    assert len(matching.allowed()) > 150  # what may begin a character
    assert BYTES.eos_id not in matching.allowed()
    matching.take(list(b"k>"))
    assert set(map(chr, matching.allowed())) == {"5", "\n"}
    matching.take(list(b"\n\n5"))
    assert matching.over
    assert bound is not by_bytes.compile_now(Constraint(kind, value))


@pytest.mark.parametrize(("kind", "value"), AFTER)
def test_a_form_may_begin_at_once_or_after_thoughts_that_are_begun(by_bytes, kind, value):
    bound = by_bytes.compile_now(Constraint(kind, value, after="</think>", opening="<think>"))
    matching = bound.start(PLAIN, BYTES.stop_ids, 257)
    assert set(map(chr, matching.allowed())) == {"5", "<"}
    matching.take(list(b"5"))
    assert matching.over
    matching = bound.start(PLAIN, BYTES.stop_ids, 257)
    matching.take(list(b"<think>Is 5 < 6? </think>"))
    assert set(map(chr, matching.allowed())) == {"5", "\n"}
    matching.take(list(b"5"))
    assert matching.over


def test_a_grammar_is_of_one_vocabulary(by_bytes):
    bound = by_bytes.compile_now(Constraint("regex", "a"))
    with pytest.raises(UserError, match="257 tokens and the model has 300"):
        bound.start(PLAIN, (), 300)
    with pytest.raises(BadConstraint, match="no token of the vocabulary"):
        Grammars(BYTES, 257, ()).compile_now(Constraint("grammar", 'start: ""'))
