"""Taking over part of a checkpoint, with an account of what matched."""

from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from maxstack.checkpoint import CheckpointError, Checkpoints, read_arrays, restore_partial
from tests.checkpoint.states import make_params, make_state, same_bits


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("checkpoints")
    with Checkpoints(directory) as checkpoints:
        checkpoints.save(3, make_state(), {})
    return directory


def test_weights_only(saved: Path) -> None:
    state, account = restore_partial(saved, {"params": jax.eval_shape(make_params)}, strict=True)
    assert same_bits(state, {"params": make_params()})
    assert account.complete
    assert account.ignored == (
        "opt_state (7)",
        "ema (3)",
        "key (1)",
        "dropout_key (1)",
        "step (1)",
        "counts (1)",
    )


def test_a_new_head_is_left_to_the_caller_and_accounted_for(saved: Path) -> None:
    target = jax.eval_shape(make_params)
    target["embedding"] = jax.ShapeDtypeStruct((40, 16), jnp.float32)
    target["head"] = jax.ShapeDtypeStruct((16, 2), jnp.float32)
    target["blocks.0.attention.wq"] = jax.ShapeDtypeStruct((2, 16, 8), jnp.bfloat16)
    del target["norm"]
    state, account = restore_partial(saved, {"params": target})
    assert set(state["params"]) == {"blocks.0.attention.wq"}
    expected = make_params()["blocks.0.attention.wq"].astype(jnp.bfloat16)
    assert (state["params"]["blocks.0.attention.wq"] == expected).all()
    assert str(account) == "\n".join(
        [
            f"checkpoint 3 in {saved / '00000003'} (hash checked)",
            "  matched 1",
            "  converted 1",
            "    params/blocks.0.attention.wq: float32 to bfloat16",
            "  missing in the checkpoint 1",
            "    params/head",
            "  not used from the checkpoint 1",
            "    params/norm",
            "  of another shape or type 1",
            "    params/embedding: float32[32, 16] in the checkpoint, float32[40, 16] asked for",
            "  groups not asked for 6",
            *(
                f"    {group}"
                for group in (
                    "opt_state (7)",
                    "ema (3)",
                    "key (1)",
                    "dropout_key (1)",
                    "step (1)",
                    "counts (1)",
                )
            ),
        ]
    )
    with pytest.raises(CheckpointError, match=r"(?s)does not fit what was asked for.*params/head"):
        restore_partial(saved, {"params": target}, strict=True)


def test_the_average_can_be_taken_for_the_weights(saved: Path) -> None:
    state, account = restore_partial(
        saved, {"params": jax.eval_shape(make_params)}, sources={"params": "ema"}
    )
    assert same_bits(state, {"params": make_state()["ema"]})
    assert account.complete
    assert "params (3)" in account.ignored


def test_full_restore_refuses_other_names_shapes_and_types_and_says_which(saved: Path) -> None:
    target = jax.eval_shape(make_state)
    target["params"]["norm"] = jax.ShapeDtypeStruct((16,), jnp.float32)
    del target["ema"]["norm"]
    with pytest.raises(CheckpointError) as caught:
        Checkpoints(saved).restore(target=target)
    message = str(caught.value)
    assert "params/norm: bfloat16[16] in the checkpoint, float32[16] asked for" in message
    assert "ema/norm" in message
    assert caught.value.step == 3


def test_a_group_that_is_not_there_is_named_with_those_that_are(saved: Path) -> None:
    with pytest.raises(
        CheckpointError, match=r"none of the groups \['weights'\]; it has \['counts', 'dropout_key'"
    ):
        read_arrays(saved, groups=("weights",))


def test_long_accounts_are_cut_with_a_count(tmp_path: Path) -> None:
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, {"params": {f"w{number}": jnp.ones(1) for number in range(40)}}, {})
    _, account = restore_partial(tmp_path, {"params": {"w0": jax.ShapeDtypeStruct((1,), jnp.float32)}})
    assert "not used from the checkpoint 39" in str(account)
    assert "… and 27 more" in str(account)
    assert len(str(account).splitlines()) == 16
