"""Messages of maxstack.proto to the requests that HTTP's routes check, and answers back."""

from collections.abc import Iterable
from typing import Any

from google.protobuf.json_format import MessageToDict
from pydantic import BaseModel, ValidationError

from maxstack.models.generation.output import TokenLogprobs
from maxstack.serve.http.errors import refused, validation_error
from maxstack.serve.http.schemas.chat import ChatRequest
from maxstack.serve.http.schemas.completions import CompletionRequest
from maxstack.serve.http.schemas.sampling import finite
from maxstack.serve.http.schemas.tokens import EmbeddingsRequest
from maxstack.serve.rpc import maxstack_pb2 as pb

LISTS = ("stop", "stop_token_ids")
OF_COMPLETION = ("logprobs", "prompt_logprobs", "add_special_tokens", "parse_special")
OF_CHAT = (
    "parallel_tool_calls", "reasoning_effort", "add_generation_prompt", "continue_final_message",
)  # fmt: skip


def sampling_of(message: pb.Sampling) -> dict[str, Any]:
    """The fields that were given, under the names that they have over HTTP too."""
    fields: dict[str, Any] = {}
    for field, value in message.ListFields():
        if field.name in LISTS:
            fields[field.name] = list(value)
        elif field.name == "logit_bias":
            fields[field.name] = {str(token): bias for token, bias in value.items()}
        elif field.name == "structured_outputs":
            fields[field.name] = form_of(value)
        else:
            fields[field.name] = value
    return fields


def form_of(message: pb.StructuredOutputs) -> dict[str, Any]:
    """The form of the answer."""
    which = message.WhichOneof("form")
    if which is None:
        raise refused("structured_outputs has no form: give one of its fields", "structured_outputs")
    return {which: list(message.choice.texts) if which == "choice" else getattr(message, which)}


def completion_of(message: pb.GenerateRequest, *, stream: bool) -> CompletionRequest:
    """A completion. Raises ApiError for what HTTP would refuse too."""
    which = message.WhichOneof("prompt")
    if which is None:
        raise refused(
            "Missing required parameter: 'text' or 'token_ids'.", "text", "missing_required_parameter"
        )
    fields = sampling_of(message.sampling) | _model(message) | {"stream": stream}
    fields["prompt"] = list(message.token_ids.ids) if which == "token_ids" else message.text
    return checked(CompletionRequest, fields | _given(message, OF_COMPLETION))


def chat_of(message: pb.ChatRequest, *, stream: bool) -> ChatRequest:
    """A chat. Raises ApiError for what HTTP would refuse too."""
    fields = sampling_of(message.sampling) | _model(message) | {"stream": stream}
    fields |= _given(message, OF_CHAT)
    fields["messages"] = [_message(one) for one in message.messages]
    if message.tools:
        fields["tools"] = [{"type": "function", "function": _tool(tool)} for tool in message.tools]
    if message.HasField("tool_choice"):
        choice = message.tool_choice
        named = {"type": "function", "function": {"name": choice}}
        fields["tool_choice"] = choice if choice in ("none", "auto", "required") else named
    if message.HasField("chat_template_kwargs"):
        fields["chat_template_kwargs"] = MessageToDict(message.chat_template_kwargs)
    if message.HasField("top_logprobs"):
        fields |= {"logprobs": True, "top_logprobs": message.top_logprobs}
    return checked(ChatRequest, fields)


def embedding_of(message: pb.EmbedRequest) -> EmbeddingsRequest:
    """An embedding. Raises ApiError for what HTTP would refuse too."""
    if bool(message.texts) == bool(message.token_ids):
        raise refused("give one of texts and token_ids", "texts", "missing_required_parameter")
    fields = _model(message) | _given(message, ("pooling", "normalize", "priority"))
    fields["input"] = list(message.texts) or [list(one.ids) for one in message.token_ids]
    return checked(EmbeddingsRequest, fields)


def checked[T: BaseModel](schema: type[T], fields: dict[str, Any]) -> T:
    """A request within its bounds."""
    try:
        return schema.model_validate(fields)
    except ValidationError as error:
        errors: list[Any] = [{**one, "loc": ("body", *one["loc"])} for one in error.errors()]
        raise validation_error(errors, fields) from None


def logprobs_of(found: Iterable[TokenLogprobs | None]) -> list[pb.TokenLogprob]:
    """Log-probabilities of tokens."""
    return [
        pb.TokenLogprob(
            token_id=one.token_id, logprob=finite(one.logprob),
            top=[pb.TopLogprob(token_id=token, logprob=finite(value)) for token, value in one.top],
        )
        for one in found if one is not None
    ]  # fmt: skip


def calls_of(calls: Iterable[dict[str, Any]]) -> list[pb.ToolCall]:
    """Calls, or pieces of them, as HTTP's chunks have them."""
    return [
        pb.ToolCall(
            index=call.get("index", i), id=call.get("id", ""), name=call["function"].get("name", ""),
            arguments=call["function"].get("arguments", ""),
        )
        for i, call in enumerate(calls)
    ]  # fmt: skip


def _model(message: pb.GenerateRequest | pb.ChatRequest | pb.EmbedRequest) -> dict[str, Any]:
    return _given(message, ("model",))


def _given(message: Any, names: Iterable[str]) -> dict[str, Any]:
    """Those of some fields that were given."""
    return {name: getattr(message, name) for name in names if message.HasField(name)}


def _message(message: pb.Message) -> dict[str, Any]:
    fields: dict[str, Any] = {"role": message.role, "content": message.content}
    fields |= _given(message, ("tool_call_id", "reasoning_content", "name"))
    if message.tool_calls:
        fields["tool_calls"] = [
            {"id": call.id, "function": {"name": call.name, "arguments": call.arguments}}
            for call in message.tool_calls
        ]
    return fields


def _tool(tool: pb.Tool) -> dict[str, Any]:
    fields: dict[str, Any] = {"name": tool.name} | _given(tool, ("description", "strict"))
    if tool.HasField("parameters"):
        # A Struct has doubles alone, and a schema's counts are whole numbers.
        fields["parameters"] = _whole(MessageToDict(tool.parameters))
    return fields


def _whole(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _whole(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_whole(each) for each in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value
