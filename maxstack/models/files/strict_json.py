"""JSON from a file that nobody vouches for."""

import json
from typing import Any, NoReturn

from maxstack.models.files.source import shown

# As the safetensors library has it; the largest published headers have a few MB.
MOST_BYTES = 100_000_000


class BadJSON(ValueError):
    """What is wrong with the text, to be completed with where it lies."""


def parse_object(text: bytes) -> dict[str, Any]:
    """A JSON object in UTF-8, without duplicate keys, NaN or infinities. Raises BadJSON."""
    if len(text) > MOST_BYTES:
        raise BadJSON(f"{len(text):,} bytes of JSON; {MOST_BYTES:,} is the most there can be")
    try:
        value = json.loads(text.decode(), object_pairs_hook=_unique, parse_constant=_refuse)
    except RecursionError as error:
        raise BadJSON("JSON that is nested without end") from error
    except BadJSON:
        raise
    except ValueError as error:  # not JSON, not UTF-8, an integer of thousands of digits
        raise BadJSON(f"no valid JSON ({str(error)[:120]})") from error
    if not isinstance(value, dict):
        raise BadJSON("JSON that is no object")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise BadJSON(f"JSON in which {shown(twice)} comes twice")
    return found


def _refuse(word: str) -> NoReturn:
    raise BadJSON(f"JSON with {word}, which is no number")
