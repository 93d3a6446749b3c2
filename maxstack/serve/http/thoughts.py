"""How many tokens of an answer are thoughts."""

from collections.abc import Sequence

from maxstack.chat.reasoning import Splitter
from maxstack.data.tokenizer import StreamDecoder, Tokenizer


class ThoughtTokens:
    """Counts the tokens of one answer's thoughts as they come, those of the tags too. Costs nothing behind them."""

    def __init__(self, tokenizer: Tokenizer, tags: tuple[str, str] | None, prompt: str):
        self._splitter = Splitter(tags, prompt)
        self._words = StreamDecoder(tokenizer, keep=tags or ())
        self._came = 0
        self.count = 0

    def take(self, tokens: Sequence[int]) -> int:
        """More of the answer; how many of these are thoughts."""
        before = self.count
        for token in tokens:
            if self._splitter.place == "after":
                break
            self._came += 1
            self._splitter.push(self._words.push(token))
            if self._splitter.thought:
                self.count = self._came
        return self.count - before
