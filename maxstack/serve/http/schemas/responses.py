"""The request of /v1/responses."""

from typing import Annotated, Literal

from pydantic import Field

from maxstack.models.generation.params import MOST_LOGPROBS
from maxstack.serve.http.schemas.base import Name, Object, Schema, Text, TokenId, at_most
from maxstack.serve.http.schemas.chat import FunctionName, Part
from maxstack.serve.http.schemas.sampling import MOST_NEW, Biases, Label, Metadata
from maxstack.serve.request import PRIORITIES

Kind = Annotated[str, Field(max_length=64)]


class ContentPart(Part):
    """A part of an item's content. Those of answers come back as they were given out."""

    annotations: Annotated[list[Object], Field(max_length=1024, fail_fast=True)] | None = None
    logprobs: Annotated[list[Object], Field(fail_fast=True)] | None = None
    detail: Kind | None = None
    file_id: Text | None = None
    image_url: Object | Text | None = None


class Item(Schema):
    """One item of the input. Which fields it needs, `type` says; a message has none."""

    type: Kind = "message"
    id: Name | None = None
    status: Kind | None = None
    role: Literal["system", "developer", "user", "assistant"] | None = None
    content: Text | Annotated[list[ContentPart], Field(max_length=1024, fail_fast=True)] | None = None
    phase: Kind | None = None
    call_id: Name | None = None
    name: Name | None = None
    arguments: Text | None = None
    output: Text | Annotated[list[ContentPart], Field(max_length=1024, fail_fast=True)] | None = None
    summary: Annotated[list[Object], Field(max_length=1024, fail_fast=True)] | None = None
    encrypted_content: Text | None = None


class FunctionTool(Schema):
    """A function that the model may call. Other kinds of tool are not run here."""

    type: Literal["function"]
    name: FunctionName
    description: Text | None = None
    parameters: Object | None = None
    strict: bool | None = None


class NamedFunctionTool(Schema):
    """The tool that must be called."""

    type: Literal["function"]
    name: FunctionName


class TextFormat(Schema):
    """The form of the answer."""

    type: Literal["text", "json_object", "json_schema"]
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")] | None = None
    description: Text | None = None
    schema_: Object | None = Field(None, alias="schema")
    strict: bool | None = None


class TextConfig(Schema):
    """How text is answered."""

    format: TextFormat | None = None
    verbosity: Literal["low", "medium", "high"] | None = None


class ReasoningConfig(Schema):
    """How much is thought before."""

    effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = None
    summary: Kind | None = None
    generate_summary: Kind | None = None


class ResponseStreamOptions(Schema):
    """How a stream is written."""

    include_obfuscation: bool | None = None


class ResponsesRequest(Schema):
    """An input to be answered. Nothing is stored: a conversation is sent whole each time."""

    input: Text | Annotated[list[Item], Field(min_length=1, max_length=4096, fail_fast=True)]
    model: Name | None = None
    instructions: Text | None = None
    max_output_tokens: Annotated[int, Field(ge=1, le=MOST_NEW)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MOST_LOGPROBS)] | None = None
    tools: Annotated[list[FunctionTool], Field(max_length=128, fail_fast=True)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedFunctionTool | None = None
    parallel_tool_calls: bool | None = None
    max_tool_calls: Annotated[int, Field(ge=1, le=1024)] | None = None
    text: TextConfig | None = None
    reasoning: ReasoningConfig | None = None
    stream: bool | None = None
    stream_options: ResponseStreamOptions | None = None
    include: Annotated[list[Kind], Field(max_length=16)] | None = None
    truncation: Literal["disabled"] | None = None
    background: Literal[False] | None = None
    store: bool | None = None
    """Taken; the answer says false."""
    previous_response_id: Name | None = None
    conversation: Object | Text | None = None
    prompt: Object | None = None

    # Taken and not acted on.
    user: Label | None = None
    metadata: Metadata | None = None
    service_tier: Kind | None = None
    safety_identifier: Label | None = None
    prompt_cache_key: Label | None = None

    # Extensions, as in chat.
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    top_k: Annotated[int, Field(ge=-1, lt=2**31)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=10)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    logit_bias: Biases | None = None
    stop_token_ids: Annotated[list[TokenId], Field(max_length=256, fail_fast=True)] | None = None
    priority: Annotated[int, Field(ge=-PRIORITIES, le=PRIORITIES)] | None = None
    timeout_s: Annotated[float, Field(gt=0, le=86_400)] | None = None
    chat_template_kwargs: Annotated[dict[Name, object], at_most(32)] | None = None
