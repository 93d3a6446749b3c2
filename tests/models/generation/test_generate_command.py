"""`maxstack generate` for scripts: where prompts come from, what comes out, what is refused."""

import dataclasses
import io
import json

import pytest

from maxstack import cli
from maxstack.data.tokenizer import byte_tokenizer
from maxstack.models import generate_command
from maxstack.models.generate import prompt_ids
from tests.models.tiny import CONFIGS, build

MODEL = build(dataclasses.replace(CONFIGS["grouped"], vocab_size=257))


@pytest.fixture
def maxstack(monkeypatch, capsys, tmp_path):
    """Runs `maxstack generate MODEL …` with a tiny model of bytes; gives (exit code, output, errors)."""
    monkeypatch.setattr(generate_command, "load", lambda *args, **options: (MODEL, byte_tokenizer()))
    monkeypatch.setenv("MAXSTACK_COMPILED_CACHE", "0")

    def run(*words: object) -> tuple[int, str, str]:
        code = cli.main(["generate", str(tmp_path), *map(str, words)])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def rows(out: str) -> list[dict]:
    return [json.loads(line) for line in out.splitlines()]


GREEDY = ("--temperature", "0", "--max-tokens", "5", "--json")


def test_json_lines_for_several_prompts_in_their_order(maxstack):
    prompts = ["one", "two and", "three"]
    code, out, _ = maxstack(*prompts, *GREEDY, "--batch", "2", "--logprobs", "2")
    assert code == 0
    given = rows(out)
    assert [row["prompt"] for row in given] == prompts
    assert {len(row["token_ids"]) for row in given} == {5}
    assert {row["finish_reason"] for row in given} == {"length"}
    assert given[0]["text"] == byte_tokenizer().decode(given[0]["token_ids"])
    assert [one["token_id"] for one in given[0]["logprobs"]] == given[0]["token_ids"]
    assert given[0]["logprobs"][0]["top"][0] == [given[0]["token_ids"][0], given[0]["logprobs"][0]["logprob"]]
    [alone] = rows(maxstack("three", *GREEDY)[1])
    assert alone["token_ids"] == given[2]["token_ids"]
    assert "logprobs" not in alone


def test_prompts_from_a_file_of_lines_a_file_of_json_and_standard_input(maxstack, tmp_path, monkeypatch):
    lines, objects = tmp_path / "lines.txt", tmp_path / "objects.jsonl"
    lines.write_text("first\n\nsecond\r\n")
    objects.write_text('{"prompt": "first"}\n{"prompt": "a\\nb", "id": 3}\n')
    assert [row["prompt"] for row in rows(maxstack("zero", "--from", lines, *GREEDY)[1])] == [
        "zero",
        "first",
        "second",
    ]
    assert [row["prompt"] for row in rows(maxstack("--from", objects, *GREEDY)[1])] == ["first", "a\nb"]
    for text in (lines.read_text(), objects.read_text()):
        monkeypatch.setattr("sys.stdin", io.StringIO(text))
        assert rows(maxstack("--from", "-", *GREEDY)[1])[0]["prompt"] == "first"


def test_the_text_of_one_prompt_is_what_json_says(maxstack):
    [wanted] = rows(maxstack("once", *GREEDY)[1])
    code, out, errors = maxstack("once", *GREEDY[:-1])
    assert (code, out) == (0, f"once{wanted['text']}\n")
    assert "5 tokens, the first after" in errors


def test_stop_tokens_and_biases_are_taken_from_flags(maxstack):
    [free] = rows(maxstack("once", *GREEDY)[1])
    second = free["token_ids"][1]
    [stopped] = rows(maxstack("once", *GREEDY, "--stop-token-id", second)[1])
    assert stopped["finish_reason"] == "stop"
    assert stopped["token_ids"] == free["token_ids"][: free["token_ids"].index(second)]
    [biased] = rows(maxstack("once", *GREEDY, "--logit-bias", "97=100", "--stop", "aaa")[1])
    assert (biased["text"], biased["finish_reason"]) == ("", "stop")


@pytest.mark.parametrize(
    ("words", "part"),
    [
        ("--from /no/where.txt", "/no/where.txt: no such file"), ("x --batch 0", "--batch is 0"),
        ("x --min-p 2", "min_p is 2.0: it must be in [0, 1]"), ("x --logprobs 99 --json", "logprobs is 99"),
        ("x --max-tokens 9 --logit-bias 999=1", "token id 999 is not in 0 to 256"),
        ("x --max-tokens 99", "exceed the model's 64"),
    ],
)  # fmt: skip
def test_a_wrong_request_is_refused(maxstack, words, part):
    code, out, errors = maxstack(*words.split())
    assert (code, out) == (2, "")
    assert part in errors


@pytest.mark.parametrize("words", ["x --temperature warm", "x --logit-bias 5", "x --logit-bias a=b"])
def test_a_flag_that_is_no_number_is_refused(maxstack, words):
    with pytest.raises(SystemExit) as stopped:  # argparse's own way
        maxstack(*words.split())
    assert stopped.value.code == 2


@pytest.mark.parametrize(
    ("name", "content", "part"),
    [
        ("a.jsonl", b"not json\n", 'line 1: not a JSON object with "prompt"'), ("a.txt", b"", "has no prompts"),
        ("a.jsonl", b'{"prompt": 3}\n', 'line 1: "prompt" is a int'), ("a.txt", b"\xff\xfe", "not UTF-8 text"),
        ("a.jsonl", b'{"prompt": "x"}\n[1]\n', "line 2"),
    ],
)  # fmt: skip
def test_a_file_that_holds_no_prompts_is_refused(maxstack, tmp_path, name, content, part):
    (tmp_path / name).write_bytes(content)
    code, out, errors = maxstack("--from", tmp_path / name)
    assert (code, out) == (2, "")
    assert part in errors


def test_a_start_token_is_put_in_front_unless_the_tokenizer_refuses_it():
    tokenizer = byte_tokenizer()
    assert prompt_ids(tokenizer, "a") == [256, 97]
    refusing = type(tokenizer)(tokenizer.definition, {**tokenizer.settings, "add_bos_token": False})
    assert prompt_ids(refusing, "a") == [97]
    assert prompt_ids(refusing, "") == [256]
