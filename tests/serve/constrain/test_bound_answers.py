"""Bound answers on the device: whatever a random model would say, they have their form, and others are as alone."""

import dataclasses
import json
import re

import jax
import jsonschema_rs
import pytest
from hypothesis import HealthCheck, given, settings

from maxstack.data.tokenizer import byte_tokenizer
from maxstack.models.generation import SamplingParams
from maxstack.serve.constrain import Bounds, Constraint, Grammars
from maxstack.serve.errors import ConstraintFailed
from tests.models.tiny import build
from tests.serve.constrain.schemas import schemas
from tests.serve.driven import CONFIG, VOCAB, Driven, device_of, prompts, tokens_of

TOKENIZER = byte_tokenizer()
ENDS = TOKENIZER.stop_ids
WILD = SamplingParams(max_tokens=40, temperature=1.5, seed=7)
WORDS = "(red|green|blue){2}-[0-9]{3}"
ENDLESS = "[a-z]*"


@pytest.fixture(scope="module")
def device():
    return device_of(build(CONFIG))


@pytest.fixture(scope="module")
def grammars():
    grammars = Grammars(TOKENIZER, VOCAB, ENDS)
    yield grammars
    grammars.close()


@pytest.fixture(scope="module")
def regex(grammars):
    return lambda text: grammars.compile_now(Constraint("regex", text))


def driven(device, **changes) -> Driven:
    return Driven(device, TOKENIZER, ENDS, **changes)


@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(schema=schemas())
def test_answers_are_valid_by_their_schema(device, grammars, schema):
    bound = grammars.compile_now(Constraint("json_schema", schema))
    params = [dataclasses.replace(WILD, max_tokens=48, seed=seed, temperature=0.9) for seed in range(4)]
    for answer in driven(device).together(prompts(3, 9, 5, 1), params, [bound] * 4):
        assert answer.error is None
        if answer.output.finish_reason == "stop":
            jsonschema_rs.validate(schema, json.loads(answer.output.text))
        else:
            assert answer.output.finish_reason == "length"
            assert len(answer.output.token_ids) == 48


@pytest.mark.parametrize("expression", [WORDS, "a{3,5}b?", r"\d+(\.\d\d)?", "(?i)yes|no", "x", "[^a]{4}é"])
def test_answers_match_their_expression_wholly(device, regex, expression):
    seeds = [dataclasses.replace(WILD, seed=seed) for seed in range(4)]
    for answer in driven(device).together(prompts(2, 7, 3, 8), seeds, [regex(expression)] * 4):
        if answer.output.finish_reason == "stop":
            assert re.fullmatch(expression, answer.output.text), answer.output.text
        else:
            assert len(answer.output.token_ids) == WILD.max_tokens
            assert expression == r"\d+(\.\d\d)?"  # the one that may go on for ever


def test_answers_are_one_of_the_choices(device, grammars):
    texts = ["yes", "no", "it is\nunclear", "ja 🌤"]
    bound = grammars.compile_now(Constraint("choice", texts))
    seeds = [dataclasses.replace(WILD, seed=seed, temperature=3.0) for seed in range(16)]
    answers = driven(device).together(prompts(*[4] * 16), seeds, [bound] * 16)
    assert {answer.output.finish_reason for answer in answers} == {"stop"}
    found = {answer.output.text for answer in answers}
    assert found <= set(texts)
    assert len(found) > 1


COMPANY = [
    {}, {"steps": (1,), "ahead": 1}, {"chunks": ((1, 4),), "tokens_a_step": 8}, {"pages": 9, "prefix_cache": False},
    {"pages": 9},
]  # fmt: skip


@pytest.mark.parametrize("company", COMPANY, ids=["batch", "one by one", "chunks", "preempted", "prefixes"])
def test_bound_and_free_answers_are_the_same_alone_and_in_any_company(device, regex, grammars, company):
    rows = prompts(5, 12, 20, 9, 12, 3, seed=2)
    rows[4] = rows[1]
    bound = [None, regex(WORDS), regex(ENDLESS), None, regex(WORDS), None]
    params = [dataclasses.replace(WILD, max_tokens=10 + i, seed=i) for i in range(6)]
    # Penalties, on one that is free and one that is bound.
    for i in (2, 3):
        params[i] = dataclasses.replace(params[i], repetition_penalty=1.4, frequency_penalty=0.5)
    alone = [
        driven(device, prefix_cache=False).together([row], [own], [form])[0].output
        for row, own, form in zip(rows, params, bound, strict=True)
    ]
    run = driven(device, **company)
    for order in ([0, 1, 2, 3, 4, 5], [5, 4, 2, 0, 3, 1]):
        together = run.together(*([each[i] for i in order] for each in (rows, params, bound)))
        assert tokens_of(together) == [alone[i].token_ids for i in order]
        assert [a.output.finish_reason for a in together] == [alone[i].finish_reason for i in order]
    assert (run.scheduler.counters.num_preemptions > 0) == ("pages" in company)
    assert re.fullmatch(WORDS, alone[1].text)
    assert run.all_pages_free


def test_a_failed_step_leaves_a_grammar_where_it_was(device, regex, monkeypatch):
    rows, bound = prompts(9, 12, seed=7), [regex(WORDS), None]
    wanted = tokens_of(driven(device).together(rows, WILD, bound))
    launch, calls = device.launch, []

    def failing(plan):
        calls.append(plan)
        if len(calls) == 6:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory")
        return launch(plan)

    monkeypatch.setattr(device, "launch", failing)
    run = driven(device)
    assert tokens_of(run.together(rows, WILD, bound)) == wanted
    assert run.scheduler.counters.cache_losses == 1


