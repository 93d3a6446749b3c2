"""The form in which a template takes a message that calls tools: templates differ, and say so only by failing."""

import itertools
import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from maxstack.config import UserError
from maxstack.data.chat.supervision import Conversation
from maxstack.data.chat.template import ChatTemplate

_QUESTION = "probe question"
_CALL = {
    "id": "call00000",
    "type": "function",
    "function": {"name": "probe_call", "arguments": {"probe_key": "probe"}},
}
_AFTER = (
    {"role": "tool", "content": "probe result", "tool_call_id": "call00000", "name": "probe_call"},
    {"role": "assistant", "content": "probe answer"},
)
_TOOL = {
    "type": "function",
    "function": {
        "name": "probe_tool",
        "description": "A probe.",
        "parameters": {
            "type": "object",
            "properties": {"probe_key": {"type": "string", "description": "A probe."}},
        },
    },
}


def takes_tools(template: ChatTemplate, variables: Mapping[str, Any]) -> bool:
    """Whether a template writes out the tools that it is given."""
    given = Conversation([{"role": "user", "content": _QUESTION}], {**variables, "tools": [_TOOL]}).given(
        prompt=True
    )
    return "probe_tool" in template.render(given)


class CallForm(NamedTuple):
    """How arguments and a missing content are given."""

    text_arguments: bool
    """As JSON text (DeepSeek V3 writes them beside other text) and not as an object."""
    content: str | None
    """None, "" (Qwen3 looks into it) or "absent", which leaves the key out."""

    def of(self, message: Mapping[str, Any]) -> Mapping[str, Any]:
        """The message in this form."""
        if "tool_calls" not in message:
            return message
        done = {**message, "tool_calls": [self._call(call) for call in message["tool_calls"]]}
        if message["content"] is None:
            done["content"] = self.content
            if self.content == "absent":
                del done["content"]
        return done

    def _call(self, call: Mapping[str, Any]) -> dict[str, Any]:
        function = dict(call["function"])
        if self.text_arguments:
            function["arguments"] = json.dumps(function["arguments"], ensure_ascii=False)
        return {**call, "function": function}


def call_form(template: ChatTemplate, variables: Mapping[str, Any]) -> CallForm:
    """The first form in which a call comes out whole, at the end and amid others. Raises UserError where none does."""
    forms = [CallForm(*each) for each in itertools.product((False, True), (None, "absent", ""))]
    ending = [form for form in forms if _whole(template, variables, form, ())]
    amid = [form for form in ending if _whole(template, variables, form, _AFTER)]
    if not ending:
        raise UserError(
            f"{template.where} has no place for tool calls: write them into content as the model spells them"
        )
    return (amid or ending)[0]


def _whole(
    template: ChatTemplate, variables: Mapping[str, Any], form: CallForm, after: Sequence[Mapping[str, Any]]
) -> bool:
    call = form.of({"role": "assistant", "content": None, "tool_calls": [_CALL]})
    messages = [{"role": "user", "content": _QUESTION}, call, *after]
    try:
        text = template.render(Conversation(messages, variables).given()).rpartition(_QUESTION)[2]
    except UserError:
        return False
    # Not an object in Python's spelling, JSON inside of a JSON text, or a content of None that is written out.
    wrong = ("{'probe_key'", '\\"probe_key', "None")
    return "probe_call" in text and "probe_key" in text and not any(word in text for word in wrong)
