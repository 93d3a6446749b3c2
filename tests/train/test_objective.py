"""A full run with an objective of the user's own: trained, resumed, written, read back; what is refused, and when."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maxstack.config import (
    UserError,
    from_dict,
    load_run,
    override,
    plain,
    register,
    run_text,
    to_dict,
    write_run,
)
from maxstack.kernels.cross_entropy import token_log_probs
from maxstack.models import FeedForward, FeedForwardConfig
from maxstack.telemetry import read_rows
from maxstack.train import loop
from maxstack.train.losses import OBJECTIVES, LossSums, objective_of, of_experts, pretrain
from maxstack.train.stop import StopRequest
from tests.train.runs import tiny_run


def focal(model, batch, z_loss):
    """Easy tokens count less."""
    x, reports = model.hidden(batch.tokens, batch.segment_ids, batch.positions)
    log_p, _ = token_log_probs(x, model.unembedding(), batch.labels)
    losses = -jnp.square(1 - jnp.exp(log_p)) * log_p
    return LossSums(jnp.sum(losses * batch.weights), 0.0, *of_experts(reports))


def bare(model, batch, z_loss):
    """An objective that fills in only what it must."""
    return LossSums(pretrain(model, batch, 0.0).nll)


@dataclasses.dataclass(frozen=True, kw_only=True)
class OwnConfig(FeedForwardConfig):
    """A part that nobody registered."""

    def build(self, key, width, residual_scale):
        return FeedForward(self, key, width, residual_scale)


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    monkeypatch.setattr(plain, "_REGISTERED", {})
    register(focal)


def losses(run) -> dict[int, float]:
    rows = read_rows(Path(run.out) / "metrics.jsonl")
    return {row["step"]: row["loss"] for row in rows if row["kind"] == "train"}


def test_run_with_an_objective_of_ones_own_trains_and_resumes_bit_for_bit(tmp_path, monkeypatch):
    one = jax.devices()[:1]
    whole = tiny_run(tmp_path / "whole", objective=focal, steps=5)
    loop.train(whole, one)
    cross_entropy = tiny_run(tmp_path / "plain", steps=2)
    loop.train(cross_entropy, one)
    found = losses(whole)
    assert found[5] < found[1] < losses(cross_entropy)[1]  # it falls, and it is the focal loss

    parted = tiny_run(tmp_path / "parted", objective=focal, steps=5)
    calls = iter(range(1, 100))
    monkeypatch.setattr(StopRequest, "requested", lambda self: next(calls) >= 3)
    assert loop.train(parted, one).step == 3
    monkeypatch.undo()
    register(focal)
    again = load_run(Path(parted.out) / "run.py")  # the written run is the run
    assert again == parted
    loop.train(again, one)
    assert losses(parted) == found


def test_objective_with_accumulation_needs_only_the_first_sum(tmp_path):
    register(bare)
    run = tiny_run(tmp_path / "two", objective=bare, steps=2, micro_batches=2)
    usual = tiny_run(tmp_path / "one", steps=2)
    for each in (run, usual):
        loop.train(each, jax.devices()[:1])
    np.testing.assert_allclose(losses(run)[1], losses(usual)[1], rtol=1e-6)


def test_objective_survives_text_and_json(tmp_path):
    run = tiny_run(tmp_path, objective=focal)
    assert load_run(write_run(run, tmp_path / "run.py")) == run
    assert from_dict(to_dict(run)) == run
    assert to_dict(run)["objective"] == {"function": f"{__name__}.focal"}
    assert "import focal\n" in run_text(run)
    assert from_dict(to_dict(tiny_run(tmp_path))).objective == "pretrain"


@pytest.mark.parametrize("name", ["os.system", "maxstack.cli.main", f"{__name__}.bare", 3])
def test_json_names_no_function_that_is_not_registered(tmp_path, name):
    data = to_dict(tiny_run(tmp_path)) | {"objective": {"function": name}}
    with pytest.raises(UserError, match="not a registered function"):
        from_dict(data)


def test_unknown_objective_is_answered_with_the_known_ones(tmp_path):
    with pytest.raises(UserError, match="objective is 'pretrian': the known ones are pretrain"):
        tiny_run(tmp_path, objective="pretrian")
    with pytest.raises(UserError, match=r"known ones are pretrain.*--objective x"):
        override(tiny_run(tmp_path), ["--objective", "x"], "maxstack train")
    assert (
        override(tiny_run(tmp_path, objective=focal), ["--objective", "pretrain"], "").objective == "pretrain"
    )
    assert objective_of("pretrain") is OBJECTIVES["pretrain"]


def test_help_shows_the_objective_by_name(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit):
        override(tiny_run(tmp_path, objective=focal), ["--help"], "maxstack train")
    text = capsys.readouterr().out
    assert "--objective NAME" in text
    assert "LossSums. (default: focal)" in text


@pytest.mark.parametrize("kind", ["unregistered", "lambda", "part"])
def test_what_no_checkpoint_could_describe_is_refused_before_anything_is_computed(tmp_path, kind):
    run = tiny_run(tmp_path)
    if kind == "part":
        (stack,) = run.model.stacks
        block = dataclasses.replace(stack.pattern[0], feed_forward=OwnConfig(size=64))
        stacks = (dataclasses.replace(stack, pattern=(block,)),)
        run = dataclasses.replace(run, model=dataclasses.replace(run.model, stacks=stacks))
    else:
        objective = (
            bare if kind == "unregistered" else lambda model, batch, z_loss: bare(model, batch, z_loss)
        )
        run = dataclasses.replace(run, objective=objective)
    with pytest.raises(UserError, match=r"maxstack\.config\.register"):
        loop.train(run, jax.devices()[:1])
    assert not Path(run.out).exists()