def test_max_tokens_cut_an_answer_and_say_so(device, regex):
    [cut] = driven(device).together(prompts(5), dataclasses.replace(WILD, max_tokens=4), [regex(WORDS)])
    assert (cut.output.finish_reason, len(cut.output.text)) == ("length", 4)


def test_an_end_is_held_off_as_long_as_there_is_something_else(device, regex):
    def ask(expression: str, **changes):
        params = [dataclasses.replace(WILD, seed=seed, **changes) for seed in range(8)]
        answers = driven(device).together(prompts(*[5] * 8), params, [regex(expression)] * 8)
        return [(len(answer.output.text), answer.output.finish_reason) for answer in answers]

    # An end among 27 tokens: in 12 steps of each of 8 answers it comes up.
    assert min(length for length, _ in ask(ENDLESS, max_tokens=24)) < 24
    assert all(length >= 12 for length, _ in ask(ENDLESS, min_tokens=12, max_tokens=24))
    assert ask(ENDLESS, ignore_eos=True, max_tokens=24) == [(24, "length")] * 8
    assert ask("abc", ignore_eos=True, min_tokens=9, max_tokens=24) == [(3, "stop")] * 8


def test_a_stop_token_may_come_where_an_end_may_and_ends_the_answer(device, regex):
    params = dataclasses.replace(WILD, stop_token_ids=(33,), logit_bias=((33, 1e9),))
    for expression, text in (("[a-z]+", 1), ("[a-z]{5,9}", 5), ("[a-z]{3}", 3)):
        [answer] = driven(device).together(prompts(5), params, [regex(expression)])
        assert answer.output.finish_reason == "stop"
        assert re.fullmatch(expression, answer.output.text)
        assert len(answer.output.text) == text
    [late] = driven(device).together(prompts(5), dataclasses.replace(params, min_tokens=7), [regex("[a-z]+")])
    assert len(late.output.text) == 7


def test_biases_choose_within_the_form_and_cannot_break_it(device, regex):
    a, b, z = (ord(letter) for letter in "abz")
    for amount in (1e9, float("inf")):
        biased = dataclasses.replace(WILD, logit_bias=((z, amount),), temperature=0.0)
        assert (
            driven(device).together(prompts(5), biased, [regex("[ab]{6}")])[0].output.text.strip("ab") == ""
        )
    for amount in (-1e9, -float("inf")):
        forbidden = dataclasses.replace(WILD, logit_bias=((a, amount),))
        assert driven(device).together(prompts(5), forbidden, [regex("[ab]{6}")])[0].output.text == "bbbbbb"
        neither = dataclasses.replace(WILD, logit_bias=((a, amount), (b, amount)))
        [answer] = driven(device).together(prompts(5), neither, [regex("[ab]{6}")])
        assert re.fullmatch("[ab]{6}", answer.output.text)


@pytest.mark.parametrize(
    "changes", [{"top_k": 1}, {"top_p": 0.1}, {"min_p": 0.9}, {"temperature": 0.0}, {"top_k": 200}]
)
def test_filters_look_at_what_may_be_said(device, regex, changes):
    params = dataclasses.replace(WILD, **changes)
    [answer] = driven(device).together(prompts(6), params, [regex("[0-9]{12}")])
    assert re.fullmatch("[0-9]{12}", answer.output.text)


def test_a_grammar_that_fails_or_takes_too_long_ends_its_answer_alone(device, regex):
    rows = prompts(9, 12, 5, seed=6)
    wanted = tokens_of(driven(device).together(rows, WILD))
    failing, slow = regex(ENDLESS), dataclasses.replace(regex(ENDLESS), bounds=Bounds(mask_grace_s=-1.0))
    run = driven(device)
    whole = [run.ask(row, WILD) for row in rows]
    bad, late = run.ask(rows[0], WILD, failing), run.ask(rows[0], WILD, slow)

    def between() -> bool:
        matching = run.loop._bound.get(bad.output.id)
        if matching is not None and matching._taken == 3:
            matching._matcher.consume_tokens([0])  # which leads out of the grammar
        return False

    run.run(between)
    assert isinstance(bad.error, ConstraintFailed)
    assert len(bad.output.token_ids) == 4
    assert isinstance(late.error, ConstraintFailed)
    assert "give a simpler one" in str(late.error)
    assert tokens_of(whole) == wanted
    assert run.all_pages_free


def test_bound_answers_compile_nothing(device, regex, grammars, compilations):
    forms = [regex(WORDS), None, grammars.compile_now(Constraint("json_object")), regex(ENDLESS)]
    before = len(compilations)
    driven(device).together(prompts(5, 9, 17, 2), WILD, forms)
    assert len(compilations) == before


def test_without_an_end_token_an_answer_ends_with_its_grammar(device):
    grammars = Grammars(TOKENIZER, VOCAB, ())
    bound = grammars.compile_now(Constraint("regex", "abc|abd"))
    [answer] = Driven(device, TOKENIZER).together(prompts(5), WILD, [bound])
    assert answer.output.text in ("abc", "abd")
    assert answer.output.finish_reason == "stop"
