"""Tokens to text as they come: no half characters, nothing that may turn out to begin a stop string."""

from collections.abc import Collection, Sequence

from maxstack.data.tokenizer import StreamDecoder, Tokenizer


class StopFinder:
    """Holds text back while it may be the beginning of a stop string."""

    def __init__(self, stops: Sequence[str]):
        self._stops, self._held = tuple(stops), ""

    def push(self, text: str) -> tuple[str, bool]:
        """(text that no stop string can take back, whether one was found); the stop string is left out."""
        if not self._stops:
            return text, False
        self._held += text
        places = [place for stop in self._stops if (place := self._held.find(stop)) >= 0]
        if places:
            out, self._held = self._held[: min(places)], ""
            return out, True
        keep = max((overlap(self._held, stop) for stop in self._stops), default=0)
        cut = len(self._held) - keep
        out, self._held = self._held[:cut], self._held[cut:]
        return out, False

    def finish(self) -> str:
        """What was held back and turned out to begin nothing."""
        out, self._held = self._held, ""
        return out


def overlap(text: str, stop: str) -> int:
    """The longest end of the text that begins `stop`."""
    if stop[:1] not in text:
        return 0
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)


class TextStream:
    """A row's text: `push` each token, then `finish` unless a stop string was found."""

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str] = (), keep: Collection[str] = ()):
        self._words, self._stops = StreamDecoder(tokenizer, keep=keep), StopFinder(stops)

    def push(self, token: int, *, early: bool = False) -> tuple[str, bool]:
        """(text that is final, whether a stop string has ended the row). Nothing of `early` tokens ends
        it."""
        text = self._words.push(token)
        return (text, False) if early else self._stops.push(text)

    def finish(self) -> tuple[str, bool]:
        """(the rest of the text, whether a stop string was in it)."""
        text, stopped = self._stops.push(self._words.finish())
        return (text, True) if stopped else (text + self._stops.finish(), False)
