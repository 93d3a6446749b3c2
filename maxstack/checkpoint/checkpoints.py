"""The checkpoints of one run: save while training goes on, restore onto any mesh."""

import contextlib
import logging
import shutil
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import TracebackType
from typing import Any, cast

import jax
import numpy as np

import maxstack
from maxstack.checkpoint import arrays, folder, manifest, record
from maxstack.checkpoint.account import Account
from maxstack.checkpoint.config import CheckpointConfig
from maxstack.checkpoint.errors import STORAGE_ERRORS, CheckpointError, NewerLayout, first_line, save_failed
from maxstack.checkpoint.names import flatten, unflatten
from maxstack.checkpoint.restore import check, offering, read_state, refuse, verify

log = logging.getLogger(__name__)


class Checkpoints:
    """Saves and restores in one folder. With several processes each one makes this object and each call.

    The main thread is blocked by a save until the state is held for writing (`blocked_s`); a second save waits for
    the first. What failed in the background is raised by the next `save`, `check`, `wait` or `close`.
    """

    def __init__(self, directory: Path | str, config: CheckpointConfig | None = None) -> None:
        self.directory = Path(directory)
        self.config = config or CheckpointConfig()
        self.blocked_s = 0.0
        """Seconds the calling thread has spent in `save` and `wait`, over all calls."""
        self._writer: Any = None
        self._threads = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None
        self._writing: tuple[int, str] = (0, "")
        self._current: int | None = None
        self._cleared = False
        self._just_verified: dict[int, str] = {}
        self._ranking_checked = False

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.close()
        except CheckpointError as failed:
            if error is None:
                raise
            error.add_note(f"besides: {failed}")

    def steps(self) -> list[int]:
        """Steps that have a committed checkpoint, in order."""
        return folder.complete_steps(self.directory)

    def should_save(self, step: int, last: bool = False) -> bool:
        """Whether the configuration asks for a checkpoint after this step; `last` is the end of the run."""
        return last or (self.config.save_every > 0 and step > 0 and step % self.config.save_every == 0)

    def save(
        self,
        step: int,
        state: Mapping[str, Any],
        meta: Mapping[str, Any],
        metrics: Mapping[str, float] | None = None,
        block: bool = False,
    ) -> float:
        """Save the state after `step` steps; returns the seconds the caller was blocked.

        `state` is a nested dict of arrays, `meta` plain JSON. Both may change as soon as this returns. The step that
        was just saved or restored is not saved again. `block` waits until it is committed. Raises CheckpointError
        if this save, or the one before in the background, failed; TypeError or ValueError for a wrong state or meta.
        """
        start = time.perf_counter()
        try:
            self._save(step, state, meta, metrics or {})
            if block or not self.config.asynchronous:
                self._wait()
        finally:
            blocked = time.perf_counter() - start
            self.blocked_s += blocked
        return blocked

    def idle(self) -> bool:
        """Whether nothing is being written in the background."""
        return self._pending is None or self._pending.done()

    def check(self) -> None:
        """Raise CheckpointError if the save in the background has failed already; never waits."""
        if self._pending is not None and self._pending.done():
            self._wait()

    def wait(self) -> None:
        """Wait until the save in the background is committed. Raises CheckpointError if it failed."""
        start = time.perf_counter()
        try:
            self._wait()
        finally:
            self.blocked_s += time.perf_counter() - start

    def close(self) -> None:
        """Wait, then let the threads go. Raises CheckpointError as `wait` does."""
        try:
            self.wait()
        finally:
            self._threads.shutdown()
            if self._writer is not None:
                self._writer.close()
                self._writer = None

    def latest_good(self) -> int | None:
        """The newest step whose files are intact, None if there is none; damaged ones are passed over with a warning.

        Raises CheckpointError, with the older good step, if a later version wrote a newer one: going back past it
        would lose work.
        """
        return _first_decides(self._latest_good, f"no checkpoint in {self.directory} is taken")

    def best(self) -> int | None:
        """The step with the best `best_metric`, None if none has it."""
        metrics = {
            step: record.read_record(folder.step_folder(self.directory, step)).metrics
            for step in self.steps()
        }
        return next(iter(folder.ranked(metrics, self.config)), None)

    def restore(
        self, step: int | None = None, target: Mapping[str, Any] | None = None
    ) -> tuple[dict[str, Any], dict[str, Any], Account]:
        """State, meta and account of a step (the newest one).

        `target` is the state wanted, with arrays or `jax.ShapeDtypeStruct` whose shardings may be on another mesh
        than the one that saved; names, shapes and dtypes must be equal. Without it every array comes as numpy.
        Raises CheckpointError: none there, damaged or of a newer layout (both with an older good step in
        `good_step`), or not what the target says.
        """
        self.wait()
        if step is None:
            step = _first_decides(lambda: max(self.steps(), default=None), f"{self.directory} cannot be read")
        path = folder.locate(self.directory, step)
        verified = self._verified(path, int(path.name))
        described = record.read_record(path)
        state, account = read_state(
            path, described, flatten(target) if target is not None else None, verified
        )
        if not account.complete:
            raise refuse(account)
        self._current = described.step
        return unflatten(state), described.meta, account

    def _save(
        self, step: int, state: Mapping[str, Any], meta: Mapping[str, Any], metrics: Mapping[str, Any]
    ) -> None:
        if step < 0:
            raise ValueError(f"step {step} must not be negative")
        if step == self._current:
            return
        self._wait()
        ready, keys = arrays.storable(flatten(state))
        text = record.Record(
            step=step,
            time=datetime.now(UTC).isoformat(timespec="seconds"),
            versions=_versions(),
            metrics={name: float(value) for name, value in metrics.items()},
            meta=dict(meta),
            keys=keys,
            arrays={name: arrays.spec_of(leaf) for name, leaf in ready.items()},
        ).text()
        self._check_ranking(metrics)
        self._writing = (step, text)
        try:
            if jax.process_index() == 0:
                self._make_room(step)
            if self._writer is None:
                self._writer = arrays.writer(self._seal, self.config.timeout_s)
            arrays.save(self._writer, folder.step_folder(self.directory, step), ready)
        except STORAGE_ERRORS as error:
            raise self._failed(step, error) from error
        self._current = step
        self._pending = self._threads.submit(self._finish)

    def _check_ranking(self, metrics: Mapping[str, Any]) -> None:
        """Say once that `best_metric` is none of the metrics, at the first save that could have it: one with metrics,
        and for a "GROUP.NAME" one with some of that group, as those of an evaluation."""
        group, dot, _ = self.config.best_metric.partition(".")
        could = any(not dot or name.startswith(f"{group}.") for name in metrics)
        if not could or not self.config.keep_best or self._ranking_checked:
            return
        self._ranking_checked = True
        if self.config.best_metric not in metrics and jax.process_index() == 0:
            log.warning(
                "checkpoint.best_metric %r is none of the metrics of this checkpoint (%s): without it none ranks, and "
                "keep_best keeps none", self.config.best_metric, ", ".join(sorted(metrics)),
            )  # fmt: skip

    def _make_room(self, step: int) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        if not self._cleared:
            folder.clear_half_written(self.directory)
            self._cleared = True
        folder.set_aside(self.directory, step)

    def _seal(self) -> None:
        """Runs in Orbax's thread before the rename: whatever is committed has its record and manifest."""
        step, text = self._writing
        path = folder.step_folder(self.directory, step)
        temporary = path.with_name(path.name + folder.TEMPORARY)
        manifest.write_synced(temporary / record.FILE, text)
        manifest.write_manifest(temporary)

    def _finish(self) -> None:
        self._writer.wait_until_finished()
        if jax.process_index() == 0:
            folder.sync(self.directory)
            folder.prune(self.directory, self.config)

    def _wait(self) -> None:
        pending, self._pending = self._pending, None
        if pending is None:
            return
        try:
            pending.result()
        except STORAGE_ERRORS as error:
            raise self._failed(self._writing[0], error) from error

    def _failed(self, step: int, error: BaseException) -> CheckpointError:
        self._current = None
        if jax.process_index() == 0:
            path = folder.step_folder(self.directory, step)
            shutil.rmtree(path.with_name(path.name + folder.TEMPORARY), ignore_errors=True)
        try:
            steps = self.steps()
        except OSError as unreadable:
            return CheckpointError(
                f"{self.directory} cannot be read any more: {first_line(unreadable)}", step=step
            )
        return save_failed(self.directory, step, steps, error)

    def _latest_good(self) -> int | None:
        for path in folder.half_written(self.directory):
            log.warning("%s is half-written and ignored", path)
        for step in folder.newest_first(self.steps()):
            path = folder.step_folder(self.directory, step)
            try:
                self._just_verified = {step: verify(path, self.config.verify)}
            except NewerLayout as error:
                raise offering(error, path, self.config.verify) from error
            except CheckpointError as error:
                log.warning("checkpoint %d is passed over: %s", step, error)
            else:
                return step
        return None

    def _verified(self, path: Path, step: int) -> str:
        """How the files were checked; the error names an older step that is good. One process looks."""
        words = ("hash", "size", "no", "unverified")

        def look() -> int:
            # Not hashed again by the restore that follows latest_good().
            known = self._just_verified.pop(step, None)
            return words.index(known or check(path, self.config.verify))

        return words[_first_decides(look, f"checkpoint {step} in {self.directory} cannot be restored")]


def _first_decides[T: int | None](look: Callable[[], T], refusal: str) -> T:
    """What `look` returns in the first process, in all of them; if it raises CheckpointError there, all of them do.

    The reason stays with the first process: the others say `refusal`, with the same steps.
    """
    if jax.process_count() == 1:
        return look()
    from jax.experimental import multihost_utils

    error: CheckpointError | None = None
    value = None
    if jax.process_index() == 0:
        try:
            value = look()
        except CheckpointError as raised:
            error = raised
    found = (value, error and error.step, error and error.good_step)
    numbers = [error is not None, *(-1 if number is None else number for number in found)]
    raised_there, *numbers = map(int, multihost_utils.broadcast_one_to_all(np.array(numbers, np.int64)))
    value, step, good = (None if number < 0 else number for number in numbers)
    if error is not None:
        raise error
    if raised_there:
        offer = (
            "no other checkpoint is intact" if good is None else f"step {good} is intact: restore that one"
        )
        raise CheckpointError(f"{refusal} (the first process says why); {offer}", step=step, good_step=good)
    return cast(T, value)


def _versions() -> dict[str, str]:
    found = {"maxstack": maxstack.__version__}
    for package in ("jax", "flax", "optax", "orbax-checkpoint"):
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package)
    return found
