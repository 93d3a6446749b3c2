"""The engine for code that is not async.

engine = Engine(model, tokenizer)
[output] = engine.generate(["The capital of France is"], SamplingParams(max_tokens=8, temperature=0.0))
"""

import asyncio
import threading
from collections.abc import Coroutine, Iterator, Sequence
from types import TracebackType
from typing import Any, Self

from maxstack.data.tokenizer import Tokenizer
from maxstack.models.generation.params import SamplingParams
from maxstack.models.transformer import Transformer
from maxstack.serve.adapters import Adapters
from maxstack.serve.embedding import Embedding
from maxstack.serve.engine import AsyncEngine, Params, Prompt
from maxstack.serve.output import Delta, Output


class Engine:
    """`AsyncEngine` for code that is not async: the same, with an event loop of its own in a thread."""

    def __init__(self, model: Transformer, tokenizer: Tokenizer | None = None, **options: Any):
        """`options` are those of `AsyncEngine`."""
        self.asynchronous = AsyncEngine(model, tokenizer, **options)
        self._events = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._events.run_forever, name="maxstack-answers", daemon=True)
        self._thread.start()

    @property
    def adapters(self) -> Adapters:
        """Loads and unloads adapters by name."""
        return self.asynchronous.adapters

    def warm_up(self) -> None:
        """Compile everything, and begin to work."""
        self.asynchronous.warm_up()

    def generate(
        self, prompts: Sequence[Prompt], params: Params | None = None, **options: Any
    ) -> list[Output]:
        """The whole answer to each prompt; `params` are for all or one a prompt."""
        params = SamplingParams() if params is None else params
        return self._wait(self.asynchronous.generate(prompts, params, **options))

    def stream(self, prompt: Prompt, params: SamplingParams | None = None, **options: Any) -> Iterator[Delta]:
        """The answer piece by piece."""
        pieces = self.asynchronous.stream(prompt, params or SamplingParams(), **options)
        try:
            while True:
                try:
                    yield self._wait(pieces.__anext__())
                except StopAsyncIteration:
                    return
        finally:
            self._wait(pieces.aclose())

    def best_of(
        self, prompt: Prompt, params: SamplingParams, n: int, best_of: int, **options: Any
    ) -> list[Output]:
        """The `n` likeliest of `best_of` answers, the likeliest first."""
        return self._wait(self.asynchronous.best_of(prompt, params, n, best_of, **options))

    def score(self, prompt: Prompt, most: int = 0, **options: Any) -> Output:
        """The prompt's log-probabilities (`prompt_logprobs`); nothing is generated."""
        return self._wait(self.asynchronous.score(prompt, most, **options))

    def embed(self, prompt: Prompt, pooling: str = "mean", **options: Any) -> Embedding:
        """The prompt as a vector."""
        return self._wait(self.asynchronous.embed(prompt, pooling, **options))

    def swap_weights(self, model: Transformer, within_s: float | None = None) -> None:
        """Serve other weights of the same shapes: requests that have begun finish on the old ones, others wait."""
        self._wait(self.asynchronous.swap_weights(model, within_s))

    def abort(self, request_id: str) -> None:
        """End a request."""
        self._events.call_soon_threadsafe(self.asynchronous.abort, request_id)

    def close(self) -> None:
        """Stop working, and let go of the threads."""
        self.asynchronous.close()
        if not self._events.is_closed():
            self._events.call_soon_threadsafe(self._events.stop)
            self._thread.join()
            self._events.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _wait[T](self, work: Coroutine[Any, Any, T]) -> T:
        future = asyncio.run_coroutine_threadsafe(work, self._events)
        try:
            return future.result()
        except KeyboardInterrupt:
            future.cancel()
            raise
