"""Faults, planted for real: what is said, what is offered, what is left untouched."""

import errno
import json
import logging
import os
import resource
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maxstack.checkpoint import (
    CheckpointConfig,
    CheckpointError,
    Checkpoints,
    manifest,
    read_arrays,
    restore_partial,
)
from maxstack.checkpoint.folder import half_written
from maxstack.config import RunError

# After a failed read or write Orbax closes its event loop while tensorstore still reports to it.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    """A thread that still waits for something would keep the process from exiting."""
    before = set(threading.enumerate())
    yield
    for thread in set(threading.enumerate()) - before:
        # An executor of an object that was not closed is idle and ends with the interpreter.
        if not thread.daemon and not thread.name.startswith(("checkpoint", "asyncio")):
            thread.join(10)
            assert not thread.is_alive(), f"{thread} is left over"


def state_of(step: int, size: int = 4096) -> dict[str, jax.Array]:
    return {"w": jax.random.normal(jax.random.key(step), (size,)), "b": jnp.full((3,), step)}


def save_steps(directory: Path, *steps: int) -> None:
    with Checkpoints(directory, CheckpointConfig(keep_last=9)) as checkpoints:
        for step in steps:
            checkpoints.save(step, state_of(step), {"position": step})


def holds(directory: Path, step: int) -> bool:
    state, meta, _ = Checkpoints(directory).restore(step)
    return meta == {"position": step} and all(np.array_equal(state[k], v) for k, v in state_of(step).items())


def largest_file(folder: Path) -> Path:
    return max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


def flip_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


DAMAGE: list[tuple[Callable[[Path], None], str]] = [
    (flip_byte, "has changed since it was written"),
    (truncate, r"has \d+ bytes instead of \d+"),
    (Path.unlink, "is missing"),
]


@pytest.mark.parametrize(("damage", "says"), DAMAGE, ids=["flipped byte", "truncated", "missing"])
def test_damage_is_named_and_an_older_good_step_offered(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: Callable[[Path], None], says: str
) -> None:
    save_steps(tmp_path, 1, 2, 3)
    victim = largest_file(tmp_path / "00000003")
    damage(victim)
    listing = sorted(tmp_path.rglob("*"))
    checkpoints = Checkpoints(tmp_path)
    with pytest.raises(CheckpointError, match=says) as caught:
        checkpoints.restore()
    assert isinstance(caught.value, RunError)
    assert str(victim) in str(caught.value)
    assert "step 2 is intact: restore that one" in str(caught.value)
    assert (caught.value.step, caught.value.good_step) == (3, 2)
    assert checkpoints.latest_good() == 2
    assert "checkpoint 3 is passed over" in caplog.text
    assert holds(tmp_path, 2)
    assert sorted(tmp_path.rglob("*")) == listing
    with pytest.raises(CheckpointError, match=says):
        read_arrays(tmp_path)


def test_every_file_of_a_checkpoint_is_covered(tmp_path: Path) -> None:
    """A flipped byte in any file is reported, or does not matter to what is read."""
    save_steps(tmp_path / "whole", 1)
    names = [p.relative_to(tmp_path / "whole") for p in (tmp_path / "whole").rglob("*") if p.is_file()]
    uncovered = []
    for number, name in enumerate(names):
        copy = tmp_path / str(number)
        shutil.copytree(tmp_path / "whole", copy)
        (copy / name).write_bytes(b"\xff" + (copy / name).read_bytes()[1:])
        found = ""
        try:
            assert holds(copy, 1), f"{name} changed what was read"
        except CheckpointError as error:
            found = str(error)
        if not found:
            uncovered.append(name.name)
        assert not found or name.name in found
    assert sorted(uncovered) == ["_CHECKPOINT_METADATA", "commit_success.txt"]


def test_without_hashes_a_wrong_size_is_still_found_and_damage_gives_no_raw_error(tmp_path: Path) -> None:
    save_steps(tmp_path, 1)
    (tmp_path / "00000001" / "manifest.ocdbt").write_bytes(b"x" * 40)
    with pytest.raises(CheckpointError, match=r"manifest.ocdbt has 40 bytes"):
        Checkpoints(tmp_path, CheckpointConfig(verify="size")).restore()
    with pytest.raises(
        CheckpointError, match="cannot be read; its files were not compared with their hashes"
    ):
        Checkpoints(tmp_path, CheckpointConfig(verify="none")).restore()


