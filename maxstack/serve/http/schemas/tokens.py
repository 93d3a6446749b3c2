"""The requests of /tokenize, /detokenize and /v1/embeddings."""

from typing import Annotated, Literal

from pydantic import Field

from maxstack.serve.http.schemas.base import Name, Object, Schema, Text, TokenId, at_most
from maxstack.serve.http.schemas.chat import Message, Tool
from maxstack.serve.http.schemas.completions import MOST_IDS, Prompt
from maxstack.serve.http.schemas.sampling import Label
from maxstack.serve.request import PRIORITIES


class TokenizeRequest(Schema):
    """A text, or a conversation as the model reads it."""

    model: Name | None = None
    prompt: Text | None = None
    messages: Annotated[list[Message], Field(min_length=1, max_length=4096, fail_fast=True)] | None = None
    add_special_tokens: bool | None = None
    """Begin a text with the token for the start of a document: by default, as completions do."""
    parse_special: bool | None = None
    """Take the names of special tokens in a text for those tokens: by default, as completions do."""
    return_token_strs: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    tools: Annotated[list[Tool], Field(max_length=128, fail_fast=True)] | None = None
    chat_template_kwargs: Annotated[dict[Name, object], at_most(32)] | None = None
    documents: Annotated[list[Object], Field(max_length=1024, fail_fast=True)] | None = None


class DetokenizeRequest(Schema):
    """Tokens to be read."""

    model: Name | None = None
    tokens: Annotated[list[TokenId], Field(max_length=MOST_IDS, fail_fast=True)]
    skip_special_tokens: bool | None = None


class EmbeddingsRequest(Schema):
    """Texts or tokens, each to become a vector."""

    model: Name | None = None
    input: Prompt
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Annotated[int, Field(ge=1, le=1_000_000)] | None = None
    user: Label | None = None

    # Extensions.
    pooling: Literal["mean", "last"] | None = None
    """The mean of all tokens' final states, or the last one's."""
    normalize: bool | None = None
    """To a length of 1, which is the default, as OpenAI's are."""
    priority: Annotated[int, Field(ge=-PRIORITIES, le=PRIORITIES)] | None = None
    timeout_s: Annotated[float, Field(gt=0, le=86_400)] | None = None
