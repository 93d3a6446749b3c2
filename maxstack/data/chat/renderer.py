"""Messages to ids and loss mask, by the model's own template: the one object for training, serving and evaluation."""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Protocol, runtime_checkable

from maxstack.config import UserError
from maxstack.data.chat.calls import CallForm, call_form, takes_tools
from maxstack.data.chat.encoding import Spanned, encode
from maxstack.data.chat.fence import Fence, Span
from maxstack.data.chat.messages import REASONING, Message, checked_messages, checked_tools
from maxstack.data.chat.supervision import Conversation, Supervise, supervised_spans
from maxstack.data.chat.template import ChatTemplate, plain_data
from maxstack.data.chat.tool_templates import tool_template_for

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
"""For models that come without a template."""
_TAG = "\U0010fffb"  # private use: where the last message stops, when it is to be continued
_RESERVED = ("messages", "tools", "documents", "add_generation_prompt")
_SHOWN = 2000


@runtime_checkable
class ChatTokenizer(Spanned, Protocol):
    """The part of a Tokenizer that a renderer needs."""

    special_tokens: dict[str, str]
    added_tokens: dict[str, bool]
    chat_template: str | dict[str, str] | None


@dataclass(frozen=True)
class Rendered:
    """A conversation as a model reads it. Nothing is to be added to the ids, a begin token least of all."""

    ids: list[int]
    mask: list[bool]
    """True where the model itself is to say the token."""
    text: str
    supervised: list[Span]
    """The spans of characters of `text` that the mask is of."""


class ChatRenderer:
    """Renders conversations for one tokenizer by one template.

    A template that prints the date takes it from `now`; give a fixed one where runs are to be repeated.
    """

    def __init__(
        self,
        tokenizer: ChatTokenizer,
        template: str,
        *,
        tool_template: str | None = None,
        now: Callable[[], datetime] = datetime.now,
    ):
        """`tool_template` is used instead where tools are given. Raises UserError for templates that cannot be used."""
        self.template = template
        """The jinja text."""
        self._built_from = tokenizer, template, tool_template, now
        self._main = ChatTemplate(template, now=now)
        self._for_tools = (
            ChatTemplate(tool_template, where="the chat template for tools", now=now)
            if tool_template
            else None
        )
        self._tokens = dict(tokenizer.special_tokens)
        specials = {text for text, special in tokenizer.added_tokens.items() if special} | {
            *self._tokens.values()
        }
        self._tokenizer, self._fence = tokenizer, Fence(tuple(specials))
        self._forms: dict[str, CallForm] = {}
        self._tools: dict[str, bool] = {}
        begin, end = self._tokens.get("bos_token"), self._tokens.get("eos_token")
        self._ends = tuple(specials - ({begin} - {end}))

    def __call__(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = False,
        continue_final_message: bool = False,
        supervise: Supervise = "all",
        trust_assistant: bool = False,
        **variables: Any,
    ) -> Rendered:
        """Messages (OpenAI's shape) as ids, mask and text; `variables` go to the template (`enable_thinking`, …).

        `add_generation_prompt` opens an answer at the end; `continue_final_message` leaves the last message open. With
        either it is a prompt, whose mask is all False. Else `supervise` chooses whose turns the mask has: "all" of the
        assistant's or the "last". Raises UserError for messages that are wrong or that the template refuses, and for
        a template whose assistant turns cannot be told for certain.

        The text of a special token in a message stays text, so that nobody ends a turn that is not theirs;
        `trust_assistant` lets it be the token in what the assistant says (InternLM2 writes its tool calls so).
        """
        prompt = add_generation_prompt or continue_final_message
        if supervise not in ("all", "last"):
            raise UserError(f'supervise is {supervise!r}; it must be "all" or "last"')
        if add_generation_prompt and continue_final_message:
            raise UserError(
                "add_generation_prompt opens a new answer and continue_final_message the last one: choose one"
            )
        taken = sorted({*variables} & {*_RESERVED})
        if taken:
            raise UserError(f"{', '.join(taken)} is no variable of a template's own")
        conversation = self._conversation(messages, tools, documents, variables)
        template = self._main if not conversation.variables["tools"] else self._for_tools or self._main
        conversation = self._fitted(template, conversation)
        given = conversation.given(prompt=add_generation_prompt)
        render = _continued(template) if continue_final_message else template.render
        text = render(given)
        plain = self._brought(template, render, given, text, tuple(variables), trust_assistant)
        spans = [] if prompt else supervised_spans(template, conversation, text, self._ends, supervise)
        encoded = encode(self._tokenizer, text, plain)
        return Rendered(encoded.ids, encoded.mask(spans), text, spans)

    def sample(self, messages: Sequence[Message], **options: Any) -> Rendered:
        """A conversation to train on; options as of a call.

        Raises UserError where nothing in it is supervised, and where it has reasoning for which the template has no
        place.
        """
        done = self(messages, **options)
        if not any(done.mask):
            raise UserError(
                f"nothing in this sample is supervised: {_why(messages)}. It renders as\n{done.text[:_SHOWN]}"
            )
        reasoned = any(message.get(key) for message in messages for key in REASONING)
        if reasoned and not self._main.reads_reasoning:
            raise UserError(
                "a message has reasoning_content, for which the chat template has no place: leave it out, or write it "
                "into content with the model's own tags"
            )
        return done

    def _brought(
        self,
        template: ChatTemplate,
        render: Callable[[dict[str, Any]], str],
        given: dict[str, Any],
        text: str,
        variables: tuple[str, ...],
        trusting: bool,
    ) -> list[Span]:
        """Spans of the text where messages, tools or variables hold the text of a special token."""
        names = ("tools", "documents", *variables)
        messages = [one for one in given["messages"] if not (trusting and one["role"] == "assistant")]
        if not self._fence.needed([*messages, *(given[name] for name in names)]):
            return []
        fenced = given | {name: self._fence.around(given[name], text) for name in names}
        foreign = {id(one) for one in messages}
        fenced["messages"] = [
            self._fence.around(one, text) if id(one) in foreign else one for one in given["messages"]
        ]
        spans = self._fence.spans(render(fenced), text)
        if spans is None:
            raise UserError(
                f"a message holds the text of a special token, and {template.where} reads or changes it there, so that "
                "it cannot be kept from becoming that token: take it out of the message"
            )
        return spans

    def _fitted(self, template: ChatTemplate, conversation: Conversation) -> Conversation:
        """The conversation with tool calls in the form that the template takes."""
        if conversation.variables["tools"] and not self._takes_tools(template, conversation):
            raise UserError(f"{template.where} has no place for tools: describe them in the system message")
        if not any("tool_calls" in message for message in conversation.messages):
            return conversation
        if template.where not in self._forms:
            self._forms[template.where] = call_form(template, conversation.variables)
        form = self._forms[template.where]
        return conversation._replace(messages=[form.of(message) for message in conversation.messages])

    @property
    def has_tools(self) -> bool:
        """Whether the template has a place for tools, or there is another one for them."""
        nothing: dict[str, Any] = {"tools": None, "documents": None}
        return self._takes_tools(self._for_tools or self._main, Conversation([], self._tokens | nothing))

    def _takes_tools(self, template: ChatTemplate, conversation: Conversation) -> bool:
        if template.where not in self._tools:
            self._tools[template.where] = takes_tools(template, conversation.variables)
        return self._tools[template.where]

    def __reduce__(self):
        # A compiled template stays in its process; data workers compile it again.
        tokenizer, template, tool_template, now = self._built_from
        return functools.partial(ChatRenderer, tool_template=tool_template, now=now), (tokenizer, template)

    def _conversation(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] | None,
        documents: Sequence[Mapping[str, Any]] | None,
        variables: Mapping[str, Any],
    ) -> Conversation:
        if documents is not None and not all(isinstance(one, Mapping) for one in documents):
            raise UserError('documents must be a list of objects such as {"title": …, "text": …}')
        shared = {
            "tools": checked_tools(tools),
            "documents": None if documents is None else plain_data(list(documents), "documents"),
        }
        own = {name: plain_data(value, name) for name, value in variables.items()}
        return Conversation(checked_messages(messages), {**self._tokens, **shared, **own})


