"""The request of /v1/chat/completions."""

from typing import Annotated, Literal

from pydantic import Field

from maxstack.models.generation.params import MOST_LOGPROBS
from maxstack.serve.http.errors import refused
from maxstack.serve.http.schemas.base import Name, Object, Schema, Text, at_most
from maxstack.serve.http.schemas.sampling import MOST_NEW, Sampling

FunctionName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{1,64}$")]


class Part(Schema):
    """A part of a message's content. Only text is supported; others are told so by name."""

    type: Annotated[str, Field(max_length=64)]
    text: Text | None = None
    refusal: Text | None = None
    image_url: Object | Text | None = None
    input_audio: Object | None = None
    file: Object | None = None
    prompt_cache_breakpoint: Object | None = None


class CalledFunction(Schema):
    """What an assistant called."""

    name: Name
    arguments: Text | Object | None = None


class Call(Schema):
    """A call in an assistant's message."""

    id: Name | None = None
    type: Literal["function"] = "function"
    function: CalledFunction
    index: int | None = None


class Message(Schema):
    """A message of any role."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    type: Literal["text", "message"] | None = None
    """Says nothing; some clients send it."""
    content: Text | Annotated[list[Part], Field(max_length=1024, fail_fast=True)] | None = None
    name: Name | None = None
    tool_calls: Annotated[list[Call], Field(max_length=128, fail_fast=True)] | None = None
    tool_call_id: Name | None = None
    reasoning_content: Text | None = None
    reasoning: Text | None = None
    # As the clients send back what they were given.
    refusal: Text | None = None
    annotations: Annotated[list[Object], Field(max_length=128, fail_fast=True)] | None = None
    audio: Object | None = None
    function_call: Object | None = None


class Function(Schema):
    """What may be called."""

    name: FunctionName
    description: Text | None = None
    parameters: Object | None = None
    strict: bool | None = None


class Tool(Schema):
    """A function that the model may call."""

    type: Literal["function"]
    function: Function


class NamedFunction(Schema):
    """The name of a function."""

    name: FunctionName


class NamedTool(Schema):
    """The tool that must be called."""

    type: Literal["function"]
    function: NamedFunction


class JsonSchema(Schema):
    """A schema that the answer must fit."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")] = "schema"
    description: Text | None = None
    schema_: Object | None = Field(None, alias="schema")
    strict: bool | None = None


class ResponseFormat(Schema):
    """The form of the answer."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class ChatRequest(Sampling):
    """A conversation to be answered."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=4096, fail_fast=True)]
    max_completion_tokens: Annotated[int, Field(ge=1, le=MOST_NEW)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MOST_LOGPROBS)] | None = None
    tools: Annotated[list[Tool], Field(max_length=128, fail_fast=True)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    response_format: ResponseFormat | None = None
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = None
    """Given to the chat template under this name."""
    store: Literal[False] | None = None
    """Nothing is stored."""
    modalities: Annotated[list[Literal["text"]], Field(max_length=1)] | None = None
    verbosity: Literal["low", "medium", "high"] | None = None
    """Taken and not acted on."""

    chat_template_kwargs: Annotated[dict[Name, object], at_most(32)] | None = None
    """Variables of the chat template."""
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    """Go on with the last message instead of answering it."""
    documents: Annotated[list[Object], Field(max_length=1024, fail_fast=True)] | None = None
    include_reasoning: bool | None = None

    def check(self) -> None:
        """Raise for fields that do not go together."""
        super().check()
        if self.top_logprobs is not None and not self.logprobs:
            raise refused("top_logprobs go with logprobs only: set it to true", "top_logprobs")
