"""Turns, the cache between them, interruptions, the room in the context."""

import pytest

from maxstack.chat.conversation import Conversation
from maxstack.config import UserError
from tests.chat.stand_ins import Renderer, Tokenizer, Writer, conversation


def text_of(pieces) -> str:
    return "".join(piece.text for piece in pieces)


def prompt_of(writer: Writer) -> str:
    return Tokenizer().decode(writer.prompts[-1], skip_special=False)


def test_each_turn_sees_those_before_it():
    writer = Writer("Hi.", "Two.")
    talk = conversation(writer)
    assert text_of(talk.ask("Hello")) == "Hi."
    assert text_of(talk.ask("1+1?")) == "Two."
    assert prompt_of(writer) == (
        "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\nHi.<|im_end|>\n"
        "<|im_start|>user\n1+1?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert talk.messages == [
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Hi."},
        {"role": "user", "content": "1+1?"},
        {"role": "assistant", "content": "Two."},
    ]


def test_the_second_turn_finds_the_first_in_the_cache():
    writer = Writer("Hi.", "Two.")
    talk = conversation(writer)
    text_of(talk.ask("Hello"))
    assert talk.figures.reused_tokens == 0
    first = len(writer.prompts[0]) + len("Hi.")
    text_of(talk.ask("1+1?"))
    assert writer.reused[1] == talk.figures.reused_tokens == first


def test_a_cache_that_was_lost_is_not_counted():
    writer = Writer("Hi.", "Two.", state=None)
    talk = conversation(writer)
    text_of(talk.ask("Hello"))
    text_of(talk.ask("1+1?"))
    assert talk.figures.reused_tokens == 0


def test_pieces_come_one_by_one():
    talk = conversation(Writer("abc"))
    assert [piece.text for piece in talk.ask("?")] == ["a", "b", "c"]
    figures = talk.figures
    assert (figures.tokens, figures.finish) == (3, "stop")
    assert 0 < figures.first_s < figures.last_s
    assert figures.per_second > 0


@pytest.mark.parametrize("how", ["stopped", "closed", "interrupted inside"])
def test_what_was_said_before_an_interruption_is_kept(how):
    writer = Writer("ab\x03cd" if how == "interrupted inside" else "abcd", "more")
    talk, got = conversation(writer), []
    answer = talk.ask("?", lambda: how == "stopped" and len(got) == 2)
    try:
        for piece in answer:
            got.append(piece.text)
            if how == "closed" and len(got) == 2:
                answer.close()
    except KeyboardInterrupt:
        assert how == "interrupted inside"
    assert talk.messages[-1] == {"role": "assistant", "content": "ab"}
    assert talk.figures.finish == "stopped"
    assert writer.closed == 1
    assert text_of(talk.ask("go on")) == "more"
    # After an interruption in the middle of a step the cache may be anything.
    assert (talk.figures.reused_tokens == 0) == (how == "interrupted inside")


def test_a_question_without_a_word_of_answer_is_taken_back():
    writer = Writer("one", KeyboardInterrupt(), RuntimeError("out of memory"))
    talk = conversation(writer)
    text_of(talk.ask("?"))
    before, figures = list(talk.messages), talk.figures
    for error in (KeyboardInterrupt, RuntimeError):
        with pytest.raises(error):
            text_of(talk.ask("another"))
        assert talk.messages == before
        assert talk.figures is figures


def test_an_empty_answer_is_an_answer():
    talk = conversation(Writer(""))
    assert text_of(talk.ask("?")) == ""
    assert talk.messages[-1] == {"role": "assistant", "content": ""}


def test_regenerate_replaces_the_last_answer_and_takes_the_next_seed():
    writer = Writer("one", "two", "three", "four")
    talk = conversation(writer, seed=7)
    text_of(talk.ask("?"))
    text_of(talk.again())
    text_of(talk.again())
    assert [m["content"] for m in talk.messages] == ["?", "three"]
    text_of(talk.ask("!"))
    assert [p.seed for p in writer.params] == [7, 8, 9, 7]
    assert writer.prompts[0] == writer.prompts[1] == writer.prompts[2]


