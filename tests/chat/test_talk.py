"""Inputs in, answers and notes out: commands, pipes, terminals, Ctrl-C."""

import io
import signal

import pytest

from maxstack.chat.commands import COMMANDS
from maxstack.chat.keyboard import CtrlC, Interrupts, Pipe, question
from maxstack.config import UserError
from tests.chat.stand_ins import Renderer, Writer, talk


class Keys:
    """A keyboard: each line, or each exception, in turn."""

    def __init__(self, *lines):
        self.lines = list(lines)
        self.prompts: list[str] = []

    def line(self, prompt: str) -> str:
        self.prompts.append(prompt)
        line = self.lines.pop(0) if self.lines else EOFError()
        if isinstance(line, BaseException):
            raise line
        return line


def piped(text: str, writer: Writer, **options):
    """Answers, notes and the number of faults of a pipe."""
    person, out, err = talk(writer, **options)
    person.through_pipe(Pipe(io.StringIO(text)))
    return out.getvalue(), err.getvalue(), person.faults


def test_a_pipe_gets_answers_alone_one_a_line():
    out, err, faults = piped("Hi\n\nHow?\n", Writer("Hello.", "So.\nAnd so."))
    assert out == "Hello.\nSo.\nAnd so.\n"
    assert "6 tokens" in err
    assert "tokens/s" in err
    assert "\x1b" not in out + err
    assert faults == 0


def test_a_pipe_is_one_conversation_with_commands():
    writer = Writer("a", "b", "c")
    out, err, faults = piped("/system Be brief.\n/set top_k 5\n1\n2\n/reset\n3\n/quit\n4\n", writer)
    assert out == "a\nb\nc\n"
    assert [p.top_k for p in writer.params] == [5, 5, 5]
    assert len(writer.prompts[1]) > len(writer.prompts[2]) == len(writer.prompts[0])
    assert "system message: Be brief." in err
    assert faults == 0


def test_the_system_message_is_removed_and_shown():
    writer = Writer("a")
    _, err, faults = piped('/system One.\n/system\n/system ""\nHi\n', writer)
    assert err.count("system message: One.") == 2
    assert "no system message" in err
    assert "system" not in "".join(map(chr, writer.prompts[0]))
    assert faults == 0


def test_show_without_a_mask_shows_the_prompt_and_says_why():
    class Unmasked(Renderer):
        def __call__(self, messages, *, add_generation_prompt=False, **options):
            if not add_generation_prompt:
                raise UserError("turns cannot be told")
            return super().__call__(messages, add_generation_prompt=True)

    _, err, faults = piped("Hi\n/show\n", Writer("So."), renderer=Unmasked())
    assert "without the mask: turns cannot be told" in err
    assert "So.<|im_end|>" in err.replace("⟧⟦", "").replace("⟦", "")
    assert faults == 0


def test_thoughts_stay_out_of_a_pipe():
    out, _, _ = piped("?\n", Writer("<think>hm</think>\nYes"), renderer=Renderer(template="</think>"))
    assert out == "Yes\n"


def test_a_bad_command_never_ends_the_program():
    bad = ["/sytem x", "/set", "/set tempo 1", "/set temperature hot", "/reset now", "/load /nowhere", "/save", "/show",
           "/regenerate", "/load", "/", "/system", "/show me"]  # fmt: skip
    out, err, faults = piped("\n".join([*bad, "Hi"]) + "\n", Writer("still here"))
    assert out == "still here\n"
    assert faults == len(bad) - 2  # /set and /system alone show what is set
    for part in (
        "did you mean /system?",
        "did you mean temperature",
        "not there",
        "/save FILE",
        "no answer yet",
    ):
        assert part in err


def test_two_slashes_begin_a_question_with_a_slash():
    writer = Writer("a folder")
    piped("//etc is?\n", writer)
    assert "\n/etc is?" in "".join(map(chr, writer.prompts[0]))


def test_faults_of_the_machine_are_told_and_the_talk_goes_on():
    out, err, faults = piped("a\nb\nc\n", Writer(MemoryError("no memory"), OSError(5, "bad disk"), "fine"))
    assert (out, faults) == ("fine\n", 2)
    assert "no memory" in err
    assert "bad disk" in err


@pytest.mark.parametrize("bug", [RuntimeError("bug"), TypeError("bug"), NotImplementedError("bug")])
def test_a_bug_is_not_hidden(bug):
    with pytest.raises(type(bug)):
        piped("a\n", Writer(bug))


def test_a_full_context_is_told():
    out, err, faults = piped("x" * 50 + "\n", Writer(), context=40)
    assert (out, faults) == ("", 1)
    assert "context is full" in err
    assert "/reset" in err


def test_a_context_that_fills_is_warned_of_before_it_is_full():
    _, err, _ = piped("Hi\n", Writer("x" * 60), context=100)
    assert "the context is 81% full (81 of 100 tokens)" in err
    assert "/reset" in err
    _, err, _ = piped("Hi\n", Writer("x" * 60), context=400)
    assert "the context is" not in err


def test_why_an_answer_ended():
    assert "cut off at max_tokens" in piped("?\n", Writer("xxxxx"), max_tokens=3)[1]
    assert "cut off: the context is full" in piped("?\n", Writer("x" * 90), context=60)[1]


def test_regenerate_at_temperature_0_says_that_it_changes_nothing():
    out, err, _ = piped("?\n/regenerate\n", Writer("a", "a"), temperature=0.0)
    assert (out, "will be the same" in err) == ("a\na\n", True)


