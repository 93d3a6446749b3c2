"""The loss mask: the assistant's own words and the token that stops them, and nothing else."""

import re

import pytest
import tokenizers
from transformers import PreTrainedTokenizerFast

from maxstack.config import UserError
from maxstack.data.chat import ChatRenderer
from tests.data.chat.goldens import NAMES, answered, definition, renderer, tokenizer
from tests.goldens.chat.conversations import (
    ANSWER,
    ASK,
    CALL,
    CASES,
    QUESTION,
    RESULT,
    SECOND,
    SECOND_ANSWER,
    SECOND_THOUGHT,
    THOUGHT,
    WARM,
    WEATHER,
)  # fmt: skip

CHATML = ("", "<|im_end|>")
DEEPSEEK = ("", "<｜end▁of▁sentence｜>")
# Read off the families' own descriptions: what the model writes before an answer, and what it stops with.
AROUND = {
    "chatml": CHATML, "internlm2": CHATML, "internlm3": CHATML, "phi-4": CHATML, "qwen2.5": CHATML, "qwq": CHATML,
    "smollm2": CHATML, "smollm3": CHATML,
    "deepseek-r1-distill": DEEPSEEK, "deepseek-v2.5": DEEPSEEK, "deepseek-v3": DEEPSEEK, "deepseek-v3.1": DEEPSEEK,
    "gemma-2": ("", "<end_of_turn>"), "gemma-3": ("", "<end_of_turn>"), "granite-3.3": ("", "<|end_of_text|>"),
    "llama-2": (" ", " </s>"), "llama-3": ("", "<|eot_id|>"), "llama-3.1": ("", "<|eot_id|>"),
    "llama-3.2": ("", "<|eot_id|>"), "mistral-nemo": ("", "</s>"), "mistral-v0.2": ("", "</s>"),
    "phi-3": ("", "<|end|>"), "phi-3.5": ("", "<|end|>"), "zephyr": ("", "</s>"),
}  # fmt: skip
OTHERWISE = {
    # GLM stops at the token that begins the next turn; at the end there is none.
    "glm-4": [f"\n{ANSWER['content']}<|user|>", f"\n{SECOND_ANSWER['content']}"],
    "glm-4.6": [
        f"\n<think></think>\n{ANSWER['content']}<|user|>",
        f"\n<think></think>\n{SECOND_ANSWER['content']}",
    ],
    "gpt-oss": [
        f"<|channel|>final<|message|>{ANSWER['content']}<|end|>",
        f"<|channel|>final<|message|>{SECOND_ANSWER['content']}<|return|>",
    ],
    # The template takes earlier thoughts away and puts empty ones before the last answer.
    "qwen3": [
        f"{ANSWER['content']}<|im_end|>",
        f"<think>\n\n</think>\n\n{SECOND_ANSWER['content']}<|im_end|>",
    ],
}


def said(done) -> list[str]:
    return [done.text[begin:end] for begin, end in done.supervised]


def expected(name: str) -> list[str]:
    if name in OTHERWISE:
        return OTHERWISE[name]
    before, stop = AROUND[name]
    return [f"{before}{message['content']}{stop}" for message in (ANSWER, SECOND_ANSWER)]


@pytest.mark.parametrize("name", NAMES)
def test_the_answers_and_their_stop_tokens_are_supervised(name):
    done = renderer(name).sample(CASES["multi"]["messages"])
    assert said(done) == expected(name)


@pytest.mark.parametrize("name", NAMES)
def test_the_last_answer_alone(name):
    done = renderer(name).sample(CASES["multi"]["messages"], supervise="last")
    assert said(done) == expected(name)[1:]


