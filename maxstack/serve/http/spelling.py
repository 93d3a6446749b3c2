"""The text of single tokens, as answers show them."""

from collections.abc import Sequence

from maxstack.data.tokenizer import StreamDecoder, Tokenizer
from maxstack.data.tokenizer.pieces import BYTE, byte_characters, decoder_steps


class Spelling:
    """Bytes and texts of one tokenizer's tokens; found once each."""

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer
        kinds = {step["type"] for step in decoder_steps(tokenizer.inner)}
        self._byte_level = "ByteLevel" in kinds
        self._fallback = "ByteFallback" in kinds
        self._byte_of = {char: byte for byte, char in enumerate(byte_characters())}
        self._known: dict[int, bytes] = {}

    def raw(self, token: int) -> bytes:
        """What a token stands for; a special one for its name."""
        if (known := self._known.get(token)) is None:
            known = self._known[token] = self._raw(token)
        return known

    def text(self, token: int) -> str:
        """The same as text: bytes that are no characters become U+FFFD."""
        return self.raw(token).decode(errors="replace")

    def _raw(self, token: int) -> bytes:
        spelled = self.tokenizer.token(token)
        if spelled is None:  # a row of the embedding that no token has
            return f"<{token}>".encode()
        if token in self.tokenizer.special_ids or spelled in self.tokenizer.added_tokens:
            return spelled.encode()
        if self._byte_level and all(char in self._byte_of for char in spelled):
            return bytes(self._byte_of[char] for char in spelled)
        if self._fallback and (byte := BYTE.fullmatch(spelled)):
            return bytes([int(byte[1], 16)])
        return spelled.replace("▁", " ").encode()


class Offsets:
    """Where tokens begin in the text that they make, as they come."""

    def __init__(self, tokenizer: Tokenizer, start: int = 0):
        self._words, self._at = StreamDecoder(tokenizer), start

    def next(self, tokens: Sequence[int]) -> list[int]:
        """Of the next tokens."""
        offsets = []
        for token in tokens:
            offsets.append(self._at)
            self._at += len(self._words.push(token))
        return offsets
