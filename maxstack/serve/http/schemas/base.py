"""What all requests' schemas share: nothing unknown, nothing guessed, everything bounded."""

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

MOST_TEXT = 2_000_000
"""Characters of any text; the body is bounded besides."""

Text = Annotated[str, Field(max_length=MOST_TEXT)]
Name = Annotated[str, Field(min_length=1, max_length=256)]
TokenId = Annotated[int, Field(ge=0, lt=2**31)]
Object = dict[str, Any]


MOST_FIELDS = 128


def few(value: Any, most: int) -> Any:
    """The value, unless it is an object with more fields than that; a million errors are worth no memory.

    For the same reason the first wrong entry of a list is enough (`fail_fast`).
    """
    if isinstance(value, Mapping) and len(value) > most:
        raise ValueError(f"at most {most} fields, got {len(value)}")
    return value


def at_most(most: int) -> BeforeValidator:
    """A bound on an object's fields that is looked at before they are."""
    return BeforeValidator(lambda value: few(value, most))


class Schema(BaseModel):
    """A request or a part of one. A field that it does not know is refused, as OpenAI does; a text is no number."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, protected_namespaces=())

    @model_validator(mode="before")
    @classmethod
    def _few(cls, value: Any) -> Any:
        return few(value, MOST_FIELDS)


class StreamOptions(Schema):
    """How a stream ends."""

    include_usage: bool | None = None
    """A last chunk without choices, with the usage."""
    include_obfuscation: bool | None = None
    """Taken and not acted on: chunks have no padding."""
    continuous_usage_stats: bool | None = None
    """The usage so far in each chunk."""
