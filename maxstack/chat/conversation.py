"""A conversation: its messages, the room that is left for it, and the answers as they come."""

import dataclasses
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing
from typing import Any, Protocol, cast, runtime_checkable

from maxstack.chat.reasoning import Piece, Splitter, tags_of
from maxstack.chat.settings import Settings
from maxstack.config import UserError
from maxstack.models.generation import Event, SamplingParams, Session

Message = dict[str, Any]
NEARLY_FULL = 0.8
"""Share of the context from which on there is a warning."""


@runtime_checkable
class Writer(Protocol):
    """What writes: a Generator, or a stand-in for one."""

    def stream(
        self, prompts: Sequence[Sequence[int]], params: SamplingParams, *, session: Session | None = None
    ) -> Iterator[Event]:
        """As Generator.stream."""
        ...


@runtime_checkable
class Rendering(Protocol):
    """What the renderer makes of messages."""

    @property
    def ids(self) -> Sequence[int]:
        """As Rendered.ids."""
        ...

    @property
    def mask(self) -> Sequence[bool]:
        """As Rendered.mask."""
        ...

    @property
    def text(self) -> str:
        """As Rendered.text."""
        ...


@runtime_checkable
class Renderer(Protocol):
    """Messages to text and ids by the model's template: a ChatRenderer, or a stand-in for one."""

    template: str

    def __call__(
        self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = False, **variables: Any
    ) -> Rendering:
        """As ChatRenderer."""
        ...


@dataclasses.dataclass
class Figures:
    """What an answer took."""

    prompt_tokens: int
    reused_tokens: int
    """Of the prompt, found in the cache."""
    context: int
    """Tokens that the model can hold."""
    tokens: int = 0
    finish: str = "stopped"
    """stop, length (max_tokens), full (the context), or stopped by the user."""
    first_s: float = 0.0
    """Seconds from the question to the first token."""
    last_s: float = 0.0

    @property
    def per_second(self) -> float:
        """Tokens per second after the first; 0 where there are too few."""
        return (self.tokens - 1) / (self.last_s - self.first_s) if self.last_s > self.first_s else 0.0

    @property
    def used(self) -> int:
        """Tokens of the context that are taken."""
        return self.prompt_tokens + self.tokens


class Conversation:
    """Messages and settings of one conversation with one model.

    The cache is kept between turns: only what is new in the rendered prompt is read.
    """

    def __init__(
        self,
        writer: Writer,
        renderer: Renderer,
        *,
        context: int,
        model: str = "",
        settings: Settings | None = None,
        stops: Sequence[str] = (),
    ):
        """`context` is how many tokens of prompt and answer the model can hold; `stops` end an answer too."""
        self._writer, self._render, self.context = writer, renderer, context
        self.model, self.settings, self._stops = model, settings or Settings(), tuple(stops)
        self.messages: list[Message] = []
        self.figures: Figures | None = None
        """Of the last answer."""
        self._session = Session()
        self._tries = 0

    @property
    def system(self) -> str | None:
        """The system message."""
        first = self.messages[0] if self.messages else None
        return first["content"] if first and first["role"] == "system" else None

    def set_system(self, text: str) -> None:
        """Set it, or remove it with "". Raises UserError where the template has no place for one."""
        rest = self.messages[1:] if self.system is not None else self.messages
        changed = [{"role": "system", "content": text}, *rest] if text else rest
        self.check(changed)
        self.messages = list(changed)

    def check(self, messages: Sequence[Message]) -> None:
        """Raises UserError where the template refuses that a talk goes on from these messages."""
        self.render([*messages, {"role": "user", "content": "?"}], generate=True)

    def reset(self) -> None:
        """Forget all but the system message and the settings."""
        self.messages = self.messages[:1] if self.system is not None else []
        self.figures, self._tries = None, 0

    def render(self, messages: Sequence[Message] | None = None, *, generate: bool = False) -> Rendering:
        """Messages, by default all, as the model reads them; `generate` opens an answer at the end."""
        own = self.messages if messages is None else messages
        return self._render(own, add_generation_prompt=generate, **self.settings.template)

    def ask(self, text: str, stopped: Callable[[], bool] = lambda: False) -> Generator[Piece]:
        """The answer to a question, as it comes, until it ends or `stopped()`.

        However it ends (closed and interrupted included), what came of it is kept as the answer; when nothing came,
        the question is taken back. Raises UserError, with the conversation as before, when the context is full or the
        template refuses the messages.
        """
        self._tries = 0
        yield from self._answered([*self.messages, {"role": "user", "content": text}], stopped)

    def again(self, stopped: Callable[[], bool] = lambda: False) -> Generator[Piece]:
        """Another answer in place of the last one, with the next seed."""
        if not self.messages or self.messages[-1]["role"] != "assistant":
            raise UserError("there is no answer yet to make again")
        self._tries += 1
        yield from self._answered(self.messages[:-1], stopped)

    def _answered(self, messages: list[Message], stopped: Callable[[], bool]) -> Generator[Piece]:
        start = time.perf_counter()
        rendered = self.render(messages, generate=True)
        params = self._params(len(rendered.ids))
        reused = 0 if self._session.state is None else self._session.common(rendered.ids)
        figures = Figures(len(rendered.ids), reused, self.context)
        said: dict[str, str] = {"answer": "", "reasoning": ""}
        splitter = Splitter(tags_of(self._render.template), rendered.text)
        whole = False
        try:
            with closing(self._pieces(rendered.ids, params, splitter, figures, start, stopped)) as pieces:
                for piece in pieces:
                    said[piece.kind] += piece.text
                    yield piece
            whole = True
        except (KeyboardInterrupt, RuntimeError, OSError, MemoryError):
            self._session = Session()  # it was left in the middle of something
            raise
        finally:
            if figures.finish == "length" and params.max_tokens < self.settings.sampling.max_tokens:
                figures.finish = "full"
            if not whole:  # nobody is left to show it to, but it was said
                for piece in splitter.finish():
                    said[piece.kind] += piece.text
            if any(said.values()) or whole:
                self.messages, self.figures = [*messages, answer(said)], figures

    def _pieces(
        self, prompt: Sequence[int], params: SamplingParams, splitter: Splitter, figures: Figures, start: float,
        stopped: Callable[[], bool],
    ) -> Generator[Piece]:  # fmt: skip
        with closing(cast(Any, self._writer.stream([prompt], params, session=self._session))) as events:
            for event in events:
                figures.last_s = time.perf_counter() - start
                figures.first_s = figures.first_s or figures.last_s
                figures.tokens += len(event.token_ids)
                figures.finish = event.finish_reason or figures.finish
                yield from splitter.push(event.text)
                if event.finish_reason is None and stopped():
                    break
        yield from splitter.finish()

    def _params(self, prompt_tokens: int) -> SamplingParams:
        """The settings, cut to the room that is left, with a seed of this try."""
        own, longest = self.settings.sampling, self.context
        room = longest - prompt_tokens
        if room < 1:
            raise UserError(
                f"the context is full: the conversation with this question has {prompt_tokens:,} tokens, and the model "
                f"holds {longest:,}; start anew with /reset, or ask something shorter"
            )
        seed = (own.seed + self._tries) % 2**32
        stop = (*own.stop, *self._stops)
        return dataclasses.replace(own, max_tokens=min(own.max_tokens, room), seed=seed, stop=stop)


def answer(said: Mapping[str, str]) -> Message:
    """The message that an answer becomes."""
    message = {"role": "assistant", "content": said["answer"]}
    return message | ({"reasoning_content": said["reasoning"]} if said["reasoning"] else {})
