"""From the spellings of tokens to text, one token at a time: what a definition's decoder does to a whole sequence.

Three forms cover the models here. Byte-level BPE spells each byte as a character. SentencePiece's spells a space as
"▁" and, where it falls back on bytes, a byte as "<0xE4>"; a space at the very start belongs to no word and is dropped.
Metaspace, in older files, is the second without bytes.
"""

import codecs
import functools
import json
import re
from typing import Any

import tokenizers

from maxstack.config import UserError

BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


@functools.cache
def byte_characters() -> tuple[str, ...]:
    """The printable character byte-level BPE writes for each byte: itself where printable, else from U+0100 up."""
    plain = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = iter(range(256, 512))
    return tuple(chr(byte) if byte in plain else chr(next(others)) for byte in range(256))


@functools.cache
def _byte_of() -> dict[str, int]:
    return {char: byte for byte, char in enumerate(byte_characters())}


def decoder_steps(inner: tokenizers.Tokenizer) -> list[dict[str, Any]]:
    """The decoder of a definition as a flat list of its steps; none for one without."""
    if inner.decoder is None:
        return []
    steps = json.loads(inner.decoder.__getstate__())
    return steps["decoders"] if steps["type"] == "Sequence" else [steps]


def has_byte_fallback(inner: tokenizers.Tokenizer) -> bool:
    """Whether some tokens stand for single bytes, and the decoder is one that can be followed token by token."""
    steps = decoder_steps(inner)
    return any(step["type"] == "ByteFallback" for step in steps) and followed(steps)


def followed(steps: list[dict[str, Any]]) -> bool:
    """Whether `Assembly` can do what a decoder's steps do."""
    kinds = [step["type"] for step in steps]
    if kinds in ([], ["ByteLevel"], ["Metaspace"]):
        return True
    # Of the whole text only the start may change: what ends it, no one knows while it grows.
    strings = all("String" in step["pattern"] for step in steps if step["type"] == "Replace")
    stops = any(step["stop"] for step in steps if step["type"] == "Strip")
    pattern = r"(Replace )*(ByteFallback )?((Fuse )(Strip )?)?"
    return strings and not stops and re.fullmatch(pattern, "".join(f"{k} " for k in kinds)) is not None


class Assembly:
    """Joins the spellings of tokens to text; gives out what is certain, never half a character."""

    def __init__(self, inner: tokenizers.Tokenizer):
        """Raises UserError for a decoder that does something else to the text."""
        steps = decoder_steps(inner)
        if not followed(steps):
            kinds = ", ".join(step["type"] for step in steps)
            raise UserError(
                f"decoding token by token knows ByteLevel, Metaspace and SentencePiece's decoders; this one is {kinds}"
            )
        by_type = {step["type"]: step for step in steps}
        self._byte_level = "ByteLevel" in by_type
        self._replace = [(s["pattern"]["String"], s["content"]) for s in steps if s["type"] == "Replace"]
        self._metaspace = by_type.get("Metaspace")
        self._fallback = "ByteFallback" in by_type
        strip = by_type.get("Strip", {"content": " ", "start": 0})
        self._strip, self._strip_left = strip["content"], strip["start"]
        self._glue = " " if not steps else ""
        self._first = True
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._run = b""

    def add(self, token: str) -> str:
        """Text that is certain once this token has come; "" while a character is incomplete."""
        if self._byte_level:
            table = _byte_of()
            known = all(char in table for char in token)
            return self._utf8.decode(bytes(map(table.__getitem__, token)) if known else token.encode())
        if self._fallback and (byte := BYTE.fullmatch(token)):
            self._run += bytes([int(byte[1], 16)])
            text = self._readable()
        else:
            text = self._end_run() + self._spelled(token)
        self._first = False
        return self._stripped(text)

    def bytes_of(self, token: str) -> bytes:
        """What a token adds to a text that has begun, also where that is part of a character."""
        table = _byte_of()
        if self._byte_level and all(char in table for char in token):
            return bytes(map(table.__getitem__, token))
        if self._fallback and (byte := BYTE.fullmatch(token)):
            return bytes([int(byte[1], 16)])
        for old, new in self._replace:
            token = token.replace(old, new)
        if self._metaspace:
            token = token.replace(self._metaspace["replacement"], " ")
        return (self._glue + token).encode()

    def end(self) -> str:
        """What is still held back: bytes of an incomplete character, as U+FFFD."""
        if self._byte_level:
            return self._utf8.decode(b"", final=True)
        return self._stripped(self._end_run())

    def _spelled(self, token: str) -> str:
        for old, new in self._replace:
            token = token.replace(old, new)
        if self._metaspace:
            bare = self._first and self._metaspace.get("prepend_scheme") != "never"
            token = token.replace(self._metaspace["replacement"], "" if bare else " ")
        return token if self._first else self._glue + token

    def _readable(self) -> str:
        """The characters of the run of bytes that are whole; a byte that can begin none is U+FFFD, by itself."""
        text = ""
        while self._run:
            try:
                text, self._run = text + self._run.decode(), b""
            except UnicodeDecodeError as error:
                text += self._run[: error.start].decode()
                self._run = self._run[error.start :]
                if error.reason == "unexpected end of data":
                    break
                text, self._run = text + "\ufffd", self._run[1:]
        return text

    def _end_run(self) -> str:
        text, self._run = "\ufffd" * len(self._run), b""
        return text

    def _stripped(self, text: str) -> str:
        while self._strip_left and text:
            if not text.startswith(self._strip):
                self._strip_left = 0
                break
            text, self._strip_left = text[1:], self._strip_left - 1
        return text