def test_latest_good_and_the_restore_after_it_hash_the_files_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_steps(tmp_path, 1)
    looked = []
    problems = manifest.problems
    monkeypatch.setattr(
        manifest, "problems", lambda path, how: looked.append(path.name) or problems(path, how)
    )
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.restore(checkpoints.latest_good())[2].verified == "hash"
    assert looked == ["00000001"]
    assert checkpoints.restore(1)[2].verified == "hash"
    assert looked == ["00000001"] * 2


def test_all_damaged_says_so(tmp_path: Path) -> None:
    save_steps(tmp_path, 1, 2)
    for step in (1, 2):
        flip_byte(largest_file(tmp_path / f"{step:08d}"))
    with pytest.raises(CheckpointError, match="no other checkpoint is intact; nothing was deleted") as caught:
        Checkpoints(tmp_path).restore()
    assert caught.value.good_step is None
    assert Checkpoints(tmp_path).latest_good() is None


def test_after_damage_the_run_goes_on_from_the_good_step_and_keeps_the_damaged_one(tmp_path: Path) -> None:
    save_steps(tmp_path, 1, 2, 3)
    flip_byte(largest_file(tmp_path / "00000003"))
    with Checkpoints(tmp_path, CheckpointConfig(keep_last=9)) as checkpoints:
        checkpoints.restore(checkpoints.latest_good())
        checkpoints.save(3, state_of(3), {"position": 3})
    assert holds(tmp_path, 3)
    assert (tmp_path / "set_aside" / "00000003.0").is_dir()


def test_a_checkpoint_without_manifest_is_used_and_called_unverified(tmp_path: Path) -> None:
    save_steps(tmp_path, 1)
    (tmp_path / "00000001" / "manifest.json").unlink()
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.latest_good() == 1
    _, _, account = checkpoints.restore()
    assert account.verified == "unverified"
    assert "unverified: it has no manifest" in str(account)


def test_a_newer_layout_is_refused_and_not_passed_over(tmp_path: Path) -> None:
    save_steps(tmp_path, 1, 2)
    path = tmp_path / "00000002" / "checkpoint.json"
    record = json.loads(path.read_text())
    path.write_text(json.dumps(record | {"layout": 9, "versions": {"maxstack": "7.1"}}))
    listing = sorted(tmp_path.rglob("*"))
    checkpoints = Checkpoints(tmp_path)
    for use in (checkpoints.restore, checkpoints.latest_good, lambda: restore_partial(tmp_path, {})):
        with pytest.raises(
            CheckpointError, match=r"layout 9, this maxstack reads up to 1.*maxstack 7\.1"
        ) as caught:
            use()
        assert "step 1 is intact: restore that one (--step 1)" in str(caught.value)
        assert f"move the later ones out of {tmp_path} to resume" in str(caught.value)
        assert (caught.value.step, caught.value.good_step) == (2, 1)
    assert sorted(tmp_path.rglob("*")) == listing
    # What the message says works.
    assert holds(tmp_path, 1)
    (tmp_path / "00000002").rename(tmp_path / "elsewhere")
    assert checkpoints.latest_good() == 1


def test_beside_a_newer_layout_only_what_this_version_can_read_is_offered(tmp_path: Path) -> None:
    save_steps(tmp_path, 1, 2, 3, 4)
    for step in (2, 4):
        path = tmp_path / f"{step:08d}" / "checkpoint.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"layout": 9}))
    flip_byte(largest_file(tmp_path / "00000003"))
    for use in (Checkpoints(tmp_path).restore, Checkpoints(tmp_path).latest_good):
        with pytest.raises(CheckpointError, match="layout 9") as caught:
            use()
        assert (caught.value.step, caught.value.good_step) == (4, 1)
    flip_byte(largest_file(tmp_path / "00000001"))
    with pytest.raises(
        CheckpointError, match=r"layout 9.*no other checkpoint is intact; nothing was deleted"
    ):
        Checkpoints(tmp_path).latest_good()


