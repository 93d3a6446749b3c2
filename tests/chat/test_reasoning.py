"""Thoughts and answers are told apart however the text is cut."""

import itertools

import pytest

from maxstack.chat.reasoning import Splitter, tags_of

THINK = ("<think>", "</think>")


def split(text: str, cuts, tags=THINK, prompt: str = "") -> tuple[str, str]:
    splitter = Splitter(tags, prompt)
    pieces = []
    for a, b in itertools.pairwise([0, *cuts, len(text)]):
        pieces += splitter.push(text[a:b])
    pieces += splitter.finish()
    said = {"reasoning": "", "answer": ""}
    for piece in pieces:
        assert piece.text
        said[piece.kind] += piece.text
    return said["reasoning"], said["answer"]


CASES = [
    ("<think>a</think>b", "", ("a", "b")),
    ("\n<think>\n a < b </think>\n\n b\n", "", ("a < b", "b\n")),
    ("<think>\n\n</think>\n\nb", "", ("", "b")),
    ("a</think>\nb", "…<think>\n", ("a", "b")),
    ("plain", "", ("", "plain")),
    ("  plain <think>not</think>", "", ("", "  plain <think>not</think>")),
    ("<thin", "", ("", "<thin")),
    ("<think>never closed </thi", "", ("never closed </thi", "")),
    ("<think>a</think>", "", ("a", "")),
    ("<think>a</think>b</think>c", "", ("a", "b</think>c")),
    ("", "", ("", "")),
]


@pytest.mark.parametrize(("text", "prompt", "expected"), CASES)
def test_every_cut_gives_the_same(text, prompt, expected):
    places = range(len(text) + 1)
    cuts = [[], list(places), *([i] for i in places), *itertools.combinations(places, 2)]
    assert {split(text, cut, prompt=prompt) for cut in cuts} == {expected}


def test_without_tags_everything_is_the_answer():
    assert split("<think>a</think>b", [3], tags=None) == ("", "<think>a</think>b")


def test_thoughts_come_while_they_are_thought():
    splitter = Splitter(THINK)
    assert [p.text for word in ("<think>", "one", " two", " </") for p in splitter.push(word)] == [
        "one",
        " two",
    ]


def test_tags_of_a_template():
    assert tags_of("{{ '<think>\\n' }}{{ content.split('</think>') }}") == THINK
    assert tags_of("… [THINK]…[/THINK]") == ("[THINK]", "[/THINK]")
    assert tags_of("{{ messages }}") is None
