"""Stand-ins for model, tokenizer and template: one token a character, ChatML, answers as scripted."""

import dataclasses
import io
from collections.abc import Iterator, Sequence
from typing import Any

from maxstack.chat.conversation import Conversation
from maxstack.chat.keyboard import Interrupts
from maxstack.chat.screen import Screen
from maxstack.chat.settings import Settings
from maxstack.chat.talk import Talk
from maxstack.config import UserError
from maxstack.models.generation import Event, SamplingParams, Session

START, END = 1, 2  # <|im_start|>, <|im_end|>
SPECIAL = {START: "<|im_start|>", END: "<|im_end|>"}


class Tokenizer:
    """Code points as ids."""

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        return "".join("" if skip_special and i in SPECIAL else SPECIAL.get(i, chr(i)) for i in ids)


@dataclasses.dataclass
class Rendered:
    ids: list[int]
    mask: list[int]
    text: str


class Renderer:
    """ChatML. `thinking` opens each answer with <think>; `system` allows system messages."""

    def __init__(self, *, template: str = "", opens: str = "", system: bool = True):
        self.template, self._opens, self._system = template, opens, system
        self.options: dict[str, Any] = {}

    def __call__(self, messages, *, add_generation_prompt: bool = False, **options: Any) -> Rendered:
        self.options = options
        ids: list[int] = []
        mask: list[int] = []
        for message in messages:
            if message["role"] == "system" and not self._system:
                raise UserError("the template has no system message")
            said = [*map(ord, message["content"]), END]
            head = [START, *map(ord, message["role"] + "\n")]
            ids += [*head, *said, ord("\n")]
            mask += [0] * len(head) + [int(message["role"] == "assistant")] * len(said) + [0]
        if add_generation_prompt:
            ids += [START, *map(ord, "assistant\n" + self._opens)]
        mask += [0] * (len(ids) - len(mask))
        return Rendered(ids, mask, Tokenizer().decode(ids, skip_special=False))


class Writer:
    """Says the scripted answers one after the other, a character a token, and keeps the prompts it was given."""

    def __init__(self, *answers: str | BaseException, state: Any = "cache"):
        self.answers, self.state = list(answers), state
        self.prompts: list[list[int]] = []
        self.params: list[SamplingParams] = []
        self.reused: list[int] = []
        self.closed = 0

    def stream(
        self, prompts: Sequence[Sequence[int]], params: SamplingParams, *, session: Session | None = None
    ) -> Iterator[Event]:
        [prompt] = prompts
        self.prompts.append(list(prompt))
        self.params.append(params)
        self.reused.append(session.common(prompt))
        return self._said(list(prompt), self.answers.pop(0), params, session)

    def _said(self, prompt: list[int], text: str | BaseException, params: SamplingParams, session: Session):
        said: list[int] = []
        try:
            if isinstance(text, BaseException):
                raise text
            for i, letter in enumerate(text):
                if letter == "\x03":
                    raise KeyboardInterrupt
                said.append(ord(letter))
                last = i + 1 == params.max_tokens
                yield Event(0, (ord(letter),), letter, None, "length" if last else None)
                if last:
                    return
            yield Event(0, (), "", None, "stop")
        finally:
            self.closed += 1
            session.ids, session.state = [*prompt, *said], self.state


def conversation(
    writer: Writer, *, renderer: Renderer | None = None, context: int = 1000, **sampling
) -> Conversation:
    settings = Settings(sampling=SamplingParams(**({"max_tokens": 100} | sampling)))
    return Conversation(writer, renderer or Renderer(), context=context, model="stand-in", settings=settings)


class Terminal(io.StringIO):
    """A file that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def talk(writer: Writer, *, terminal: bool = False, **options) -> tuple[Talk, io.StringIO, io.StringIO]:
    """A talk, and what it writes to standard output and standard error."""
    kind = Terminal if terminal else io.StringIO
    out, err = kind(), kind()
    screen = Screen(out=out, err=err)
    return Talk(conversation(writer, **options), Tokenizer(), screen, Interrupts()), out, err
