"""The whole loop on a tiny run: what it writes, that it resumes exactly, what it refuses."""

import dataclasses
import json
import logging
import shutil
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maxstack.checkpoint import CheckpointConfig, read_arrays
from maxstack.config import RunError, UserError, load_run
from maxstack.models.load import load
from maxstack.sharding import MeshConfig
from maxstack.telemetry import read_rows
from maxstack.train import loop, session
from maxstack.train.evaluate import HeldOutLoss
from maxstack.train.run import EvaluationConfig, RunConfig, SampleConfig
from maxstack.train.stop import StopRequest
from tests.train.runs import tiny_run

ONE = 1


def run_on(run: RunConfig, devices: int = ONE):
    return loop.train(run, jax.devices()[:devices])


def losses(run: RunConfig) -> dict[int, float]:
    rows = read_rows(Path(run.out) / "metrics.jsonl")
    return {row["step"]: row["loss"] for row in rows if row["kind"] == "train"}


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> RunConfig:
    run = tiny_run(
        tmp_path_factory.mktemp("finished"), evaluation=EvaluationConfig(every=3),
        samples=SampleConfig(every=0, prompts=("the king",), max_tokens=8),
    )  # fmt: skip
    run_on(run)
    return run


def test_run_writes_a_row_per_step_with_what_users_watch(finished):
    rows = [row for row in read_rows(Path(finished.out) / "metrics.jsonl") if row["kind"] == "train"]
    assert [row["step"] for row in rows] == list(range(1, 8))
    wanted = {
        "loss", "tokens", "tokens_per_second", "step_seconds", "data_wait_seconds", "gradient_norm", "learning_rate",
        "flops_per_token_full", "flops_per_token_causal", "host_memory_bytes", "device_memory_bytes",
    }  # fmt: skip
    assert wanted <= rows[0].keys()
    assert rows[-1]["loss"] < rows[0]["loss"]


def test_run_leaves_evaluations_samples_and_a_run_file_that_runs_again(finished):
    out = Path(finished.out)
    evaluations = [row for row in read_rows(out / "metrics.jsonl") if row["kind"] == "evaluation"]
    assert [row["step"] for row in evaluations] == [3, 6, 7]
    assert 0 < evaluations[-1]["held_out"]["words"]["bits_per_byte"] < 9
    assert [row["prompt"] for row in read_rows(out / "samples.jsonl")] == ["the king"]
    assert load_run(out / "run.py") == finished


def test_finished_run_loads_by_folder_and_is_not_trained_again(finished):
    model, tokenizer = load(finished.out)
    assert tokenizer is not None
    assert model(jnp.zeros((1, 4), jnp.int32)).shape == (1, 4, 320)
    before = losses(finished)
    assert run_on(finished).step == 7
    assert losses(finished) == before


@pytest.mark.parametrize("stop_at", [1, 3, 5])
def test_run_stopped_at_any_step_resumes_to_the_same_losses_bit_for_bit(
    finished, tmp_path, stop_at, monkeypatch
):
    run = tiny_run(tmp_path)
    monkeypatch.setattr(StopRequest, "requested", stop_after(stop_at))
    assert run_on(run).step == stop_at
    monkeypatch.undo()
    assert run_on(run).step == 7
    assert losses(run) == losses(finished)
    final, whole = (read_arrays(Path(r.out) / "checkpoints", 7) for r in (run, finished))
    for name, leaf in whole["params"].items():
        np.testing.assert_array_equal(final["params"][name], leaf)


def stop_after(step: int):
    calls = iter(range(1, 100))
    return lambda self: next(calls) >= step


def test_run_resumes_on_another_mesh_within_rounding(finished, tmp_path, monkeypatch):
    run = tiny_run(tmp_path)
    monkeypatch.setattr(StopRequest, "requested", stop_after(3))
    run_on(run)
    monkeypatch.undo()
    run_on(dataclasses.replace(run, mesh=MeshConfig(data=2, fsdp=2, tensor=2)), devices=8)
    ours, whole = losses(run), losses(finished)
    assert ours.keys() == whole.keys()
    # Sums over devices are taken in another order: a few float32 roundings a step.
    np.testing.assert_allclose(list(ours.values()), list(whole.values()), rtol=2e-6)


def test_crashed_steps_are_recorded_once(finished, tmp_path, monkeypatch):
    run = tiny_run(tmp_path)
    advance = session.Session.advance

    def crash_at_five(self, batch):
        if self.step == 5:
            raise SystemExit
        advance(self, batch)

    monkeypatch.setattr(session.Session, "advance", crash_at_five)
    with pytest.raises(SystemExit):
        run_on(run)
    monkeypatch.undo()
    run_on(run)
    rows = [row for row in read_rows(Path(run.out) / "metrics.jsonl") if row["kind"] == "train"]
    assert [row["step"] for row in rows] == list(range(1, 8))
    assert losses(run) == losses(finished)
    assert [row["step"] for row in rows if row.get("resumed")] == [4]


def test_resuming_another_model_is_refused_with_the_fields(finished):
    other = dataclasses.replace(finished, model=dataclasses.replace(finished.model, vocab_size=384), steps=9)
    with pytest.raises(UserError, match="vocab_size: 320 -> 384"):
        run_on(other)


def test_resuming_with_other_data_order_is_refused(finished):
    other = dataclasses.replace(finished, data=dataclasses.replace(finished.data, seed=5), steps=9)
    with pytest.raises(UserError, match="seed was 0, is 5"):
        run_on(other)


