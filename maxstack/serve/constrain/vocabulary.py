"""Our tokenizer as llguidance knows one: the bytes of each token, and how text is cut into them."""

import functools
from collections.abc import Sequence

import llguidance

from maxstack.config import UserError
from maxstack.data.tokenizer import Tokenizer

_GUARDS = ("\n", "\t", "0")
"""One goes before a text, and off again, where the tokenizer begins each text with a blank."""


class Words:
    """What `llguidance.TokenizerWrapper` asks for."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, end_ids: Sequence[int]):
        """One token more than the vocabulary stands for the end where it has none."""
        self._tokenizer = tokenizer
        known = min(vocab_size, tokenizer.vocab_size)
        spelled = token_bytes(tokenizer, known)
        self.tokens = [*spelled, *([b""] * (vocab_size - known)), b"<|end of answer|>"]
        self.eos_token_id = next(iter(end_ids), vocab_size)
        self.bos_token_id = tokenizer.bos_id
        specials = {*tokenizer.special_ids, *end_ids, vocab_size}
        self.special_token_ids = sorted(i for i in specials if i <= vocab_size)
        self._guards = [(guard, tokenizer.encode(guard)) for guard in _GUARDS]

    def __call__(self, text: str | bytes) -> list[int]:
        """The tokens that the model's tokenizer would write this text with, in the middle of others."""
        if isinstance(text, bytes):
            raise TypeError("text is wanted, not bytes")  # llguidance tries which one it is
        for guard, ids in self._guards:
            found = self._tokenizer.encode(guard + text)
            rest = found[len(ids) :]
            if found[: len(ids)] == ids and self._bytes(rest) == text.encode():
                return rest
        found = self._tokenizer.encode(text)
        return found if self._bytes(found) == text.encode() else self._greedy(text.encode())

    def _bytes(self, ids: Sequence[int]) -> bytes:
        return b"".join(self.tokens[i] for i in ids)

    def _greedy(self, text: bytes) -> list[int]:
        """Longest tokens first: for text that the tokenizer itself changes. What no token has is left out."""
        found, at = [], 0
        while at < len(text):
            length = next((n for n in range(self._longest, 0, -1) if text[at : at + n] in self._ids), 1)
            found += [self._ids[text[at : at + length]]] if text[at : at + length] in self._ids else []
            at += length
        return found

    @functools.cached_property
    def _ids(self) -> dict[bytes, int]:
        special = set(self.special_token_ids)
        return {token: i for i, token in enumerate(self.tokens) if token and i not in special}

    @functools.cached_property
    def _longest(self) -> int:
        return max(map(len, self._ids), default=1)


def token_bytes(tokenizer: Tokenizer, count: int) -> list[bytes]:
    """What each of the first tokens adds to a text that has begun; nothing for ids without a token."""
    assembly = tokenizer.assembly()
    tokens = map(tokenizer.token, range(count))
    return [b"" if token is None else assembly.bytes_of(token) for token in tokens]


def vocabulary(tokenizer: Tokenizer, vocab_size: int, end_ids: Sequence[int]) -> llguidance.LLTokenizer:
    """llguidance's tokenizer. Takes a quarter of a second for 50,000 tokens.

    Raises UserError for a tokenizer whose tokens stand for no certain text.
    """
    words = Words(tokenizer, vocab_size, end_ids)
    try:
        return llguidance.LLTokenizer(
            llguidance.TokenizerWrapper(words),
            n_vocab=vocab_size + 1,
            eos_token=[i for i in end_ids if i < vocab_size] or [vocab_size],
        )
    except ValueError as error:
        raise UserError(f"this tokenizer cannot be used for constrained answers: {error}") from error
