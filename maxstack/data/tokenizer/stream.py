"""Decoding while tokens come."""

from collections.abc import Collection

from maxstack.data.tokenizer.tokenizer import Tokenizer


class StreamDecoder:
    """Text of a sequence as it grows, in constant time a token.

    What `push` gave, joined, and `finish` are `tokenizer.decode` of the whole; never is half a character given out.
    """

    def __init__(self, tokenizer: Tokenizer, *, skip_special: bool = True, keep: Collection[str] = ()):
        """`keep` are special tokens whose texts come all the same: marks that somebody looks for. Raises UserError for
        a tokenizer whose decoder cannot be followed token by token."""
        self._tokenizer = tokenizer
        kept = map(tokenizer.token_id, keep)
        self._skipped = tokenizer.special_ids.difference(kept) if skip_special else frozenset()
        self._assembly = tokenizer.assembly()

    def push(self, token_id: int) -> str:
        """The text that this token makes certain, often "" or more than its own."""
        token = None if token_id in self._skipped else self._tokenizer.token(token_id)
        return "" if token is None else self._assembly.add(token)

    def finish(self) -> str:
        """The rest: U+FFFD for a character that was never completed. The decoder is then ready for a new sequence."""
        rest, self._assembly = self._assembly.end(), self._tokenizer.assembly()
        return rest
