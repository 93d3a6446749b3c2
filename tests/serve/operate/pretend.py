"""An engine whose device is pretended: it answers "a", and does what a test tells it: hang, fail, take its time."""

import contextlib
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from maxstack.data.tokenizer import byte_tokenizer
from maxstack.serve import AsyncEngine, Limits
from maxstack.serve import engine as module
from maxstack.serve.device import Device, Found, Launched
from maxstack.serve.request import Result
from tests.models.tiny import build
from tests.serve.driven import CONFIG

LIMITS = Limits(
    rows=4, page=4, pages=64, max_length=64, chunks=((1, 4), (2, 8)), steps=(1,), tokens_a_step=20, waiting=8
)
LETTER = ord("a")


class PretendDevice(Device):
    """Computes nothing."""

    def __init__(self, config, form, weights, limits, *rest, **options):
        self.config, self.limits, self.weights = config, limits, weights
        self.go_on = threading.Event()
        self.go_on.set()
        self.fails: BaseException | None = None
        self.takes_s = 0.0
        self.programs = 3
        self.resets = 0

    def warm_up(self, told=None) -> None:
        for done in range(self.programs):
            if told is not None:
                told(done + 1, self.programs)

    def reset(self) -> None:
        self.resets += 1

    def launch(self, plan) -> Launched:
        if self.fails is not None:
            raise self.fails
        return Launched(plan)

    def results(self, launched) -> Found:
        time.sleep(self.takes_s)
        assert self.go_on.wait(60)
        found = Found()
        for chunk in launched.plan.chunks:
            tokens = (LETTER,) if chunk.last and chunk.request.max_tokens else ()
            found.results[chunk.row] = Result(tokens)
        for decode in launched.plan.decodes:
            found.results[decode.row] = Result((LETTER,) * decode.count)
        return found


def pretend_engine(**options) -> AsyncEngine:
    """Made in milliseconds; nothing is compiled."""
    with pretended():
        return AsyncEngine(model(), byte_tokenizer(), limits=LIMITS, buckets=(1, 4), **options)


@contextlib.contextmanager
def pretended() -> Iterator[None]:
    """Inside, engines get a pretended device."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "Device", PretendDevice)
        patch.setattr(module, "form_for", lambda *rest: (None, []))
        yield


def model():
    if not _models:
        _models.append(build(CONFIG))
    return _models[0]


_models: list = []


@contextlib.contextmanager
def engine(**options) -> Iterator[tuple[AsyncEngine, PretendDevice]]:
    """An engine at work, and its device."""
    made = pretend_engine(**options)
    made.warm_up()
    device: Any = made._loop.device
    try:
        yield made, device
    finally:
        device.go_on.set()
        made.close()