def _why(messages: Sequence[Message]) -> str:
    if not any(message["role"] == "assistant" for message in messages):
        return "it has no message of the assistant"
    return (
        "it is a prompt"
        if messages[-1]["role"] != "assistant"
        else "the template writes nothing of the assistant's"
    )


def _continued(template: ChatTemplate) -> Callable[[dict[str, Any]], str]:
    """Rendering that leaves the last message open, by a mark at the end of its content."""

    def render(given: dict[str, Any]) -> str:
        *before, last = given["messages"]
        if not last.get("content"):
            raise UserError("continue_final_message needs a last message with content to continue")
        marked = {**last, "content": f"{last['content']}{_TAG} "}
        head, found, tail = template.render({**given, "messages": [*before, marked]}).rpartition(_TAG)
        if not found:
            raise UserError(f"{template.where} leaves out the last message, so that it cannot be continued")
        # Where the blank after the mark was stripped, the message's own would have been.
        return head if tail.startswith(" ") else head.rstrip()

    return render


def renderer_for(
    tokenizer: ChatTokenizer, template: str | None = None, *, now: Callable[[], datetime] = datetime.now
) -> ChatRenderer:
    """The renderer for a tokenizer by its own template, or by another one: jinja text, or "chatml".

    Of several templates of a tokenizer the one named "default" is taken, and "tool_use" where tools are given; for some
    models whose own has no place for tools one is known here. Raises UserError where there is none.
    """
    if template == "chatml":
        return ChatRenderer(tokenizer, CHATML, now=now)
    if template is not None:
        return ChatRenderer(tokenizer, template, now=now)
    own = tokenizer.chat_template
    if not own:
        raise UserError(
            'this tokenizer has no chat template, as base models have none: give one (jinja text, or "chatml"), or put '
            "chat_template.jinja beside the tokenizer"
        )
    if isinstance(own, str):
        for_tools = tool_template_for(own, tokenizer.added_tokens)
        return ChatRenderer(tokenizer, own, tool_template=for_tools, now=now)
    if "default" not in own and len(own) > 1:
        raise UserError(
            f"this tokenizer has templates {', '.join(sorted(own))} and none is the default: give one's text"
        )
    default = own.get("default") or next(iter(own.values()))
    return ChatRenderer(tokenizer, default, tool_template=own.get("tool_use"), now=now)
