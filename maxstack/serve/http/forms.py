"""The form that an answer must have, of all the ways in which a request may say it."""

from typing import Any

from maxstack.chat.parsing import Style
from maxstack.serve.constrain.constraint import Constraint
from maxstack.serve.constrain.tools import ToolCalls
from maxstack.serve.http.errors import refused
from maxstack.serve.http.schemas.chat import ChatRequest, NamedTool, ResponseFormat
from maxstack.serve.http.schemas.completions import CompletionRequest
from maxstack.serve.http.schemas.sampling import Sampling

Named = tuple[str, Constraint]
"""The field that asked for it, and the constraint."""


def form_of(asked: ChatRequest | CompletionRequest) -> Named | None:
    """The one form that a request asks for by schema, expression, grammar or choice. Raises where it asks for two."""
    found = [*_format(asked.response_format), *_guided(asked)]
    if len(found) > 1:
        names = " and ".join(name for name, _ in found)
        raise refused(f"{names} each say what form the answer has: give one", found[1][0])
    return found[0] if found else None


def _format(format_: ResponseFormat | None) -> list[Named]:
    if format_ is None or format_.type == "text":
        return []
    if format_.type == "json_object":
        return [("response_format", Constraint("json_object"))]
    where = "response_format.json_schema"
    if format_.json_schema is None or format_.json_schema.schema_ is None:
        raise refused(f"{where}.schema is missing", f"{where}.schema", "missing_required_parameter")
    return [(where, Constraint("json_schema", format_.json_schema.schema_))]


def _guided(asked: Sampling) -> list[Named]:
    own = asked.structured_outputs
    given: list[tuple[str, Any, Any]] = [
        ("guided_json", "json_schema", asked.guided_json),
        ("guided_regex", "regex", asked.guided_regex),
        ("guided_choice", "choice", asked.guided_choice),
        ("guided_grammar", "grammar", asked.guided_grammar),
    ]
    if own is not None:
        given += [
            ("structured_outputs.json", "json_schema", own.json_),
            ("structured_outputs.regex", "regex", own.regex),
            ("structured_outputs.choice", "choice", own.choice),
            ("structured_outputs.grammar", "grammar", own.grammar),
        ]
    found = [(name, Constraint(kind, value)) for name, kind, value in given if value is not None]
    if own is not None and own.json_object:
        found.append(("structured_outputs.json_object", Constraint("json_object")))
    return found


def calls_of(asked: ChatRequest, style: Style) -> Named | None:
    """The form that tools make of an answer: calls that must be, or whose arguments must fit; None where they are the
    model's own affair. `style` is how the model writes them."""
    choice, tools = asked.tool_choice, [tool.model_dump(exclude_none=True) for tool in asked.tools or ()]
    names = [tool["function"]["name"] for tool in tools]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise refused(f"tools: there are two functions {twice!r}", "tools")
    if isinstance(choice, NamedTool):
        tools = [tool for tool in tools if tool["function"]["name"] == choice.function.name]
    required = choice == "required" or isinstance(choice, NamedTool)
    if required and not tools:
        raise refused("tool_choice asks for a call, and tools has no such function", "tool_choice")
    strict = any(tool["function"].get("strict") for tool in tools)
    parallel = asked.parallel_tool_calls is not False
    if choice == "none" or not tools or not (required or strict or not parallel):
        return None
    # Of a named function there is one call.
    parallel = parallel and not isinstance(choice, NamedTool)
    return "tools", Constraint(
        "tools", ToolCalls(style=style.name, tools=tools, required=required, parallel=parallel)
    )
