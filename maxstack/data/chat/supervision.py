"""Which characters of a rendered conversation the model itself is to say: the spans that a loss is taken over.

A template that has `{% generation %}` says it. For another one, the loop over messages is watched while it writes,
which gives the text of each message. Of an assistant's text the model does not say what the prompt before it ends with,
the generation prompt (or as much of it as is there: "<｜Assistant｜>" of R1's "<｜Assistant｜><think>\n"), nor white
space at the end. It does say the token that stops it, wherever the template puts that.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

from maxstack.config import UserError
from maxstack.data.chat.fence import Span
from maxstack.data.chat.marks import Marked, Part
from maxstack.data.chat.template import ChatTemplate

Supervise = Literal["all", "last"]
_PROOF = 40  # characters at the end of an answer that must be found in its part


class Conversation(NamedTuple):
    """What a template is given."""

    messages: Sequence[Mapping[str, Any]]
    variables: Mapping[str, Any]
    """All others: tools, special tokens, switches."""

    def given(self, upto: int | None = None, *, prompt: bool = False) -> dict[str, Any]:
        """The variables for the first messages; `prompt` opens an answer after them."""
        return {**self.variables, "messages": list(self.messages[:upto]), "add_generation_prompt": prompt}


def supervised_spans(
    template: ChatTemplate,
    conversation: Conversation,
    text: str,
    specials: Sequence[str],
    which: Supervise = "all",
) -> list[Span]:
    """Spans of `text`, which is the conversation rendered without a generation prompt, in order.

    `specials` are texts of the special tokens that may stand after an answer. Raises UserError where the spans cannot
    be told for certain.
    """
    turns = [i for i, message in enumerate(conversation.messages) if message["role"] == "assistant"]
    if not turns:
        return []
    marked = template.marked(conversation.given(), text)
    if marked.generations:
        spans = [_with_stop(text, span, specials) for span in marked.generations]
    else:
        headers = _Headers(template, conversation, specials)
        parts = [_part_of(turn, conversation.messages[turn], marked, template.where) for turn in turns]
        spans = [_own_words(text, part, headers, specials) for part in parts]
    spans = [span for span in spans if span[1] > span[0]]
    return spans[-1:] if which == "last" else spans


def _part_of(turn: int, message: Mapping[str, Any], marked: Marked, where: str) -> Part:
    """The one part that a message wrote, which must hold what it says."""
    parts = [part for part in marked.parts if part.message == turn]
    whole = marked.text[parts[0].begin : parts[0].end] if len(parts) == 1 else ""
    content = (message.get("content") or "").strip()
    calls = [call["function"]["name"] for call in message.get("tool_calls", ())]
    if len(parts) == 1 and content[-_PROOF:] in whole and all(name in whole for name in calls):
        return parts[0]
    raise UserError(
        f"{where} does not write messages[{turn}] in one piece and as it is, so what the assistant says there cannot "
        "be told from the rest; put {% generation %} and {% endgeneration %} around it in the template"
    )


def _own_words(text: str, part: Part, headers: "_Headers", specials: Sequence[str]) -> Span:
    whole = text[part.begin : part.end]
    header = max(_shared(whole, header, specials) for header in headers.before(part.message))
    return _with_stop(text, (part.begin + header, part.end), specials)


def _with_stop(text: str, span: Span, specials: Sequence[str]) -> Span:
    """The span up to the token that stops it.

    That is the special token it ends with, white space aside, or else the one that follows: GLM stops at the next
    "<|user|>". Without either it ends with its last character that is no white space.
    """
    begin, end = span
    bare = begin + len(text[begin:end].rstrip())
    if any(text.endswith(special, begin, bare) for special in specials):
        return begin, bare
    following = max((len(special) for special in specials if text.startswith(special, end)), default=0)
    return begin, end + following if following else bare


def _shared(whole: str, header: str, specials: Sequence[str]) -> int:
    """How many characters of a header a text begins with, none of a word or token that goes on otherwise."""
    pairs = enumerate(zip(whole, header, strict=False))
    size = next((i for i, (a, b) in pairs if a != b), min(len(whole), len(header)))
    while 0 < size < len(header) and not (
        header[size - 1].isspace() or header.endswith(tuple(specials), 0, size)
    ):
        size -= 1
    return size


class _Headers:
    """What a prompt ends with after the last message before an answer."""

    def __init__(self, template: ChatTemplate, conversation: Conversation, specials: Sequence[str]):
        self._template, self._conversation, self._specials = template, conversation, specials
        self._found: dict[str, tuple[str, ...]] = {}

    def before(self, turn: int) -> tuple[str, ...]:
        """The generation prompt before an assistant's turn, and all that follows the last message's own text.

        They differ where a template closes something (DeepSeek: the tools' outputs) before an answer is opened.
        """
        role = self._conversation.messages[turn - 1]["role"] if turn else ""
        if role not in self._found:
            self._found[role] = self._endings(turn)
        return self._found[role]

    def _endings(self, turn: int) -> tuple[str, ...]:
        conversation = self._conversation
        if not turn:
            conversation, turn = Conversation([{"role": "user", "content": "?"}], conversation.variables), 1
        render: Callable[[dict[str, Any]], str] = self._template.render
        plain, given = render(conversation.given(turn)), conversation.given(turn, prompt=True)
        opened = render(given)
        last = max((part.end for part in self._template.marked(given, opened).parts), default=len(opened))
        return opened[_shared(plain, opened, self._specials) :], opened[last:]
