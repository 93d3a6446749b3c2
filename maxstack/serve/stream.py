"""One request's answer in the event loop of whoever asked."""

import asyncio
import time
from collections import deque
from collections.abc import Callable

from maxstack.serve.adapters import Held
from maxstack.serve.news import News
from maxstack.serve.output import Answer, Delta, Output


class Stream:
    """One request's answer, as its event loop sees it."""

    def __init__(
        self, answer: Answer, loop: asyncio.AbstractEventLoop, clock: Callable[[], float] = time.monotonic,
        adapter: Held | None = None,
    ):  # fmt: skip
        self.answer, self.loop, self.adapter = answer, loop, adapter
        self._clock, self.asked = clock, clock()
        self.admitted: float | None = None
        self.first: float | None = None
        self.ended: float | None = None
        """When it was asked for, given a row, answered with a first token, and done, on the engine's clock."""
        self._new: deque[Delta] = deque()
        self._waiting: asyncio.Future[None] | None = None
        self._wants_all = False

    @property
    def id(self) -> str:
        """The request's."""
        return self.answer.output.id

    def take(self, news: News) -> None:
        """Take in news, in the event loop."""
        if self.admitted is None:
            self.admitted = news.admitted
        if self.first is None and news.tokens:
            self.first = self._clock()
        delta = self.answer.take(news)
        if self.answer.done and self.ended is None:
            self.ended = self._clock()
        if not self._wants_all:
            self._new.append(delta)
        if (
            self._waiting is not None
            and not self._waiting.done()
            and (self.answer.done or not self._wants_all)
        ):
            self._waiting.set_result(None)

    async def next(self) -> Delta:
        """What was added since the last call, all of it: a slow reader gets larger pieces. Raises the request's
        error where it failed."""
        if not self._new:
            await self._until(lambda: bool(self._new) or self.answer.done)
        whole = self._new.popleft() if self._new else Delta()
        while self._new:
            whole.add(self._new.popleft())
        if self.answer.error is not None:
            raise self.answer.error
        return whole

    async def whole(self) -> Output:
        """The answer when it is done. Raises the request's error where it failed."""
        self._wants_all = True
        await self._until(lambda: self.answer.done)
        if self.answer.error is not None:
            raise self.answer.error
        return self.answer.output

    async def _until(self, so: Callable[[], bool]) -> None:
        while not so():
            self._waiting = self.loop.create_future()
            try:
                await self._waiting
            finally:
                self._waiting = None