def test_half_written_folders_are_ignored_with_a_notice_and_cleared_by_the_next_save(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save_steps(tmp_path, 1)
    (tmp_path / "00000002.orbax-checkpoint-tmp" / "d").mkdir(parents=True)
    (tmp_path / "00000003.deleting").mkdir()
    (tmp_path / "00000004").mkdir()
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.steps() == [1]
        assert checkpoints.latest_good() == 1
        assert caplog.text.count("is half-written and ignored") == 3
        # A reader, beside a run that is saving, clears nothing.
        assert len(half_written(tmp_path)) == 3
        checkpoints.restore()
        checkpoints.save(5, state_of(5), {"position": 5})
    # A numbered folder without a record may be someone's own: it stays.
    assert [path.name for path in half_written(tmp_path)] == ["00000004"]
    assert Checkpoints(tmp_path).steps() == [1, 5]


def test_nothing_there_is_said_plainly(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="there is no checkpoint in"):
        Checkpoints(tmp_path / "absent").restore()
    save_steps(tmp_path, 1, 2)
    with pytest.raises(CheckpointError, match=r"no checkpoint of step 7 in .*; there are \[1, 2\]"):
        Checkpoints(tmp_path).restore(7)


@pytest.fixture
def small_disk() -> Iterator[Path]:
    """A file system of 2 MiB, where mounting is allowed."""
    folder = Path(tempfile.mkdtemp())
    mounted = shutil.which("mount") and os.geteuid() == 0
    command = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)]
    if not mounted or subprocess.run(command, capture_output=True, check=False).returncode:
        folder.rmdir()
        pytest.skip("mounting a small file system is not allowed here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)
        folder.rmdir()


def test_full_disk_leaves_the_earlier_checkpoint_and_saving_works_again_with_space(small_disk: Path) -> None:
    directory = small_disk / "checkpoints"
    save_steps(directory, 1)
    filler = small_disk / "filler"
    filler.write_bytes(bytes(1_900_000))
    with Checkpoints(directory) as checkpoints:
        checkpoints.save(2, state_of(2, 2**18), {"position": 2})
        with pytest.raises(
            CheckpointError, match=r"checkpoint 2 could not be saved .*disk is full.*checkpoints 1 are"
        ):
            checkpoints.wait()
        assert checkpoints.steps() == [1]
        assert half_written(directory) == []
        assert holds(directory, 1)
        filler.unlink()
        checkpoints.save(2, state_of(2), {"position": 2})
    assert holds(directory, 2)


@pytest.fixture
def file_size_limit() -> Iterator[Callable[[int], None]]:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda limit: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_write_that_fails_in_the_background_is_raised_by_the_next_save_check_or_close(
    tmp_path: Path, file_size_limit: Callable[[int], None]
) -> None:
    save_steps(tmp_path, 1)
    file_size_limit(64 * 1024)
    message = r"checkpoint 2 could not be saved .*limit is reached.*checkpoints 1 are untouched"
    for ask in ("save", "check", "close"):
        checkpoints = Checkpoints(tmp_path)
        checkpoints.restore(1)
        checkpoints.save(2, state_of(2, 2**16), {})
        if ask == "check":
            assert checkpoints._pending is not None
            checkpoints._pending.exception(30)
        with pytest.raises(CheckpointError, match=message):
            checkpoints.save(3, state_of(3), {}) if ask == "save" else getattr(checkpoints, ask)()
        checkpoints.close()
        assert checkpoints.steps() == [1]


def test_an_error_on_the_way_out_is_not_hidden_by_a_failed_save(
    tmp_path: Path, file_size_limit: Callable[[int], None]
) -> None:
    file_size_limit(64 * 1024)

    def loop() -> None:
        with Checkpoints(tmp_path) as checkpoints:
            checkpoints.save(2, state_of(2, 2**16), {})
            raise KeyError("the loop's own error")

    with pytest.raises(KeyError) as caught:
        loop()
    assert "besides: checkpoint 2 could not be saved" in caught.value.__notes__[0]


@pytest.fixture
def unwritable() -> Iterator[Path]:
    """A folder with one checkpoint, in which this process may read but not write."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    save_steps(folder, 1)
    root = os.geteuid() == 0
    folder.chmod(0o555)
    if root:
        os.seteuid(65534)
    try:
        yield folder
    finally:
        if root:
            os.seteuid(0)
        folder.chmod(0o755)
        shutil.rmtree(folder)


def test_lost_permission_is_said_and_the_earlier_checkpoint_read(unwritable: Path) -> None:
    with Checkpoints(unwritable) as checkpoints:
        with pytest.raises(
            CheckpointError, match=r"writing there is not permitted; checkpoints 1 are untouched"
        ):
            checkpoints.save(2, state_of(2), {}, block=True)
        assert holds(unwritable, 1)


def test_an_unreadable_disk_while_reading_is_a_clear_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_steps(tmp_path, 1)
    opened = Path.open

    def failing(self: Path, *args: object, **kwargs: object) -> object:
        if self.parent.name == "d":
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(self))
        return opened(self, *args, **kwargs)  # pyrefly: ignore

    monkeypatch.setattr(Path, "open", failing)
    with pytest.raises(CheckpointError, match="cannot be read: Input/output error"):
        Checkpoints(tmp_path).restore()


def test_orbax_does_not_write_into_the_log(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    save_steps(tmp_path, 1)
    assert holds(tmp_path, 1)
    assert [record for record in caplog.records if "orbax" in record.pathname] == []
