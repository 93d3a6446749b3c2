"""What the routes share: the engine under its names, and how a request becomes streams."""

import asyncio
import functools
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from maxstack.chat.ends import Ends, ends_of
from maxstack.chat.parsing import style_for
from maxstack.config import UserError
from maxstack.data.chat import ChatRenderer, renderer_for
from maxstack.models.generation.params import SamplingParams
from maxstack.serve.constrain.constraint import BadConstraint, Constraint
from maxstack.serve.constrain.matching import Compiled
from maxstack.serve.engine import AsyncEngine
from maxstack.serve.http.errors import ApiError, refused
from maxstack.serve.http.manner import Manner, manner_of
from maxstack.serve.http.operation import Operation, Seen
from maxstack.serve.http.schemas.sampling import Sampling
from maxstack.serve.http.settings import Settings
from maxstack.serve.http.spelling import Spelling
from maxstack.serve.stream import Stream

if TYPE_CHECKING:
    from maxstack.serve.constrain.grammars import Grammars

LONG = 20_000
"""Characters above which text is made into tokens beside the event loop, which others wait for."""


@runtime_checkable
class Urgency(Protocol):
    """Of a request: the fields that say it."""

    priority: int | None
    timeout_s: float | None


class Front:
    """One engine behind HTTP."""

    def __init__(self, engine: AsyncEngine, settings: Settings, operation: Operation | None):
        if engine.tokenizer is None:
            raise UserError("the server needs a tokenizer beside the model: requests and answers are text")
        self.engine, self.settings, self.operation = engine, settings, operation
        self.tokenizer = engine.tokenizer
        self.spelling = Spelling(self.tokenizer)
        self.created = int(time.time())
        self._renderer, self._no_chat = None, ""
        try:
            self._renderer = renderer_for(self.tokenizer, settings.chat_template)
            self.ends = ends_of(self._renderer, self.tokenizer)
        except UserError as error:  # a base model: the other routes work
            self._no_chat, self.ends = str(error), Ends((), ())
        if settings.parser is not None:
            style_for(settings.parser)  # a name that is not known is refused now

    @property
    def renderer(self) -> ChatRenderer:
        """Raises where the model has no chat template."""
        if self._renderer is None:
            raise refused(f"this model cannot chat: {self._no_chat}", "messages", "no_chat_template")
        return self._renderer

    @functools.cached_property
    def manner(self) -> Manner:
        """How the model writes calls and thoughts. Raises where it cannot chat."""
        return manner_of(self.renderer, self.tokenizer, self.settings.parser)

    @property
    def names(self) -> tuple[str, ...]:
        """Of the model, the one to show first."""
        return (self.settings.model_name, *self.settings.aliases)

    def adapter(self, model: str | None) -> str | None:
        """The adapter that a request's `model` names, None for the model itself. Raises 404 for other names."""
        if model is None or model in self.names:
            return None
        known = adapters_of(self.engine)
        if model in known:
            return model
        names = ", ".join([*self.names, *known])
        raise ApiError(
            404,
            f"The model '{model}' does not exist; here are: {names}",
            param="model",
            code="model_not_found",
        )

    @functools.cached_property
    def grammars(self) -> "Grammars":
        """What compiles the forms of answers; made when the first is asked for."""
        from maxstack.serve.constrain.grammars import Grammars  # llguidance, which an engine does without

        return Grammars(self.tokenizer, self.engine.config.vocab_size, self.engine.end_ids)

    async def compiled(self, named: tuple[str, Constraint] | None) -> Compiled | None:
        """A form as the engine takes it; `named` has the field that asked for it."""
        if named is None:
            return None
        try:
            return await self.grammars.compile(named[1])
        except BadConstraint as error:
            raise refused(str(error), named[0], "invalid_constraint") from None

    def text_ids(self, text: str, *, begin: bool = True, special: bool = True) -> list[int]:
        """A raw prompt as tokens. Its text is all the caller's, so it may name special tokens, as templates that were
        rendered elsewhere do; it begins like a document, but not twice."""
        own = self.tokenizer
        ids = own.encode(text, special=special)
        wanted = own.bos_id is not None and (not text or own.settings.get("add_bos_token") is not False)
        return [own.bos_id, *ids] if begin and wanted and ids[:1] != [own.bos_id] else ids  # pyrefly: ignore

    async def ids_of(
        self, prompts: Sequence[str | list[int]], begin: bool | None, special: bool | None
    ) -> list[list[int]]:
        """Prompts as tokens."""
        how = {"begin": begin is not False, "special": special is not False}

        def all_of_them() -> list[list[int]]:
            return [self.text_ids(prompt, **how) if isinstance(prompt, str) else prompt for prompt in prompts]

        size = sum(len(prompt) for prompt in prompts if isinstance(prompt, str))
        return await asyncio.to_thread(all_of_them) if size > LONG else all_of_them()

    def room(self, prompt: Sequence[int], asked: int | None, default: int | None) -> int:
        """Tokens that an answer may have: as asked for, else what is left, `default` at most."""
        if asked is not None:
            return asked
        left = self.engine.limits.max_length - len(prompt)
        if left < 1:
            raise refused(
                f"the prompt has {len(prompt)} tokens, and the model holds {self.engine.limits.max_length} with the "
                "answer: shorten it",
                "messages" if default is None else "prompt",
                "context_length_exceeded",
            )
        return left if default is None else min(left, default)

    def check_budget(self, prompts: int, tries: int, max_tokens: int) -> None:
        """Refuse what would be too much for one request."""
        own = self.settings
        rules = (
            (prompts, own.most_prompts, "prompts", "prompt"),
            (tries, own.most_answers, "answers to a prompt", "n"),
            (prompts * tries, own.most_sequences, "prompts times n", "n"),
            (prompts * tries * max_tokens, own.most_tokens, "prompts times n times max_tokens", "max_tokens"),
        )
        for number, most, what, param in rules:
            if number > most:
                raise refused(
                    f"{what}: {number} is more than the {most} of one request", param, "budget_exceeded"
                )

    def options(self, asked: Urgency, adapter: str | None, seen: Seen) -> dict[str, Any]:
        """What the engine is told beside prompt and parameters."""
        limits = [s for s in (asked.timeout_s, self.settings.deadline_s) if s is not None]
        options: dict[str, Any] = {"priority": asked.priority or 0, "deadline_s": min(limits, default=None)}
        options["tenant"] = seen.tenant
        return options | ({} if adapter is None else {"adapter": adapter})

    def open(
        self, ids: Sequence[int], params: SamplingParams, asked: Sampling, answer_id: str, seen: Seen, *,
        tries: int = 1, constraint: Compiled | None = None, adapter: str | None = None,
        keep: Sequence[str] = (),
    ) -> list[Stream]:  # fmt: skip
        """Ask the engine for answers to a prompt, each with a seed of its own."""
        options = self.options(asked, adapter, seen)
        options |= {"constraint": constraint, "keep": keep}
        streams = self.engine.open_choices(ids, params, tries, request_id=answer_id, **options)
        seen.opened = seen.opened or time.monotonic()
        seen.max_tokens += params.max_tokens * tries
        seen.choices += tries
        seen.prompt_tokens += len(ids)
        seen.priority = asked.priority or 0
        return streams


def adapters_of(engine: AsyncEngine) -> tuple[str, ...]:
    """Names of the adapters that are loaded."""
    adapters = getattr(engine, "adapters", None)
    return () if adapters is None else tuple(adapters.names())
