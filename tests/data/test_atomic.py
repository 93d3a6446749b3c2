import threading
from pathlib import Path

import pytest

from maxstack.config import RunError
from maxstack.data.atomic import build_once

FILES = 400


def fill(folder: Path) -> None:
    for number in range(FILES):
        (folder / f"{number}.bin").write_bytes(bytes(2000))


def test_a_folder_is_never_seen_half(tmp_path):
    target, seen, done = tmp_path / "target", [], threading.Event()

    def watch() -> None:
        while not (done.is_set() and seen):
            if target.exists():
                seen.append(len(list(target.iterdir())))

    watcher = threading.Thread(target=watch)
    watcher.start()
    assert build_once(target, fill)
    done.set()
    watcher.join()
    assert set(seen) == {FILES}


def test_a_folder_that_is_there_is_not_built_again(tmp_path):
    assert build_once(tmp_path / "target", fill)
    assert not build_once(tmp_path / "target", lambda folder: pytest.fail("built twice"))


def test_remains_of_a_killed_builder_are_removed(tmp_path):
    (tmp_path / ".target.abc.partial").mkdir()
    (tmp_path / ".target.abc.partial" / "half").write_text("half")
    build_once(tmp_path / "target", fill)
    assert [p.name for p in tmp_path.iterdir() if p.name.endswith(".partial")] == []


def test_a_failed_builder_leaves_nothing_and_the_next_one_can_work(tmp_path):
    def fail(folder: Path) -> None:
        fill(folder)
        raise OSError(28, "No space left on device")

    with pytest.raises(RunError, match="No space left"):
        build_once(tmp_path / "target", fail)
    assert [p.name for p in tmp_path.iterdir()] == [".target.lock"]
    assert build_once(tmp_path / "target", fill)


def test_a_file_that_cannot_be_read_is_not_called_a_full_disk(tmp_path):
    missing = tmp_path.parent / "elsewhere" / "input.txt"
    with pytest.raises(RunError, match=f"cannot read {missing}"):
        build_once(tmp_path / "target", lambda folder: missing.read_text() and None)