@pytest.mark.parametrize("name", NAMES)
def test_the_mask_decodes_to_the_supervised_text(name):
    own = tokenizer(name)
    for case in answered(name):
        done = renderer(name)(**CASES[case])
        chosen = [token for token, on in zip(done.ids, done.mask, strict=True) if on]
        text, decoded = "".join(said(done)), own.decode(chosen, skip_special=False)
        # A token of line ends that begins before an answer with line ends is the prompt's.
        assert text.endswith(decoded), case
        assert text.removesuffix(decoded).strip() == "", case
        assert decoded == text or case == "hard", case


@pytest.mark.parametrize("name", NAMES)
def test_what_a_server_would_send_comes_before_the_last_answer(name):
    for case in answered(name):
        *before, last = CASES[case]["messages"]
        options = {key: value for key, value in CASES[case].items() if key != "messages"}
        assert last["role"] == "assistant"
        if name == "mistral-nemo" and before[0]["role"] == "system":
            continue  # the template writes a system message only while a question is the last
        prompt = renderer(name)(before, add_generation_prompt=True, **options)
        done = renderer(name)(**CASES[case], supervise="last")
        shared = done.text[: done.supervised[-1][0]]
        # A prompt may open thoughts that a finished answer has not; it is never behind the supervised text.
        assert prompt.text.startswith(shared), case
        assert re.fullmatch(r"(</?think>|\s)*", prompt.text[len(shared) :]), case
        if prompt.text == shared and case != "hard":  # whose answer begins with a line end
            assert prompt.ids == done.ids[: len(prompt.ids)], case
            assert done.mask[: len(prompt.ids)] == [False] * len(prompt.ids), case
            assert all(done.mask[len(prompt.ids) :][:1]), case


@pytest.mark.parametrize("name", NAMES)
def test_nothing_outside_of_the_mask_depends_on_an_answer(name):
    """The proof that the method finds all of an answer: another answer changes the supervised spans and no more."""
    for case in answered(name):
        messages = CASES[case]["messages"]
        changed = [
            {**message, "content": f"OTHER {index}"}
            if message["role"] == "assistant" and message["content"]
            else message
            for index, message in enumerate(messages)
        ]
        done, other = renderer(name)(**CASES[case]), renderer(name)(**{**CASES[case], "messages": changed})
        assert outside(done) == outside(other), case
        assert len(done.supervised) == sum(message["role"] == "assistant" for message in messages), case


def outside(done) -> list[str]:
    edges = [0, *(edge for span in done.supervised for edge in span), len(done.text)]
    # White space at the end of an answer that is not stopped is left to neither.
    return [done.text[a:b].rstrip() for a, b in zip(edges[::2], edges[1::2], strict=True)]


def test_tool_calls_are_supervised_and_their_results_are_not():
    spans = {
        "qwen3": [
            '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Zürich", "days": 1}}\n</tool_call><|im_end|>',
            "<think>\n\n</think>\n\nIt is 21 °C.<|im_end|>",
        ],
        "llama-3.1": [
            '{"name": "get_weather", "parameters": {"city": "Zürich", "days": 1}}<|eot_id|>',
            "It is 21 °C.<|eot_id|>",
        ],
        "mistral-nemo": [
            '[TOOL_CALLS][{"name": "get_weather", "arguments": {"city": "Zürich", "days": 1}, "id": "call12345"}]</s>',
            "It is 21 °C.</s>",
        ],
        "gpt-oss": [
            ' to=functions.get_weather<|channel|>commentary json<|message|>{"city": "Zürich", "days": 1}<|call|>',
            "<|channel|>final<|message|>It is 21 °C.<|return|>",
        ],
    }  # fmt: skip
    for name, texts in spans.items():
        assert said(renderer(name).sample([ASK, CALL, RESULT, WARM], tools=[WEATHER])) == texts
    # The outputs are closed by the prompt, before the answer begins.
    v3 = renderer("deepseek-v3").sample([ASK, CALL, RESULT, WARM])
    assert said(v3)[1] == "It is 21 °C.<｜end▁of▁sentence｜>"


