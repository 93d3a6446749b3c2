"""An answer ends where its template ends it."""

import pytest

from maxstack.chat.ends import ends_of
from maxstack.config import UserError
from tests.chat.models import chat_tokenizer
from tests.chat.stand_ins import Rendered, Writer, conversation

CHATML_END, DOCUMENT_END = 258, 256


def render(after: str, before: str = "<|im_start|>"):
    def renderer(messages, *, add_generation_prompt: bool):
        return Rendered([], [], "".join(f"{before}{m['role']}\n{m['content']}{after}" for m in messages))

    return renderer


@pytest.mark.parametrize(
    ("after", "ids", "texts"),
    [
        ("<|im_end|>\n", (CHATML_END,), ()),
        (" <|endoftext|>", (CHATML_END, DOCUMENT_END), ()),  # besides the tokenizer's own
        ("<|eot|>\n", (CHATML_END,), ("<|eot|>",)),  # no token of this vocabulary
        ("\n\n", (CHATML_END,), ()),
        ("", (CHATML_END,), ()),
    ],
)
def test_what_the_template_puts_after_an_answer_ends_it(after, ids, texts):
    assert ends_of(render(after), chat_tokenizer()) == (ids, texts)


def test_a_template_that_drops_or_refuses_the_answer_adds_nothing():
    def refusing(messages, **_):
        raise UserError("no")

    def dropping(messages, **_):
        return Rendered([], [], "nothing of it")

    for renderer in (refusing, dropping):
        assert ends_of(renderer, chat_tokenizer()) == ((CHATML_END,), ())


@pytest.mark.parametrize(
    ("after", "ids"), [("<|endoftext|>\n", (CHATML_END, DOCUMENT_END)), ("]", (CHATML_END,))]
)
def test_a_template_that_renders_prompts_only_tells_its_token_and_no_text(after, ids):
    def prompts_only(messages, *, add_generation_prompt: bool):
        if not add_generation_prompt:
            raise UserError("the assistant's turns cannot be told")
        return render(after)(messages, add_generation_prompt=True)

    assert ends_of(prompts_only, chat_tokenizer()) == (ids, ())


def test_stop_texts_join_those_that_are_set():
    writer = Writer("ok")
    talk = conversation(writer, stop=("###",))
    talk._stops = ("<|eot|>",)
    list(talk.ask("?"))
    assert writer.params[0].stop == ("###", "<|eot|>")
    assert talk.settings.sampling.stop == ("###",)
