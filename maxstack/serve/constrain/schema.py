"""A JSON schema looked over before anything is made of it."""

import json
from typing import Any

from maxstack.serve.constrain.constraint import BadConstraint, Bounds

_REFERENCES = ("$ref", "$dynamicRef", "$recursiveRef")


def checked_schema(value: Any, bounds: Bounds) -> dict[str, Any]:
    """The schema as an object. Raises BadConstraint for what is none, is too deep, or refers to another place."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise BadConstraint(f"json_schema: it is not JSON: {error}") from error
    if value is True:
        return {}
    if not isinstance(value, dict):
        raise BadConstraint(f"json_schema: a schema is an object or true, not {type(value).__name__}")
    _check(value, bounds)
    # Settings of llguidance's own that a schema could carry are nobody's to send.
    return {key: inner for key, inner in value.items() if key != "x-guidance"}


def _check(value: Any, bounds: Bounds) -> None:
    waiting = [(value, 0)]
    while waiting:
        one, depth = waiting.pop()
        if depth > bounds.depth:
            raise BadConstraint(f"json_schema: it is nested more than {bounds.depth} deep")
        if isinstance(one, dict):
            for key in _REFERENCES:
                place = one.get(key)
                if isinstance(place, str) and not place.startswith("#"):
                    raise BadConstraint(
                        f"json_schema: {key} {place[:200]!r} leads out of the schema, and nothing is fetched: put "
                        'what it means under "$defs"'
                    )
            waiting += [(inner, depth + 1) for inner in one.values()]
        elif isinstance(one, list):
            waiting += [(inner, depth + 1) for inner in one]
