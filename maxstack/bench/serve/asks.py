"""What is asked of a server: drawn at random, or read from a trace."""

import json
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import Any

from maxstack.config import UserError
from maxstack.serve.load import Load

# Common words: with a space before it, each is one token of most vocabularies. The server's own count is reported.
WORDS = (
    "the of and to in that is was for it with as his on be at by had not are but from or have an they which one you "
    "were her all she there would their we him been has when who will more no if out so said what up its about into "
    "than them can only other new some could time these two may then do first any my now such like our over man me "
    "even most made after also did many before must through back years where much your way well down should because "
    "each just those people how too little state good very make world still own see men work long get here between "
    "both life being under never day same another know while last might us great old year off come since against go "
    "came right used take three"
).split()


@dataclass(frozen=True, kw_only=True)
class Ask:
    """One request."""

    prompt: str | tuple[int, ...]
    """Text, or token ids."""
    tokens: int
    """Of the answer."""
    at_s: float | None = None
    """When it is sent, in seconds from the start; None as soon as a client is free."""
    system: str | tuple[int, ...] = ""
    """What it begins with, and others too."""


def drawn(load: Load, vocabulary: int | None = None) -> list[Ask]:
    """The requests of a load, with the lengths and times that the simulator draws for the same seed.

    Prompts are words, or, where the size of a `vocabulary` is given, token ids below it.
    """
    random, content = Random(load.seed), Random(load.seed + 1)
    system, now, asks = _content(content, load.shared, vocabulary), 0.0, []
    for _ in range(load.requests):
        if load.rate is not None:
            now += random.expovariate(load.rate)
        own, tokens = load.prompt.draw(random), load.answer.draw(random)
        asks.append(
            Ask(
                prompt=_content(content, own, vocabulary), tokens=tokens,
                at_s=None if load.rate is None else now, system=system,
            )
        )  # fmt: skip
    return asks


def _content(random: Random, count: int, vocabulary: int | None) -> str | tuple[int, ...]:
    if vocabulary is None:
        return " ".join(random.choices(WORDS, k=count))
    # Special tokens are mostly at the ends of a vocabulary.
    return tuple(random.randrange(vocabulary // 8, vocabulary - vocabulary // 8) for _ in range(count))


def from_trace(file: Path, *, speed: float = 1.0, vocabulary: int | None = None) -> list[Ask]:
    """The requests of a trace: a JSON object a line, with `arrival` (seconds), `output_tokens`, and one of `prompt`
    (text or token ids) and `prompt_tokens` (how many). Their times are divided by `speed`.

    Raises UserError for a line that is none, with its number.
    """
    asks, random = [], Random(0)
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        if line.strip():
            try:
                asks.append(_row(json.loads(line), random, vocabulary))
            except (ValueError, TypeError) as error:
                raise UserError(
                    f"{file}, line {number}: {error}; a line is "
                    '{"arrival": seconds, "prompt": text or token ids, "output_tokens": count}, '
                    'with "prompt_tokens": count instead of "prompt" where the text is not known'
                ) from error
    if not asks:
        raise UserError(f"{file} has no request")
    first = min(ask.at_s or 0.0 for ask in asks)
    asks = [replace(ask, at_s=((ask.at_s or 0.0) - first) / speed) for ask in asks]
    return sorted(asks, key=lambda ask: ask.at_s or 0.0)


def _row(row: Any, random: Random, vocabulary: int | None) -> Ask:
    if not isinstance(row, dict):
        raise ValueError("not an object")
    arrival, tokens, prompt = row.get("arrival", 0.0), row.get("output_tokens"), row.get("prompt")
    if not isinstance(arrival, int | float) or not 0 <= arrival < 1e9:
        raise ValueError(f"arrival is {arrival!r}")
    if not isinstance(tokens, int) or tokens < 1:
        raise ValueError(f"output_tokens is {tokens!r}")
    if prompt is None:
        count = row.get("prompt_tokens")
        if not isinstance(count, int) or count < 1:
            raise ValueError(f"prompt_tokens is {count!r}, and there is no prompt")
        prompt = _content(random, count, vocabulary)
    if isinstance(prompt, list) and all(isinstance(token, int) for token in prompt):
        prompt = tuple(prompt)
    if not isinstance(prompt, str | tuple) or not prompt:
        raise ValueError(f"prompt is {prompt!r:.40}")
    return Ask(prompt=prompt, tokens=tokens, at_s=float(arrival))


def write_trace(file: Path, asks: Iterable[Ask]) -> None:
    """Keep requests for another time."""
    lines = []
    for ask in asks:
        prompt = (
            f"{ask.system} {ask.prompt}".strip()
            if isinstance(ask.prompt, str)
            else [*ask.system, *ask.prompt]
        )
        lines.append(json.dumps({"arrival": ask.at_s or 0.0, "prompt": prompt, "output_tokens": ask.tokens}))
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
