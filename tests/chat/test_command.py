"""The real command on a tiny model: through pipes in this process, and on a terminal of its own."""

import io
import json
import re
import time
from pathlib import Path

import pytest

from tests.chat.models import write_model
from tests.chat.terminal import Terminal
from tests.commands import maxstack, refusal

FIGURES = r"\d+ tokens?,? .*prompt \d+.*\n"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]):
    return refusal(capsys)


SHORT = ("--set", "max_tokens", "5", "--set", "temperature", "0")


def test_one_message(model, capsys):
    assert maxstack("chat", model, "--message", "Hi", *SHORT) == 0
    out, err = capsys.readouterr()
    assert out.endswith("\n")
    assert len(out) > 1
    assert "5 tokens" in err
    assert maxstack("chat", model, "-m", "Hi", "-m", "/help", "--quiet", *SHORT) == 0
    again, err = capsys.readouterr()
    assert again.startswith(out)
    assert err == ""


def test_a_pipe(model, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("/system Be brief.\nHi\nHow?\n"))
    assert maxstack("chat", model, *SHORT) == 0
    out, err = capsys.readouterr()
    assert out.count("\n") >= 2
    assert "\x1b" not in out + err
    reused = re.findall(r"prompt (\d+)(?: \((\d+) from the cache\))?", err)
    assert reused[0][1] == ""
    assert int(reused[1][1]) >= int(reused[0][0])  # the first prompt was not read again


def test_a_pipe_with_a_fault_ends_with_1(model, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("/sytem x\n" + "y" * 5000 + "\nHi\n"))
    assert maxstack("chat", model, *SHORT) == 1
    out, err = capsys.readouterr()
    assert "did you mean /system" in err
    assert "context is full" in err
    assert out.count("\n") >= 1


def test_requests_that_are_wrong(model, refused, tmp_path):
    refused(2, ["did you mean temperature"], "chat", model, "--set", "temprature", "0")
    refused(2, ["no such folder"], "chat", tmp_path / "absent")
    refused(2, ["is not there"], "chat", model, "--load", tmp_path / "absent.json", "-m", "Hi")
    refused(2, ["context is full"], "chat", model, "-m", "x" * 5000)


def test_a_model_without_a_template(refused, capsys, tmp_path):
    bare = write_model(tmp_path / "bare", template=None)
    refused(2, ["chat template", "--template", "chatml"], "chat", bare, "-m", "Hi")
    assert maxstack("chat", bare, "-m", "Hi", "--template", "chatml", *SHORT) == 0
    own = tmp_path / "own.jinja"
    own.write_text("{% for m in messages %}[{{ m['content'] }}]{% endfor %}")
    capsys.readouterr()
    assert maxstack("chat", bare, "-m", "Hi", "--template", own, *SHORT) == 0
    assert "prompt 4" in capsys.readouterr().err
    refused(2, ["absent.jinja"], "chat", bare, "-m", "Hi", "--template", tmp_path / "absent.jinja")


# ------------------------------------------------------------------------------------------------ terminal


def test_a_whole_talk_on_a_terminal(model, tmp_path):
    with Terminal("chat", model, "--set", "ignore_eos", "on", state=tmp_path) as screen:
        screen.until(r"4,096 tokens of context · /help lists the commands\n> ")
        screen.press("/help\n")
        for word in (
            "/system",
            "/set",
            "/regenerate",
            "/show",
            "/reset",
            "/save FILE",
            "/load FILE",
            "/quit",
            "> ",
        ):
            screen.until(re.escape(word))
        screen.press("/set max_tokens 20\n")
        screen.until("max_tokens is 20\n> ")
        screen.press("/sett\n")
        screen.until(r"did you mean /set\?[^>]*> ")
        screen.press("Hi\n")
        screen.until(r"20 tokens, .*tokens/s .*cut off at max_tokens\n> ")
        assert "\x1b[2m20 tokens" in screen.raw  # dim

        # A long answer is stopped while it comes; the program goes on with what was said.
        screen.press("/set max_tokens 3000\n")
        screen.until("> ")
        screen.press("Go on\n")
        screen.until(r"Go on\n[^\n]")
        begun = len(screen.text)
        time.sleep(0.2)
        screen.press("\x03")
        screen.until(r"(\d+) tokens, .* · stopped\n> ")
        assert len(screen.text) > begun
        assert not re.search("3,000 tokens", screen.text)
        screen.press(f"/save {tmp_path}/talk.json\n")
        screen.until(r"saved 4 messages .*talk\.json\n> ")

        # Arrow up brings back an input, which can be edited.
        screen.press("\x1b[A\x1b[A\x7f\x7fup\n")
        screen.until("up\n[^\n]")
        screen.press("\x03")
        screen.until(r"stopped\n> ")

        screen.press("half a line")
        screen.until("half a line")
        screen.ctrl_c_at_prompt(r"\n> ")
        screen.ctrl_c_at_prompt(r"press Ctrl-C again, or Ctrl-D, to leave.*\n> ")
        screen.press("/set max_tokens 3\n")
        screen.until("max_tokens is 3\n> ")
        screen.press("one\\\n")
        screen.until("… ")
        screen.press("two\n")
        screen.until(FIGURES + "> ")
        screen.press("/show\n")
        screen.until(r"<\|im_start\|>user\none\ntwo<\|im_end\|>\n(.|\n)*that training would teach")
        screen.until("> ")
        screen.press("\x04")
        assert screen.ended() == 0
    saved = json.loads((tmp_path / "talk.json").read_text())
    assert [message["role"] for message in saved["messages"]] == ["user", "assistant"] * 2
    history = tmp_path / "maxstack" / "chat_history"
    assert "Go on\n" in history.read_text()
    assert history.stat().st_mode & 0o777 == 0o600


def test_ctrl_c_twice_leaves_and_history_can_be_off(model, tmp_path):
    with Terminal("chat", model, "--no-history", state=tmp_path) as screen:
        screen.until("> ")
        screen.press("/help\n")
        screen.until("Ctrl-D leaves(.|\n)*> ")
        screen.ctrl_c_at_prompt("again(.|\n)*> ")
        assert screen.ended("\x03") == 0
    assert not (tmp_path / "maxstack").exists()


def test_sigterm_leaves_at_once_with_the_inputs_remembered(model, tmp_path):
    with Terminal("chat", model, state=tmp_path) as screen:
        screen.until("> ")
        screen.press("/help\n")
        screen.until("Ctrl-D leaves(.|\n)*> ")
        assert screen.terminated() == 130
    assert (tmp_path / "maxstack" / "chat_history").read_text().endswith("/help\n")
