"""A device and a scheduler driven by hand: no threads, so that a test decides what happens when."""

import dataclasses
import itertools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from maxstack.models import Transformer, TransformerConfig
from maxstack.models.generation import SamplingParams
from maxstack.serve.constrain.matching import Compiled, left_to_the_engine
from maxstack.serve.device import Asked, Device
from maxstack.serve.forms import form_for
from maxstack.serve.loop import Loop
from maxstack.serve.news import News
from maxstack.serve.output import Answer
from maxstack.serve.plan import Limits
from maxstack.serve.request import Request
from maxstack.serve.scheduler import Scheduler
from tests.models.tiny import CONFIGS

# Sums over pages and chunks instead of the row's tokens, in float32, of log-probabilities around 3.
ROUNDING = 1e-4
ROOM = 64
VOCAB = 257
"""Bytes and an end: what a byte tokenizer knows."""
CONFIG = dataclasses.replace(CONFIGS["grouped"], vocab_size=VOCAB, tie_embeddings=False)
"""Of most tests here: they share its compiled programs."""
LIMITS = Limits(
    rows=4, page=4, pages=64, max_length=ROOM, chunks=((1, 4), (2, 8)), steps=(1, 2), tokens_a_step=20
)
GREEDY = SamplingParams(max_tokens=6, temperature=0.0, logprobs=2)
full = jax.jit(lambda model, ids: model(ids))


def prompts(*lengths: int, seed: int = 0, vocab: int = 64) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, vocab, length).tolist() for length in lengths]


def device_of(model: Transformer, limits: Limits = LIMITS, **options) -> Device:
    """Ready to launch."""
    config: TransformerConfig = model.config
    options = {"kv_dtype": config.dtype, "buckets": (1, 4)} | options
    form, weights = form_for(model, options.pop("on", None))
    device = Device(config, form, weights, limits, **options)
    device.warm_up()
    return device


class Driven:
    """Requests on a device, one turn of the loop at a time. `changes` are made to the limits of the scheduler alone:
    fewer pages, say, than the device has."""

    def __init__(self, device: Device, tokenizer=None, end_ids: Sequence[int] = (), **changes):
        self.answers: dict[str, Answer] = {}
        self.scheduler = Scheduler(dataclasses.replace(device.limits, **changes))
        self.loop = Loop(device, self.scheduler, self._hear, clock=lambda: float(self.turns))
        self.turns, self._numbers = 0, itertools.count()
        self._tokenizer, self._ends = tokenizer, frozenset(end_ids)

    def ask(
        self, prompt: Sequence[int], params: SamplingParams = GREEDY, constraint: Compiled | None = None,
        **fields,
    ) -> Answer:  # fmt: skip
        name, matching = f"{next(self._numbers)}", None
        if constraint is not None:
            matching = constraint.start(params, self._ends, VOCAB)
            params = left_to_the_engine(params)
            fields["stepwise"] = True
        answer = self.answers[name] = Answer(name, tuple(prompt), params, self._tokenizer, self._ends)
        asked = Asked(params, tuple(sorted(params.ends(self._ends))), matching=matching)
        fields = {"use_cache": params.prompt_logprobs is None} | fields
        fields |= {"id": name, "prompt": tuple(prompt), "max_tokens": params.max_tokens, "params": asked}
        self.loop.submit(Request(arrived=float(self.turns), **fields))
        return answer

    def cancel(self, answer: Answer) -> None:
        self.loop.cancel(answer.output.id, "cancelled")

    def run(self, between: Callable[[], bool] = lambda: False) -> None:
        """Until nothing is left to do; `between` is called before each turn, and returns whether more will come."""
        while True:
            more = between()
            self.turns += 1
            if not self.loop.turn() and not more and self.scheduler.idle:
                return
            assert self.turns < 10_000, "it does not come to an end"

    def together(
        self, rows: Sequence[Sequence[int]], params: SamplingParams | Sequence = GREEDY,
        constraints: Sequence[Compiled | None] | None = None,
    ) -> list[Answer]:  # fmt: skip
        each = [params] * len(rows) if isinstance(params, SamplingParams) else params
        bound = [None] * len(rows) if constraints is None else constraints
        answers = [self.ask(*one) for one in zip(rows, each, bound, strict=True)]
        self.run()
        return answers

    def _hear(self, news: list[News]) -> None:
        for each in news:
            answer = self.answers[each.id]
            answer.take(each)
            if answer.done and each.finish is None:
                self.loop.cancel(each.id, "stop")

    @property
    def all_pages_free(self) -> bool:
        """Nobody holds a page; the prefix cache may still know what is in it."""
        return self.scheduler.idle and self.scheduler.pages.available == self.scheduler.limits.pages


def tokens_of(answers: Sequence[Answer]) -> list[list[int]]:
    return [answer.output.token_ids for answer in answers]


def check_greedy(model: Transformer, answer: Answer, rounding: float = ROUNDING) -> None:
    """Each token is the likeliest of a full forward pass over all before it, with that log-probability."""
    prompt, given = answer.output.prompt_token_ids, answer.output
    ids = [*prompt, *given.token_ids]
    logprobs = jax.nn.log_softmax(full(model, jnp.asarray([ids + [0] * (ROOM - len(ids))]))[0])
    assert given.token_ids
    assert len(given.logprobs) == len(given.token_ids)
    for i, (token, told) in enumerate(zip(given.token_ids, given.logprobs, strict=True)):
        at = logprobs[len(prompt) - 1 + i]
        assert float(at[token]) > float(at.max()) - rounding
        assert told.token_id == token
        np.testing.assert_allclose(told.logprob, at[token], atol=rounding)
        np.testing.assert_allclose([p for _, p in told.top], np.sort(at)[::-1][:2], atol=rounding)
