"""The lines that begin with a slash. A fault is a UserError with what to do; none of them ends the program."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, Protocol, runtime_checkable

from maxstack.chat import saved
from maxstack.chat.conversation import Conversation
from maxstack.chat.rendered import Decoder, runs
from maxstack.chat.screen import Screen
from maxstack.chat.settings import unknown
from maxstack.config import UserError


@runtime_checkable
class Talking(Protocol):
    """What commands work on."""

    conversation: Conversation
    screen: Screen
    tokenizer: Decoder

    def again(self) -> None:
        """Show another answer in place of the last."""
        ...


class Command(NamedTuple):
    """What a word does."""

    usage: str
    help: str
    run: Callable[[Talking, str], None] | None
    """Takes the rest of the line; None leaves the program."""


def system(talk: Talking, rest: str) -> None:
    """The system message: set, removed or shown."""
    if rest:
        talk.conversation.set_system("" if rest in ('""', "''") else rest)
    now = talk.conversation.system
    talk.screen.note("no system message" if now is None else f"system message: {now}")


def reset(talk: Talking, rest: str) -> None:
    """A new conversation."""
    nothing(rest, "/reset")
    talk.conversation.reset()
    talk.screen.note("a new conversation; system message and settings stay")


def save(talk: Talking, rest: str) -> None:
    """The conversation to a file."""
    file = path(rest, "/save FILE")
    saved.save(talk.conversation, file)
    talk.screen.note(f"saved {len(talk.conversation.messages)} messages and the settings in {file}")


def load(talk: Talking, rest: str) -> None:
    """A conversation from a file."""
    file = path(rest, "/load FILE")
    model = saved.load(talk.conversation, file)
    talk.screen.note(f"{len(talk.conversation.messages)} messages and the settings from {file}")
    if model != talk.conversation.model:
        talk.screen.warn(
            f"it was with another model, {model or 'unnamed'}; {talk.conversation.model} goes on with it"
        )


def change(talk: Talking, rest: str) -> None:
    """One setting changed, or all shown."""
    name, _, value = rest.partition(" ")
    if not name:
        talk.screen.table(talk.conversation.settings.rows())
        return
    talk.conversation.settings = talk.conversation.settings.changed(name, value)
    own = name.replace("-", "_")
    shown = [row for row in talk.conversation.settings.rows() if row[0] in (name, own)]
    talk.screen.note(f"{shown[0][0]} is {shown[0][1]}")


def regenerate(talk: Talking, rest: str) -> None:
    """Another answer."""
    nothing(rest, "/regenerate")
    if talk.conversation.settings.sampling.temperature == 0:
        talk.screen.note("the temperature is 0: the answer will be the same")
    talk.again()


def show(talk: Talking, rest: str) -> None:
    """The conversation as the model reads it."""
    nothing(rest, "/show")
    if not talk.conversation.messages:
        raise UserError("there is nothing to show yet: ask something first")
    try:
        rendered = talk.conversation.render()
    except UserError as error:  # the mask of some templates cannot be told; a prompt has none
        talk.screen.warn(f"without the mask: {error}")
        rendered = talk.conversation.render(generate=True)
    talk.screen.runs(runs(rendered, talk.tokenizer))
    supervised = sum(rendered.mask)
    talk.screen.note(
        f"{len(rendered.ids):,} tokens; {supervised:,} that training would teach are underlined, or in ⟦ ⟧"
    )


def help_(talk: Talking, rest: str) -> None:
    """What there is."""
    talk.screen.table([(command.usage, command.help) for command in COMMANDS.values()])
    talk.screen.note(KEYS)


COMMANDS = {
    "/help": Command("/help", "this list", help_),
    "/system": Command("/system [TEXT]", 'set the system message, or show it; "" removes it', system),
    "/set": Command(
        "/set [NAME VALUE]", "change a setting (temperature, top_p, max_tokens, …), or show all", change
    ),
    "/regenerate": Command(
        "/regenerate", "another answer in place of the last, with the next seed", regenerate
    ),
    "/show": Command(
        "/show", "the conversation as the model reads it, special tokens and training mask", show
    ),
    "/reset": Command("/reset", "a new conversation; system message and settings stay", reset),
    "/save": Command("/save FILE", "write messages, settings and the model's name as JSON", save),
    "/load": Command("/load FILE", "go on with a saved conversation", load),
    "/quit": Command("/quit", "leave, as Ctrl-D does", None),
}
KEYS = (
    'Several lines: end a line with \\, or put them between """ and """. A question that begins with a slash: //.\n'
    "Ctrl-C stops an answer, and what was said of it stays; at an empty prompt, twice, it leaves. Ctrl-D leaves."
)


def find(word: str) -> Command:
    """The command of a word. Raises UserError for an unknown one, with the nearest."""
    if word not in COMMANDS:
        raise UserError(
            f"{unknown('command', word, COMMANDS)}. A question that begins with a slash needs two: /{word}"
        )
    return COMMANDS[word]


def nothing(rest: str, usage: str) -> None:
    """Refuses words after a command that takes none."""
    if rest:
        raise UserError(f"{usage} takes nothing after it, not {rest!r}")


def path(rest: str, usage: str) -> Path:
    """The file that a line names."""
    if not rest:
        raise UserError(f"which file? {usage}")
    return Path(rest).expanduser()