def test_repeated_non_finite_steps_stop_the_run_with_what_led_there(tmp_path):
    run = tiny_run(tmp_path)
    optim = dataclasses.replace(run.optim, clip_norm=0.0)
    run = dataclasses.replace(
        run, optim=optim, safety=dataclasses.replace(run.safety, skip_limit=2), z_loss=float("inf")
    )
    with pytest.raises(RunError, match=r"2 updates in a row were skipped[\s\S]*step 1: loss"):
        run_on(run)


def test_best_checkpoint_by_held_out_loss_is_kept_and_only_measured_ones_rank(tmp_path, monkeypatch):
    held_out = iter(
        [3.0, 2.0, 4.0, 5.0, 1.0]
    )  # of steps 2, 4, 6, then of the last on the same text, and on all of it

    def scripted(*args):
        return HeldOutLoss(next(held_out), 1.0)

    monkeypatch.setattr(session, "evaluate", scripted)
    run = tiny_run(
        tmp_path, evaluation=EvaluationConfig(every=2),
        checkpoint=CheckpointConfig(save_every=1, keep_last=1, keep_best=1, best_metric="held_out.words"),
    )  # fmt: skip
    run_on(run)
    kept = {int(path.name) for path in (Path(run.out) / "checkpoints").iterdir() if path.name.isdigit()}
    # Step 5 was saved with the weights after step 4's evaluation, and step 7's loss over more text is another figure.
    assert kept == {4, 7}
    assert json.loads((Path(run.out) / "goodput.json").read_text())


def test_a_metric_that_no_checkpoint_will_have_is_refused(tmp_path):
    wrong = CheckpointConfig(keep_best=1, best_metric="held_out.wrods")
    with pytest.raises(UserError, match=r"this run's checkpoints have loss, held_out.words"):
        run_on(tiny_run(tmp_path, checkpoint=wrong))


def test_resuming_with_another_optimizer_is_refused_and_other_settings_are_told(finished, tmp_path, caplog):
    with pytest.raises(UserError, match=r"state of optim\.name 'adamw'.* asks for 'lion'"):
        run_on(dataclasses.replace(finished, optim=dataclasses.replace(finished.optim, name="lion"), steps=9))
    shutil.copytree(finished.out, tmp_path / "run")
    with caplog.at_level("WARNING", "maxstack"):
        logging.getLogger("maxstack").propagate = True
        run_on(dataclasses.replace(finished, out=str(tmp_path / "run"), steps=8, z_loss=1e-4))
    assert "steps: 7 -> 8; z_loss: 0.0 -> 0.0001" in caplog.text


def test_a_save_is_no_part_of_the_step_after_it(tmp_path, monkeypatch):
    save = session.Checkpoints.save

    def slow_save(self, *args, **settings):
        time.sleep(0.5)
        return save(self, *args, **settings)

    monkeypatch.setattr(session.Checkpoints, "save", slow_save)
    run = tiny_run(tmp_path, checkpoint=CheckpointConfig(save_every=1))
    run_on(run)
    rows = [row for row in read_rows(Path(run.out) / "metrics.jsonl") if row["kind"] == "train"]
    assert min(row["step_seconds"] for row in rows) < 0.5
    assert all(0 <= row["data_wait_seconds"] <= row["step_seconds"] for row in rows)


def evaluated(run: RunConfig) -> list[tuple[int, bool]]:
    rows = read_rows(Path(run.out) / "metrics.jsonl")
    return [(row["step"], row.get("final", False)) for row in rows if row["kind"] == "evaluation"]


def test_what_was_due_at_the_step_of_a_stop_is_made_up_and_once(tmp_path, monkeypatch):
    run = tiny_run(
        tmp_path, evaluation=EvaluationConfig(every=3), samples=SampleConfig(every=3, prompts=("the",), max_tokens=2),
    )  # fmt: skip
    monkeypatch.setattr(StopRequest, "requested", stop_after(3))
    run_on(run)
    monkeypatch.undo()
    assert evaluated(run) == []
    for _ in range(2):  # the second finds everything done
        run_on(run)
        assert evaluated(run) == [(3, False), (6, False), (7, True)]
        assert [row["step"] for row in read_rows(Path(run.out) / "samples.jsonl")] == [3, 6, 7]


def test_an_average_of_weights_is_evaluated_begins_on_resume_and_may_be_given_up(tmp_path, caplog):
    logging.getLogger("maxstack").propagate = True
    run = tiny_run(tmp_path, steps=3, evaluation=EvaluationConfig(every=0))
    run_on(run)
    averaging = dataclasses.replace(run.optim, ema_decay=0.5)
    best = CheckpointConfig(save_every=3, keep_best=1, best_metric="held_out.words.averaged")
    longer = dataclasses.replace(run, steps=5, optim=averaging, checkpoint=best)
    with caplog.at_level("WARNING", "maxstack"):
        run_on(longer)
    assert "the average of the weights starts from those of step 3" in caplog.text
    three, five = (read_arrays(Path(run.out) / "checkpoints", step) for step in (3, 5))
    name = "final_norm.scale"
    # Two steps: half of the last weights, a quarter of those before and of those it began with.
    assert np.abs(five["ema"][name] - five["params"][name]).max() > 0
    moved = np.abs(five["params"][name] - three["params"][name]).max()
    assert np.abs(five["ema"][name] - five["params"][name]).max() < moved
    [*_, last] = [row for row in read_rows(Path(run.out) / "metrics.jsonl") if row["kind"] == "evaluation"]
    assert last["held_out"]["words"]["nll"] != last["held_out"]["words.averaged"]["nll"]
    caplog.clear()
    with caplog.at_level("WARNING", "maxstack"):
        run_on(dataclasses.replace(run, steps=6))
    assert "the average of the weights is given up" in caplog.text
    assert "ema" not in read_arrays(Path(run.out) / "checkpoints", 6)