def test_an_interrupted_regeneration_without_a_word_leaves_the_answer():
    talk = conversation(Writer("one", KeyboardInterrupt()))
    text_of(talk.ask("?"))
    with pytest.raises(KeyboardInterrupt):
        text_of(talk.again())
    assert talk.messages[-1]["content"] == "one"


def test_nothing_to_regenerate():
    with pytest.raises(UserError, match="no answer yet"):
        next(conversation(Writer()).again())


def test_system_message():
    writer = Writer("ok", "ok")
    talk = conversation(writer)
    talk.set_system("Be brief.")
    text_of(talk.ask("?"))
    assert prompt_of(writer).startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n?")
    talk.set_system("Be long.")
    assert [m["content"] for m in talk.messages] == ["Be long.", "?", "ok"]
    talk.reset()
    assert talk.messages == [{"role": "system", "content": "Be long."}]
    talk.set_system("")
    assert talk.messages == []
    assert talk.system is None


def test_a_template_without_system_messages_refuses_one_at_once():
    talk = conversation(Writer(), renderer=Renderer(system=False))
    with pytest.raises(UserError, match="no system message"):
        talk.set_system("Be brief.")
    assert talk.messages == []


def room(context: int, question: str, **sampling) -> tuple[Conversation, Writer]:
    writer = Writer("x" * 200)
    talk = conversation(writer, context=context, **sampling)
    return talk, writer


def test_max_tokens_is_cut_to_the_room_that_is_left():
    prompt = len(Renderer()([{"role": "user", "content": "?"}], add_generation_prompt=True).ids)
    talk, writer = room(prompt + 5, "?")
    assert text_of(talk.ask("?")) == "xxxxx"
    assert writer.params[0].max_tokens == 5
    assert talk.figures.finish == "full"
    assert talk.figures.used == talk.context


def test_max_tokens_that_fits_is_no_full_context():
    talk, _ = room(200, "?", max_tokens=4)
    assert text_of(talk.ask("?")) == "xxxx"
    assert talk.figures.finish == "length"


def test_a_full_context_is_refused_and_the_conversation_stays():
    prompt = len(Renderer()([{"role": "user", "content": "?"}], add_generation_prompt=True).ids)
    talk, writer = room(prompt, "?")
    with pytest.raises(UserError, match=rf"context is full: .* {prompt} tokens.* holds {prompt}.*/reset"):
        next(talk.ask("?"))
    assert talk.messages == []
    assert writer.prompts == []


def test_thoughts_are_kept_apart_from_the_answer():
    renderer = Renderer(template="… </think> …")
    talk = conversation(Writer("<think>\nhm, hm\n</think>\n\nYes.", "x"), renderer=renderer)
    pieces = list(talk.ask("?"))
    assert "".join(p.text for p in pieces if p.kind == "reasoning") == "hm, hm"
    assert "".join(p.text for p in pieces if p.kind == "answer") == "Yes."
    assert talk.messages[-1] == {"role": "assistant", "content": "Yes.", "reasoning_content": "hm, hm"}


def test_thoughts_that_were_stopped_are_kept_as_thoughts():
    talk, seen = (
        conversation(Writer("<think>abcdefgh</think>Yes"), renderer=Renderer(template="</think>")),
        [],
    )
    seen.extend(piece.text for piece in talk.ask("?", lambda: len(seen) == 3))
    assert talk.messages[-1] == {"role": "assistant", "content": "", "reasoning_content": "abc"}


def test_thoughts_that_were_held_back_are_kept_when_nobody_listens_any_more():
    talk = conversation(Writer("<think>a </th\x03"), renderer=Renderer(template="</think>"))
    with pytest.raises(KeyboardInterrupt):
        text_of(talk.ask("?"))
    assert talk.messages[-1]["reasoning_content"] == "a </th"


def test_template_settings_reach_the_template():
    renderer = Renderer()
    talk = conversation(Writer("ok"), renderer=renderer)
    talk.settings = talk.settings.changed("template.enable_thinking", "false")
    text_of(talk.ask("?"))
    assert renderer.options == {"enable_thinking": False}
