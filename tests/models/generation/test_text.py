"""Text that streams: whole characters, and nothing that belongs to a stop string."""

import pytest

from maxstack.data.tokenizer import byte_tokenizer
from maxstack.models.generation.text import StopFinder, TextStream

TOKENIZER = byte_tokenizer()


def streamed(text: str, *stops: str) -> tuple[list[str], bool]:
    stream = TextStream(TOKENIZER, stops)
    parts = []
    for token in TOKENIZER.encode(text):
        part, stopped = stream.push(token)
        parts.append(part)
        if stopped:
            return parts, True
    rest, stopped = stream.finish()
    return [*parts, rest], stopped


@pytest.mark.parametrize("text", ["plain", "你好, 世界", "🙂🏽‍🚀 é", "a\ufffdb", ""])
def test_parts_are_whole_characters_and_make_up_the_text(text):
    parts, stopped = streamed(text)
    assert "".join(parts) == text
    assert not stopped
    assert all("\ufffd" not in part for part in parts if "\ufffd" not in text)


def test_half_a_character_at_the_end_is_shown_when_no_more_comes():
    stream = TextStream(TOKENIZER)
    assert [stream.push(token)[0] for token in [*TOKENIZER.encode("a"), 0xE4, 0xBD]][0] == "a"
    assert stream.finish()[0] == "\ufffd"


@pytest.mark.parametrize(
    ("text", "stops", "wanted"),
    [
        ("one\n\ntwo", ("\n\n",), "one"), ("aab", ("ab",), "a"), ("ababac", ("abac",), "ab"),
        ("x STOP y", ("END", "STOP"), "x "), ("你好吗", ("好",), "你"), ("STOP", ("STOP",), ""),
    ],
)  # fmt: skip
def test_a_stop_string_ends_the_text_before_it(text, stops, wanted):
    parts, stopped = streamed(text, *stops)
    assert ("".join(parts), stopped) == (wanted, True)


@pytest.mark.parametrize(("text", "stop"), [("abab", "abac"), ("x\n", "\n\n"), ("STO", "STOP")])
def test_what_only_began_like_a_stop_string_comes_out_in_the_end(text, stop):
    parts, stopped = streamed(text, stop)
    assert ("".join(parts), stopped) == (text, False)


def test_nothing_is_given_out_that_a_stop_string_could_take_back():
    text, stop = "a stitch, a STITCH, ab abc abd", "abd"
    given = ""
    finder = StopFinder([stop])
    for character in text:
        part, _ = finder.push(character)
        given += part
        assert text.split(stop)[0].startswith(given)
    assert given == text.split(stop)[0]


def test_the_first_of_several_stop_strings_counts():
    assert StopFinder(["two", "one"]).push("zero one two") == ("zero ", True)


def test_a_stop_string_is_not_looked_for_in_the_first_min_tokens():
    from maxstack.models.generation.output import Row
    from maxstack.models.generation.params import SamplingParams

    tokenizer = byte_tokenizer()
    for least, wanted in ((0, ("", "stop")), (2, ("abc", "stop")), (6, ("abcabc", "length"))):
        row = Row(0, SamplingParams(max_tokens=6, min_tokens=least, stop=("ab",)), tokenizer, frozenset())
        text = ""
        for token in b"abcabc":
            event = row.push(token, None)
            text += event.text
            if event.finish_reason:
                break
        assert (text, event.finish_reason) == wanted
