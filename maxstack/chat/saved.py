"""Conversations as files: JSON with the messages, the settings and the model's name."""

import json
from pathlib import Path
from typing import Any

from maxstack.chat.conversation import Conversation, Message
from maxstack.chat.settings import from_plain
from maxstack.config import UserError, write_atomically

FORMAT, VERSION = "maxstack conversation", 1
LARGEST_FILE = 64 * 2**20
"""Bytes of a conversation that are read at most."""
FIELDS = {
    "system": {"role", "content"},
    "user": {"role", "content"},
    "assistant": {"role", "content", "reasoning_content"},
}


def save(conversation: Conversation, file: Path) -> None:
    """Write it as a whole. Raises UserError where it cannot be, and rather than replace anything but a conversation."""
    if file.exists():
        try:
            read(file)
        except UserError as error:
            raise UserError(
                f"{file} is there and holds no conversation, so it is left alone: choose another name"
            ) from error
    if not file.parent.is_dir():
        raise UserError(f"{file.parent} is no folder: make it, or choose another one")
    content = {
        "format": FORMAT,
        "version": VERSION,
        "model": conversation.model,
        "settings": conversation.settings.plain(),
        "messages": conversation.messages,
    }
    write_atomically(file, (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode())


def load(conversation: Conversation, file: Path) -> str:
    """Take messages and settings from a file; returns the name of the model that they are from.

    Raises UserError for whatever is wrong with it, and for messages that this model's template refuses; the
    conversation stays as it was then.
    """
    content = read(file)
    settings = from_plain(content.get("settings", {}))
    messages = checked(content.get("messages"), file)
    before = conversation.settings
    conversation.settings = settings
    try:
        conversation.check(messages)
    except UserError:
        conversation.settings = before
        raise
    conversation.reset()
    conversation.messages = messages
    return str(content.get("model", ""))


def read(file: Path) -> dict[str, Any]:
    """A conversation's file, its messages not yet looked at. Raises UserError for any other thing."""
    try:
        if not file.is_file():
            raise UserError(f"{file} is no file" if file.exists() else f"{file} is not there")
        if file.stat().st_size > LARGEST_FILE:
            raise UserError(f"{file} has {file.stat().st_size:,} bytes: at most {LARGEST_FILE:,} are read")
        content = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{file} is not JSON: {error}") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise UserError(f'{file} holds no conversation: /save writes one, with "format": "{FORMAT}"')
    if content.get("version") != VERSION:
        raise UserError(f"{file} is of version {content.get('version')!r}: this program reads {VERSION}")
    return content


def checked(messages: Any, file: Path) -> list[Message]:
    """The messages, if they are a system message or none, then questions and answers in turn."""
    if not isinstance(messages, list):
        raise UserError(f"{file}: messages is no list")
    for i, message in enumerate(messages):
        if not isinstance(message, dict) or message.get("role") not in FIELDS:
            raise UserError(f"{file}: messages[{i}] needs a role: one of {', '.join(FIELDS)}")
        known = FIELDS[message["role"]]
        wrong = [name for name, value in message.items() if name not in known or not isinstance(value, str)]
        if wrong or "content" not in message:
            raise UserError(
                f"{file}: messages[{i}] needs content and may have {', '.join(sorted(known))}, all of them texts"
                + (f"; {', '.join(wrong)} is not" if wrong else "")
            )
    turns = [message["role"] for message in messages]
    turns = turns[1:] if turns[:1] == ["system"] else turns
    expected = ["user", "assistant"] * (len(turns) // 2)
    if turns != expected:
        at = next(
            (i for i, (a, b) in enumerate(zip(turns, expected, strict=False)) if a != b), len(turns) - 1
        )
        raise UserError(
            f"{file}: question and answer must take turns, a system message first or none; not so at turn {at + 1}"
        )
    return messages
