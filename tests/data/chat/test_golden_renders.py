"""Each template's text and ids are those of transformers; what is refused is refused in the template's words."""

import pytest
import tokenizers
from transformers import PreTrainedTokenizerFast

from maxstack.config import UserError
from tests.data.chat.goldens import GOOD, KINDS, NAMES, definition, renderer, renders, tokenizer
from tests.goldens.chat.conversations import CASES


@pytest.mark.parametrize("name", NAMES)
def test_text_equals_that_of_transformers_or_says_why_there_is_none(name):
    render = renderer(name)
    for case, options in CASES.items():
        golden = renders(name)[case]
        if case in GOOD[name]:
            assert render(**options).text == golden["text"], case
        else:
            with pytest.raises(UserError) as failure:
                render(**options)
            reason = str(failure.value)
            said = golden.get("refused", "").partition(": ")[2]
            assert "no place for tool" in reason or (said and said in reason), case


def test_the_families_and_features_asked_for_are_among_the_goldens():
    assert len(NAMES) >= 24
    with_calls = {name for name in NAMES if "bare_calls" in GOOD[name]}
    assert {
        "llama-3.1", "llama-3.2", "qwen2.5", "qwen3", "qwq", "mistral-nemo", "gpt-oss", "glm-4.6",
        "deepseek-v2.5", "deepseek-v3", "deepseek-v3.1", "deepseek-r1-distill",
    } <= with_calls  # fmt: skip
    assert all({"single", "multi", "hard", "later_prompt", "continued"} <= {*GOOD[name]} for name in NAMES)


@pytest.mark.parametrize("kind", KINDS)
def test_ids_are_those_of_the_whole_text_whatever_the_tokenizer_merges(kind):
    reference = PreTrainedTokenizerFast(tokenizer_object=tokenizers.Tokenizer.from_str(definition(kind)))
    cases = {*CASES} if kind == "byte words" else {"hard", "multi", "calls", "later_prompt"}
    for name in NAMES:
        for case in cases & {*GOOD[name]}:
            done = renderer(name, kind)(**CASES[case])
            assert done.ids == reference(done.text, add_special_tokens=False).input_ids, (name, case)
            assert len(done.mask) == len(done.ids)


@pytest.mark.parametrize("name", ["llama-3.1", "gemma-2", "mistral-nemo", "internlm2", "deepseek-v3"])
def test_there_is_one_begin_token(name):
    done = renderer(name)(**CASES["multi"])
    begin = tokenizer(name).bos_id
    assert done.ids[0] == begin
    assert done.ids.count(begin) == 1
