"""What /save writes /load takes, and nothing else; neither ever leaves half of anything."""

import json

import pytest

from maxstack.chat import saved
from maxstack.config import RunError, UserError
from tests.chat.stand_ins import Renderer, Writer, conversation


@pytest.fixture
def talked():
    talk = conversation(Writer("Hi 你好 \U0001f600", "again"))
    talk.set_system("Be brief.")
    list(talk.ask("Hello\nyou"))
    talk.settings = talk.settings.changed("top_p", "0.5").changed("template.x", "true")
    return talk


def test_round_trip(talked, tmp_path):
    file = tmp_path / "talk.json"
    saved.save(talked, file)
    other = conversation(Writer("x"))
    assert saved.load(other, file) == "stand-in"
    assert other.messages == talked.messages
    assert other.settings == talked.settings
    assert json.loads(file.read_text())["messages"][0] == {"role": "system", "content": "Be brief."}
    assert [path.name for path in tmp_path.iterdir()] == ["talk.json"]


def test_thoughts_are_saved(tmp_path):
    talk = conversation(Writer("<think>a</think>b"), renderer=Renderer(template="</think>"))
    list(talk.ask("?"))
    saved.save(talk, tmp_path / "a")
    other = conversation(Writer())
    saved.load(other, tmp_path / "a")
    assert other.messages[-1] == {"role": "assistant", "content": "b", "reasoning_content": "a"}


def test_a_saved_conversation_is_replaced_and_nothing_else_is(talked, tmp_path):
    file = tmp_path / "a.json"
    saved.save(talked, file)
    talked.reset()
    saved.save(talked, file)
    assert len(json.loads(file.read_text())["messages"]) == 1
    file.write_text("my notes")
    with pytest.raises(UserError, match="left alone"):
        saved.save(talked, file)
    assert file.read_text() == "my notes"
    with pytest.raises(UserError, match="left alone"):
        saved.save(talked, tmp_path)
    with pytest.raises(UserError, match="is no folder"):
        saved.save(talked, tmp_path / "absent" / "a.json")


def test_a_fault_while_writing_leaves_the_old_file(talked, tmp_path, monkeypatch):
    file = tmp_path / "a.json"
    saved.save(talked, file)
    before = file.read_bytes()
    monkeypatch.setattr("os.fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    talked.reset()
    with pytest.raises(RunError, match="No space left"):
        saved.save(talked, file)
    assert file.read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 1


GOOD = {"format": saved.FORMAT, "version": 1, "model": "m", "settings": {}, "messages": []}
Q, A = {"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}


@pytest.mark.parametrize(
    ("content", "part"),
    [
        ("{", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        (b"\xff\xfe", "is not JSON"),
        ("[]", "holds no conversation"),
        ({"messages": []}, "holds no conversation"),
        (GOOD | {"version": 2}, "version 2"),
        (GOOD | {"messages": {}}, "no list"),
        (GOOD | {"messages": ["hi"]}, "messages[0] needs a role"),
        (GOOD | {"messages": [{"role": "robot", "content": ""}]}, "needs a role"),
        (GOOD | {"messages": [{"role": "user"}]}, "needs content"),
        (GOOD | {"messages": [{"role": "user", "content": 1}]}, "content is not"),
        (GOOD | {"messages": [Q | {"name": "x"}]}, "name is not"),
        (GOOD | {"messages": [Q]}, "take turns"),
        (GOOD | {"messages": [Q, Q]}, "turn 2"),
        (GOOD | {"messages": [A, Q]}, "turn 1"),
        (GOOD | {"messages": [Q, A, {"role": "system", "content": ""}]}, "take turns"),
        (GOOD | {"settings": {"temperature": "hot"}}, "a number is expected"),
    ],
)
def test_a_wrong_file_is_refused_and_the_conversation_stays(talked, tmp_path, content, part):
    file = tmp_path / "a.json"
    if isinstance(content, bytes):
        file.write_bytes(content)
    else:
        file.write_text(content if isinstance(content, str) else json.dumps(content))
    messages, settings = list(talked.messages), talked.settings
    with pytest.raises(UserError) as refused:
        saved.load(talked, file)
    assert part in str(refused.value)
    assert (talked.messages, talked.settings) == (messages, settings)


def test_files_that_are_none(talked, tmp_path):
    for name, part in (("absent", "not there"), (".", "no file"), ("/dev/zero", "no file")):
        with pytest.raises(UserError, match=part):
            saved.load(talked, tmp_path / name)


def test_a_huge_file_is_not_read(talked, tmp_path):
    with (tmp_path / "a").open("wb") as file:
        file.truncate(saved.LARGEST_FILE + 1)
    with pytest.raises(UserError, match="at most"):
        saved.load(talked, tmp_path / "a")


def test_messages_that_this_template_refuses_are_not_taken(tmp_path):
    talk = conversation(Writer("!"))
    talk.set_system("Be brief.")
    list(talk.ask("?"))
    saved.save(talk, tmp_path / "a")
    other = conversation(Writer(), renderer=Renderer(system=False), seed=5)
    with pytest.raises(UserError, match="no system message"):
        saved.load(other, tmp_path / "a")
    assert other.messages == []
    assert other.settings.sampling.seed == 5
