"""A Generator against full forward passes of the same model, on both forms of the programs."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maxstack.config import UserError
from maxstack.data.tokenizer import byte_tokenizer
from maxstack.models import BlockConfig, RopeConfig, Transformer, TransformerConfig
from maxstack.models.generation import Completion, Generator, SamplingParams, Session, generator
from maxstack.models.generation.params import row_settings
from tests.models.tiny import CONFIGS, GATED, GROUPED, VOCAB, build, model_config

GREEDY = SamplingParams(max_tokens=6, temperature=0.0, logprobs=2)
FORMS = ("cpu", "tpu")
# Sums over slots and chunks instead of the row's tokens, in float32, of log-probabilities around 3.
ROUNDING = 1e-4
full = jax.jit(lambda model, ids: model(ids))


def prompts(*lengths: int, seed: int = 0, vocab: int = VOCAB) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, vocab, length).tolist() for length in lengths]


def check_greedy(model: Transformer, prompt: list[int], given: Completion) -> None:
    """Each token is the likeliest of a full forward pass over all before it, with that log-probability."""
    ids, room = [*prompt, *given.token_ids], 64
    padded = jnp.asarray([ids + [0] * (room - len(ids))])
    logprobs = jax.nn.log_softmax(full(model, padded)[0])
    for i, (token, told) in enumerate(zip(given.token_ids, given.logprobs, strict=True)):
        at = logprobs[len(prompt) - 1 + i]
        assert float(at[token]) > float(at.max()) - ROUNDING
        assert told.token_id == token
        np.testing.assert_allclose(told.logprob, at[token], atol=ROUNDING)
        np.testing.assert_allclose([p for _, p in told.top], np.sort(at)[::-1][:2], atol=ROUNDING)


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(generator, "SMALLEST_CHUNK", 4)
    monkeypatch.setattr(generator, "LARGEST_CHUNK", 8)
    monkeypatch.setattr(generator, "SMALLEST_CACHE", 8)


@pytest.mark.parametrize(
    ("name", "form"),
    [
        *((name, "cpu") for name in ("grouped", "window", "mixture")),
        ("window", "tpu"),
        pytest.param("latent", "cpu", marks=pytest.mark.slow),
    ],
)
def test_ragged_rows_in_chunks_equal_full_forward_passes(name, form, small_chunks):
    # Prompts longer than the window of 3 and than a chunk of 8; the cache grows from 24 slots on the way.
    model = build(CONFIGS[name])
    rows = prompts(1, 20, 9, 5)
    for prompt, given in zip(rows, Generator(model, on=form).generate(rows, GREEDY), strict=True):
        assert (len(given.token_ids), given.finish_reason) == (6, "length")
        check_greedy(model, prompt, given)


def dynamic(original: int) -> TransformerConfig:
    rope = RopeConfig(theta=100.0, scaling="dynamic", factor=2.0, original_length=original)
    return model_config(BlockConfig(attention=dataclasses.replace(GROUPED, rope=rope), feed_forward=GATED))


@pytest.mark.parametrize("form", FORMS)
def test_dynamic_scaling_goes_by_the_whole_prompt_in_every_chunk(form, small_chunks):
    model, rows = build(dynamic(4)), prompts(20, 9)
    given = Generator(model, on=form).generate(rows, dataclasses.replace(GREEDY, max_tokens=1))
    for prompt, row in zip(rows, given, strict=True):
        wanted = jax.nn.log_softmax(model(jnp.asarray([prompt]))[0, -1])
        assert row.token_ids[0] == int(wanted.argmax())
        np.testing.assert_allclose(row.logprobs[0].logprob, wanted.max(), atol=ROUNDING)


def test_a_row_is_the_same_alone_and_among_others_whatever_its_place():
    writer = Generator(build(CONFIGS["grouped"]))
    rows = prompts(5, 12, 3)
    params = [
        SamplingParams(max_tokens=8, temperature=1.5, seed=i, top_p=0.9, frequency_penalty=0.4)
        for i in range(3)
    ]
    alone = [writer.generate([row], own)[0].token_ids for row, own in zip(rows, params, strict=True)]
    for order in ([0, 1, 2], [2, 0, 1]):
        together = writer.generate([rows[i] for i in order], [params[i] for i in order])
        assert [row.token_ids for row in together] == [alone[i] for i in order]


def test_one_program_serves_all_settings_and_lengths_of_a_bucket(compilations):
    writer = Generator(build(CONFIGS["grouped"]))
    writer.generate(prompts(5), GREEDY)
    before = len(compilations)
    rich = SamplingParams(
        max_tokens=9, temperature=0.7, top_k=9, top_p=0.9, min_p=0.01, repetition_penalty=1.2, presence_penalty=0.1,
        frequency_penalty=0.1, seed=4, stop_token_ids=(63,), logprobs=5, logit_bias=((1, 2.0),),
    )  # fmt: skip
    writer.generate(prompts(17), rich)
    Generator(build(CONFIGS["grouped"], seed=1)).generate(prompts(2), rich)
    assert len(compilations) == before


def test_a_session_reads_only_what_is_new(monkeypatch):
    model = build(CONFIGS["window"])
    writer, session = Generator(model), Session()
    [first] = prompts(20)
    answer = Completion()
    for event in writer.stream([first], GREEDY, session=session):
        answer.add(event)
    assert session.ids == [*first, *answer.token_ids][: len(session.ids)]
    assert len(session.ids) >= 20 + 5
    read = []
    programs = writer._programs

    def watched(weights, state, tokens, *rest):
        read.append(tokens)
        return programs.read(weights, state, tokens, *rest)

    monkeypatch.setattr(writer, "_programs", programs._replace(read=watched))
    second = [*first, *answer.token_ids, *prompts(7, seed=1)[0]]
    again = Completion()
    for event in writer.stream([second], GREEDY, session=session):
        again.add(event)
    check_greedy(model, second, again)
    assert [tokens.shape for tokens in read] == [(1, 16)]
    # Another conversation that shares the beginning; then one that shares nothing.
    for other in ([*first[:10], *prompts(4, seed=2)[0]], prompts(6, seed=3)[0]):
        given = Completion()
        for event in writer.stream([other], GREEDY, session=session):
            given.add(event)
        check_greedy(model, other, given)


def test_a_session_survives_an_answer_that_is_broken_off():
    model = build(CONFIGS["grouped"])
    writer, session = Generator(model), Session()
    [prompt] = prompts(9)
    events = writer.stream([prompt], GREEDY, session=session)
    begun = [next(events).token_ids[0], next(events).token_ids[0]]
    events.close()
    assert session.ids[:10] == [*prompt, begun[0]]
    given = Completion()
    for event in writer.stream([[*prompt, *begun]], GREEDY, session=session):
        given.add(event)
    check_greedy(model, [*prompt, *begun], given)


def test_end_tokens_stop_ids_and_max_tokens_end_rows_one_by_one():
    writer = Generator(build(CONFIGS["grouped"]))
    rows = prompts(5, 12, 3)
    whole = [row.token_ids for row in writer.generate(rows, GREEDY)]
    third = whole[0][2]
    params = [
        dataclasses.replace(GREEDY, stop_token_ids=(third,)), dataclasses.replace(GREEDY, max_tokens=2), GREEDY,
    ]  # fmt: skip
    given = writer.generate(rows, params)
    assert given[0].token_ids == whole[0][: whole[0].index(third)]
    assert given[1].token_ids == whole[1][:2]
    assert given[2].token_ids == whole[2]
    assert [row.finish_reason for row in given] == ["stop", "length", "length"]
    ended = Generator(build(CONFIGS["grouped"]), end_ids=[third])
    assert ended.generate(rows[:1], GREEDY)[0].finish_reason == "stop"
    ignoring = dataclasses.replace(GREEDY, ignore_eos=True)
    assert ended.generate(rows[:1], ignoring)[0].token_ids == whole[0]


def test_text_and_stop_strings():
    model = build(dataclasses.replace(CONFIGS["grouped"], vocab_size=257))
    writer = Generator(model, byte_tokenizer())
    # Letters only: a byte model's text is what the tokens say.
    letters = tuple((token, -100.0) for token in range(257) if not 97 <= token < 123)
    params = SamplingParams(max_tokens=12, temperature=2.0, logit_bias=letters)
    [whole] = writer.generate(prompts(4, vocab=257), params)
    assert whole.text == bytes(whole.token_ids).decode()
    stop = whole.text[5:8]
    [given] = writer.generate(prompts(4, vocab=257), dataclasses.replace(params, stop=("zzz", stop)))
    assert given.text == whole.text[: whole.text.index(stop)]
    assert given.finish_reason == "stop"


@pytest.mark.parametrize(
    ("ids", "params", "part"),
    [
        ([], GREEDY, "no tokens"), ([1] * 60, GREEDY, "60 tokens and max_tokens 6 exceed the model's 64"),
        ([64], GREEDY, "0 to 63"), ([-1], GREEDY, "0 to 63"),
        ([1], SamplingParams(max_tokens=1, stop=("x",)), "need a tokenizer"),
        ([1], SamplingParams(max_tokens=1, logit_bias=((64, 1.0),)), "token id 64 is not in 0 to 63"),
        ([1], [GREEDY, GREEDY], "1 prompts and 2 settings"),
    ],
)  # fmt: skip
def test_a_request_that_cannot_be_served_is_refused_before_anything_is_computed(
    ids, params, part, compilations
):
    writer = Generator(build(CONFIGS["grouped"]))
    before = len(compilations)
    with pytest.raises(UserError, match=part):
        writer.stream([ids], params)
    assert len(compilations) == before


def test_bfloat16_weights_are_kept_in_bfloat16_and_give_the_same_tokens():
    config = dataclasses.replace(CONFIGS["grouped"], dtype="bfloat16", tie_embeddings=False)
    model = build(config)
    for form in FORMS:
        writer = Generator(model, on=form)
        products = [leaf for leaf in writer._weights if leaf.size >= 16 * 32]
        assert {leaf.dtype for leaf in products} == {jnp.dtype(jnp.bfloat16)}
        [given] = writer.generate(prompts(9), GREEDY)
        wanted = jax.nn.log_softmax(full(model, jnp.asarray([prompts(9)[0]]))[0, -1])
        # bfloat16 has 8 bits: logits of size 3 to about 0.03.
        np.testing.assert_allclose(given.logprobs[0].logprob, wanted[given.token_ids[0]], atol=0.1)


@pytest.mark.usefixtures("optimized")
@pytest.mark.parametrize("rows", [1, 8])
def test_no_step_copies_a_cache_or_a_weight(rows):
    writer = Generator(build(CONFIGS["grouped"]), on="cpu")
    state, _ = writer._read(prompts(*[5] * rows), None)
    settings = row_settings([GREEDY] * rows, VOCAB)
    pick, accept = writer._programs.compiled["pick"], writer._programs.compiled["accept"]
    chosen, news = jax.eval_shape(pick, writer._weights, state, settings)
    texts = [pick.lower(writer._weights, state, settings), accept.lower(state, news, chosen.tokens_b)]
    big = {shape_of(leaf) for leaf in [*jax.tree.leaves(state.caches), *writer._weights] if leaf.size >= 512}
    for text in (lowered.compile().as_text() for lowered in texts):
        made = re.findall(r"= (\w+\[[\d,]*\])\S* copy\(", text)
        assert not big & set(made)


def shape_of(leaf: jax.Array) -> str:
    return f"f32[{','.join(map(str, leaf.shape))}]"


def test_cache_sizes_and_chunks():
    assert [generator.cache_size(n) for n in (1, 128, 129, 193, 257, 513, 769)] == [
        128,
        128,
        192,
        256,
        384,
        768,
        1024,
    ]
    assert [generator.cut(n) for n in (0, 1, 17, 512, 1100)] == [[], [16], [32], [512], [512, 512, 128]]