def test_reasoning_is_supervised_where_the_template_keeps_it():
    done = renderer("qwen3").sample([QUESTION, THOUGHT, SECOND, SECOND_THOUGHT])
    thought = (
        f"<think>\n{SECOND_THOUGHT['reasoning_content']}\n</think>\n\n{SECOND_ANSWER['content']}<|im_end|>"
    )
    assert said(done) == [f"{ANSWER['content']}<|im_end|>", thought]
    with pytest.raises(UserError, match="no place"):
        renderer("llama-3").sample([QUESTION, THOUGHT])


GENERATION = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{% if message.role == 'assistant' %}"
    "{% generation %}{{ message.content }}STOP{% endgeneration %}{% else %}{{ message.content }}<|im_end|>{% endif %}\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.mark.parametrize("stop", ["{% endgeneration %}<|im_end|>", "<|im_end|>{% endgeneration %}"])
def test_generation_blocks_are_followed_and_the_stop_token_is_in_the_mask(stop):
    template = GENERATION.replace("STOP{% endgeneration %}", stop)
    own = tokenizer("chatml")
    done = ChatRenderer(own, template).sample(CASES["multi"]["messages"])
    assert said(done) == expected("chatml")
    reference = PreTrainedTokenizerFast(tokenizer_object=tokenizers.Tokenizer.from_str(definition()))
    inside = GENERATION.replace("STOP", "<|im_end|>")
    theirs = reference.apply_chat_template(
        CASES["multi"]["messages"], chat_template=inside, tokenize=True, return_dict=True,
        return_assistant_tokens_mask=True,
    )  # fmt: skip
    assert done.ids == theirs["input_ids"]
    assert [int(on) for on in done.mask] == theirs["assistant_masks"]


BY_INDEX = (
    "{% for i in range(messages|length) %}<|im_start|>{{ messages[i].role }}\n{{ messages[i].content }}<|im_end|>\n"
    "{% endfor %}"
)
JOINED = "{{ messages | map(attribute='content') | join('<|im_end|>') }}"
TWICE = "{% for m in messages %}{{ m.role }} {% endfor %}{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}"
TRIMMED = (
    "{% set all %}{% for m in messages %}  {{ m.content }}<|im_end|>  {% endfor %}{% endset %}"
    "{{ all | length }}{{ all }}"
)
LOUD = "{% for m in messages %}{{ m.content | upper }}<|im_end|>{% endfor %}"


@pytest.mark.parametrize("template", [BY_INDEX, JOINED, TWICE, TRIMMED, LOUD])
def test_a_template_whose_turns_cannot_be_told_is_an_error_that_says_what_to_do(template):
    render = ChatRenderer(tokenizer("chatml"), template)
    assert render([QUESTION], add_generation_prompt=True).mask.count(True) == 0  # prompts need no mask
    with pytest.raises(UserError, match="generation"):
        render([QUESTION, ANSWER])


def test_a_sample_without_supervised_tokens_is_an_error_that_shows_it():
    for options in ({}, {"add_generation_prompt": True}):
        with pytest.raises(UserError, match=re.escape(QUESTION["content"])):
            renderer("chatml").sample([QUESTION], **options)
    silent = "{% for m in messages %}{{ m.content }}{% generation %}{% endgeneration %}{% endfor %}"
    with pytest.raises(UserError, match="nothing in this sample is supervised"):
        ChatRenderer(tokenizer("chatml"), silent).sample([QUESTION])


def test_loops_inside_a_turn_and_skipped_messages_do_not_break_the_spans():
    template = (
        "{% for m in messages %}{% if m.role == 'system' %}{% continue %}{% endif %}["
        "{% for w in m.content.split() %}{{ w }} {% for other in messages %}{% endfor %}{% endfor %}]</s>{% endfor %}"
    )
    messages = [
        {"role": "system", "content": "no"},
        {"role": "user", "content": "a b"},
        {"role": "assistant", "content": "c"},
    ]
    assert said(ChatRenderer(tokenizer("zephyr"), template)(messages)) == ["[c ]</s>"]
