"""Which template a tokenizer's renderer uses, what a call may be given, and how it is shown."""

import datetime

import pytest

from maxstack.config import UserError
from maxstack.data.chat import CHATML, ChatRenderer, renderer_for, show
from maxstack.data.tokenizer import Tokenizer
from tests.data.chat.goldens import definition, renderer, template, tokenizer
from tests.goldens.chat.conversations import ANSWER, ASK, QUESTION, SYSTEM, WEATHER


def with_template(own) -> Tokenizer:
    return Tokenizer(definition(), {"bos_token": "<s>", "eos_token": "</s>", "chat_template": own})


def test_the_tokenizers_own_template_is_the_default():
    assert renderer_for(tokenizer("qwen3")).template == template("qwen3")


def test_a_tokenizer_without_a_template_says_how_to_give_one():
    for own in (None, {}):
        with pytest.raises(UserError, match=r"chat_template\.jinja"):
            renderer_for(with_template(own))
    given = renderer_for(with_template(None), "chatml")
    assert given.template == CHATML
    assert given([QUESTION]).text == f"<|im_start|>user\n{QUESTION['content']}<|im_end|>\n"
    assert renderer_for(with_template(None), template("zephyr")).template == template("zephyr")


def test_named_templates():
    named = with_template({"default": template("chatml"), "tool_use": template("qwen2.5")})
    render = renderer_for(named)
    assert render.template == template("chatml")
    assert "<tools>" not in render([ASK]).text
    assert "<tools>" in render([ASK], tools=[WEATHER]).text
    assert renderer_for(with_template({"only": template("chatml")})).template == template("chatml")
    with pytest.raises(UserError, match="one, two"):
        renderer_for(with_template({"one": "a", "two": "b"}))


def test_a_template_without_a_place_for_tools_is_not_given_them_silently():
    with pytest.raises(UserError, match="no place for tools"):
        renderer("chatml")([ASK], tools=[WEATHER])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"add_generation_prompt": True, "continue_final_message": True}, "choose one"),
        ({"bos_token": {1}}, "bos_token is not plain JSON"),
        ({"enable_thinking": object()}, "enable_thinking is not plain JSON"),
    ],
)
def test_options_that_cannot_be(options, words):
    with pytest.raises(UserError, match=words):
        renderer("qwen3")([QUESTION], **options)


def test_variables_and_documents_reach_the_template():
    assert renderer("qwen3")([QUESTION], add_generation_prompt=True, enable_thinking=False).text.endswith(
        "</think>\n\n"
    )
    listing = "{% for d in documents %}{{ d.title }};{% endfor %}{{ bos_token }}{{ messages[0].content }}"
    render = ChatRenderer(with_template(None), listing)
    assert (
        render([QUESTION], documents=[{"title": "A"}, {"title": "B"}]).text == f"A;B;<s>{QUESTION['content']}"
    )


def test_the_date_is_that_of_now():
    today = ChatRenderer(tokenizer("llama-3.2"), template("llama-3.2"))([QUESTION]).text
    assert f"Today Date: {datetime.datetime.now():%d %b %Y}" in today
    assert "Today Date: 09 Mar 2025" in renderer("llama-3.2")([QUESTION]).text


def test_a_message_is_continued_without_what_follows_it():
    begun = [QUESTION, {"role": "assistant", "content": "Air scatters "}]
    assert renderer("chatml")(begun, continue_final_message=True).text.endswith(
        "<|im_start|>assistant\nAir scatters "
    )
    assert renderer("llama-3.1")(begun, continue_final_message=True).text.endswith(
        "\n\nAir scatters"
    )  # it strips
    with pytest.raises(UserError, match="content to continue"):
        renderer("chatml")([QUESTION, {"role": "assistant", "content": ""}], continue_final_message=True)


def test_a_faulty_template_is_an_error_with_its_line():
    with pytest.raises(UserError, match="line 2"):
        ChatRenderer(with_template(None), "ok\n{% for %}")
    with pytest.raises(UserError, match=r"line 3: .*'nothing' is undefined"):
        ChatRenderer(with_template(None), "a\nb\n{{ nothing.at_all }}")([QUESTION])
    with pytest.raises(UserError, match="refuses these messages: no systems"):
        ChatRenderer(with_template(None), "{{ raise_exception('no systems') }}")([SYSTEM])


def test_a_rendered_sample_is_shown_with_what_is_supervised():
    done = renderer("chatml").sample([QUESTION, {**ANSWER, "content": "A\x1b[31m\nB"}])
    plain = show(done, colour=False)
    assert plain.endswith("<|im_start|>assistant\n⟦A\\x1b[31m\nB<|im_end|>⟧\n")
    coloured = show(done)
    assert "\x1b[31m" not in coloured
    supervised = [line for line in coloured.split("\n") if line.startswith("\x1b[1;30;42m")]
    assert supervised == ["\x1b[1;30;42mA\\x1b[31m\x1b[0m", "\x1b[1;30;42mB<|im_end|>\x1b[0m"]


def test_the_package_does_not_need_the_models():
    import subprocess
    import sys

    probe = (
        "import sys, maxstack.data.chat\n"
        "print([name for name in sys.modules if name.startswith(('maxstack.models', 'jax', 'torch'))])"
    )
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
