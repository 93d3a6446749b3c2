"""Which checkpoints stay, and that going back to an older one destroys nothing."""

from pathlib import Path

import jax.numpy as jnp
import pytest

from maxstack.checkpoint import CheckpointConfig, Checkpoints, read_arrays
from maxstack.checkpoint.folder import kept, ranked

LOSSES = {1: 5.0, 2: 3.0, 3: 4.0, 4: 9.0, 5: 9.0, 6: 9.0}
METRICS = {step: {"loss": loss} for step, loss in LOSSES.items()}


@pytest.mark.parametrize(
    ("config", "steps"),
    [
        (CheckpointConfig(keep_last=1), {6}),
        (CheckpointConfig(keep_last=2), {5, 6}),
        (CheckpointConfig(keep_last=9), {1, 2, 3, 4, 5, 6}),
        (CheckpointConfig(keep_last=1, keep_every=2), {2, 4, 6}),
        (CheckpointConfig(keep_last=1, keep_best=2), {2, 3, 6}),
        (CheckpointConfig(keep_last=1, keep_best=1, best_mode="max"), {4, 6}),
        (CheckpointConfig(keep_last=1, keep_every=5, keep_best=1), {2, 5, 6}),
        (CheckpointConfig(keep_last=1, keep_best=3, best_metric="accuracy"), {6}),
    ],
)
def test_last_and_every_and_best_are_kept(config: CheckpointConfig, steps: set[int]) -> None:
    assert kept(METRICS, config) == steps


def test_a_metric_that_is_absent_or_not_finite_never_ranks_as_best() -> None:
    metrics = {
        1: {"loss": 2.0},
        2: {"loss": float("nan")},
        3: {"loss": float("-inf")},
        4: {},
        5: {"loss": 1.0},
    }
    assert ranked(metrics, CheckpointConfig()) == [5, 1]


def test_of_equally_good_ones_the_earlier_stays() -> None:
    equal = {step: {"loss": 1.0} for step in (1, 2, 3)}
    for mode in ("min", "max"):
        assert ranked(equal, CheckpointConfig(best_mode=mode)) == [1, 2, 3]


def test_a_best_metric_that_is_never_saved_is_said_once_with_those_there_are(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def warnings(folder: str, config: CheckpointConfig, *metrics: dict[str, float]) -> list[str]:
        caplog.clear()
        with Checkpoints(tmp_path / folder, config) as checkpoints:
            for step, values in enumerate(metrics):
                checkpoints.save(step, {"w": jnp.full(4, step)}, {}, values)
        return [record.getMessage() for record in caplog.records if "best_metric" in record.getMessage()]

    misspelt = CheckpointConfig(keep_best=1, best_metric="held_out.word")
    found = {"loss": 1.0, "held_out.words": 2.0}
    (message,) = warnings("misspelt", misspelt, {}, found, found)
    assert "'held_out.word' is none of" in message
    assert "held_out.words, loss" in message
    right = CheckpointConfig(keep_best=1, best_metric="held_out.words")
    assert warnings("right", right, {}, found) == []
    assert warnings("not ranked", CheckpointConfig(best_metric="held_out.word"), found) == []


def test_saving_deletes_what_is_not_kept(tmp_path: Path) -> None:
    config = CheckpointConfig(keep_last=2, keep_every=3, keep_best=1)
    with Checkpoints(tmp_path, config) as checkpoints:
        for step, loss in LOSSES.items():
            checkpoints.save(step, {"w": jnp.full(4, step)}, {}, {"loss": loss})
        checkpoints.wait()
        assert checkpoints.steps() == [2, 3, 5, 6]
        assert checkpoints.best() == 2
        assert sorted(path.name for path in tmp_path.iterdir()) == [f"{step:08d}" for step in (2, 3, 5, 6)]


def test_going_back_sets_later_checkpoints_aside_instead_of_deleting_them(tmp_path: Path) -> None:
    with Checkpoints(tmp_path) as checkpoints:
        for step in (10, 20, 30):
            checkpoints.save(step, {"w": jnp.full(4, step)}, {})
    for again in range(2):
        with Checkpoints(tmp_path) as checkpoints:
            checkpoints.restore(10)
            checkpoints.save(20, {"w": jnp.full(4, -20)}, {})
            checkpoints.wait()
            assert checkpoints.steps() == [10, 20]
            assert (checkpoints.restore()[0]["w"] == -20).all()
            aside = sorted(path.name for path in (tmp_path / "set_aside").iterdir())
            assert aside == ["00000020.0", *["00000020.1"] * again, "00000030.0"]
    # What was set aside can be read where it lies.
    assert (read_arrays(tmp_path / "set_aside" / "00000030.0")["w"] == 30).all()


@pytest.mark.parametrize(
    ("field", "value"), [("keep_last", 0), ("keep_every", -1), ("save_every", -1), ("keep_best", -1)]
)
def test_impossible_settings_are_refused_by_name(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=rf"checkpoint\.{field}"):
        CheckpointConfig(**{field: value})  # pyrefly: ignore


def test_should_save_at_multiples_and_at_the_end() -> None:
    checkpoints = Checkpoints("unused", CheckpointConfig(save_every=5))
    assert [step for step in range(12) if checkpoints.should_save(step, last=step == 11)] == [5, 10, 11]
    never = Checkpoints("unused", CheckpointConfig(save_every=0))
    assert [step for step in range(12) if never.should_save(step, last=step == 11)] == [11]