def test_show_tells_special_tokens_and_mask():
    person, out, err = talk(Writer("Hi."))
    person.take("Hello")
    person.take("/show")
    assert err.getvalue().endswith(
        "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n⟦Hi.⟧⟦<|im_end|>⟧\n\n"
        "29 tokens; 4 that training would teach are underlined, or in ⟦ ⟧\n"
    )
    assert out.getvalue() == "Hi.\n"


def test_help_names_every_command():
    person, out, _ = talk(Writer(), terminal=True)
    assert person.take("/help")
    for word, command in COMMANDS.items():
        assert word in out.getvalue()
        assert command.help.split()[0] in out.getvalue()


def test_a_terminal_is_styled_and_cannot_be_steered_by_a_model(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    person, out, _ = talk(
        Writer("<think>hm</think>a\x1b[2Jb\rc\x9b"), terminal=True, renderer=Renderer(template="</think>")
    )
    person.take("?")
    text = out.getvalue()
    assert "\x1b[2J" not in text
    assert "\\x1b" in text
    assert "\r" not in text
    assert "\x9b" not in text
    assert "\x1b[2;3m" in text  # dim and italic


def test_the_marks_of_a_pipe_and_of_a_terminal(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    person, out, _ = talk(Writer("Hi."), terminal=True)
    person.take("Hello")
    person.take("/show")
    assert "⟦" not in out.getvalue()
    assert "\x1b[4m" in out.getvalue()  # underlined


def test_save_and_load(tmp_path):
    writer = Writer("one", "two", "three")
    piped(f"1\n/save {tmp_path}/a b.json\n2\n/load {tmp_path}/a b.json\n3\n", writer)
    assert len(writer.prompts[2]) == len(writer.prompts[1])


# ------------------------------------------------------------------------------------------------ keyboard


def test_several_lines():
    assert question(Keys("a\\", "b\\", "c")) == "a\nb\nc"
    assert question(Keys('"""a', "", " b", 'c"""')) == "a\n\n b\nc"
    assert question(Keys('"""', "a", '"""')) == "a"
    assert question(Keys('"""a"""')) == "a"
    assert question(Keys('"""a', "b")) == "a\nb"
    assert question(Keys("a\\")) == "a\n"
    keys = Keys("a\\", "b")
    question(keys)
    assert keys.prompts == ["> ", "… "]


def test_ctrl_d_leaves():
    person, _, _ = talk(Writer("a"))
    person.on_terminal(Keys("Hi"))
    assert len(person.conversation.messages) == 2


def test_ctrl_c_at_an_empty_prompt_warns_then_leaves():
    person, _, err = talk(Writer())
    keys = Keys(CtrlC(), CtrlC(), "never")
    person.on_terminal(keys)
    assert keys.lines == ["never"]
    assert err.getvalue().count("again") == 1


def test_ctrl_c_in_a_line_drops_the_line_only():
    person, _, err = talk(Writer())
    keys = Keys(CtrlC(), CtrlC("half a line"), CtrlC("x"), CtrlC(), "/help", CtrlC(), CtrlC(), "never")
    person.on_terminal(keys)
    assert keys.lines == ["never"]
    assert err.getvalue().count("again") == 3


def test_sigterm_is_not_ctrl_c():
    person, _, _ = talk(Writer())
    with pytest.raises(KeyboardInterrupt):
        person.on_terminal(Keys(KeyboardInterrupt(), "never"))


class Pressing(Writer):
    """Presses Ctrl-C before the letter ^, as often as there are."""

    def _said(self, prompt, text, params, session):
        for event in super()._said(prompt, text, params, session):
            if event.text == "^":
                signal.raise_signal(signal.SIGINT)
            yield event


def test_ctrl_c_stops_the_answer_and_not_the_program():
    writer = Pressing("ab^cd", "more")
    person, out, err = talk(writer)
    before = signal.getsignal(signal.SIGINT)
    with person._interrupts.handled():
        person.on_terminal(Keys("1", "2"))
    assert signal.getsignal(signal.SIGINT) is before
    assert out.getvalue() == "ab^\nmore\n\n"
    assert "· stopped" in err.getvalue()
    assert [m["content"] for m in person.conversation.messages] == ["1", "ab^", "2", "more"]
    assert writer.reused[1] == len(writer.prompts[0]) + 3  # the cache is as good as it was


def test_ctrl_c_before_the_first_word_takes_the_question_back_at_once():
    person, out, err = talk(Pressing("^ab", "more"))
    with person._interrupts.handled():
        person.on_terminal(Keys("1", "2"))
    assert out.getvalue() == "more\n\n"
    assert "stopped" in err.getvalue()
    assert [m["content"] for m in person.conversation.messages] == ["2", "more"]


def test_a_second_ctrl_c_does_not_wait_for_a_token():
    interrupts = Interrupts()
    with interrupts.handled(), interrupts.answering():
        interrupts.coming()
        signal.raise_signal(signal.SIGINT)
        assert interrupts.asked
        with pytest.raises(CtrlC):
            signal.raise_signal(signal.SIGINT)


def test_ctrl_c_ends_a_pipe():
    person, out, _ = talk(Pressing("ab^cd", "more"))
    with person._interrupts.handled(), pytest.raises(KeyboardInterrupt):
        person.through_pipe(Pipe(io.StringIO("1\n2\n")))
    assert out.getvalue() == "ab^\n"
