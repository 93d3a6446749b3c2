"""What was saved comes back bit for bit, on any mesh, while the state that was saved goes on changing."""

import threading
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tensorstore

from maxstack.checkpoint import (
    CheckpointConfig,
    Checkpoints,
    describe,
    like,
    named,
    read_arrays,
    read_meta,
)
from tests.checkpoint.states import OPTIMIZER, make_params, make_state, on_mesh, placed, same_bits, shardings

MESHES = [{"fsdp": 1}, {"fsdp": 8}, {"fsdp": 4, "tensor": 2}, {"data": 2, "fsdp": 2}]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder whose checkpoint was written from a mesh of 4 × 2 devices."""
    run = tmp_path_factory.mktemp("run")
    state = make_state()
    with Checkpoints(run / "checkpoints") as checkpoints:
        checkpoints.save(
            20, placed(state, on_mesh(state, {"fsdp": 4, "tensor": 2})), {"run": {"seed": 1}}, {"loss": 2.5}
        )
    return run


@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_restored_on_another_mesh_is_the_same_bit_for_bit(saved: Path, sizes: dict[str, int]) -> None:
    target = on_mesh(make_state(), sizes)
    with Checkpoints(saved / "checkpoints") as checkpoints:
        state, meta, account = checkpoints.restore(target=target)
    target.pop("unused")
    assert same_bits(state, {key: value for key, value in make_state().items() if key != "unused"})
    assert shardings(state) == shardings(target)
    assert meta == {"run": {"seed": 1}}
    assert account.complete
    assert account.verified == "hash"
    assert account.step == 20


def test_target_without_shardings_restores_uncommitted_arrays(saved: Path) -> None:
    target = jax.eval_shape(make_state) | {"counts": np.zeros(5, np.int64)}
    state, _, _ = Checkpoints(saved / "checkpoints").restore(target=target)
    assert same_bits(state, {key: value for key, value in make_state().items() if key != "unused"})
    assert isinstance(state["counts"], np.ndarray)
    assert not state["params"]["embedding"].committed
    assert jnp.issubdtype(state["key"].dtype, jax.dtypes.prng_key)
    # The key draws what the saved one draws.
    assert jax.random.bits(state["key"]) == jax.random.bits(make_state()["key"])


def test_readable_by_name_without_the_run_file(saved: Path) -> None:
    arrays = read_arrays(saved)
    assert isinstance(arrays["params"]["blocks.0.attention.wq"], np.ndarray)
    assert str(arrays["params"]["norm"].dtype) == "bfloat16"
    expected = {key: value for key, value in make_state().items() if key != "unused"}
    assert same_bits(arrays, expected)
    only = read_arrays(saved / "checkpoints" / "00000020", groups=("params",))
    assert same_bits(only, {"params": make_params()})
    assert read_meta(saved) == {"run": {"seed": 1}}
    record = describe(saved, 20)
    assert str(record.arrays["params/norm"]) == "bfloat16[16]"
    assert record.metrics == {"loss": 2.5}
    assert record.versions["jax"] == jax.__version__


def test_optimizer_state_returns_as_its_own_structure(saved: Path) -> None:
    structure = jax.eval_shape(OPTIMIZER.init, make_params())
    state, _, _ = Checkpoints(saved / "checkpoints").restore()
    restored = like(structure, state["opt_state"])
    assert jax.tree.structure(restored) == jax.tree.structure(OPTIMIZER.init(make_params()))
    assert same_bits(named(restored), named(OPTIMIZER.init(make_params())))


def test_donated_and_overwritten_buffers_do_not_reach_the_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate, reached = threading.Event(), threading.Event()
    opened = tensorstore.open

    def late_open(*args: object, **kwargs: object) -> object:
        reached.set()
        assert gate.wait(60)
        return opened(*args, **kwargs)

    state = {"params": {"w": jnp.arange(2**16, dtype=jnp.float32)}, "host": np.arange(2**10)}
    expected = {"params": {"w": np.arange(2**16, dtype=np.float32)}, "host": np.arange(2**10)}
    step = jax.jit(lambda x: x * 0 - 1, donate_argnums=0)
    with Checkpoints(tmp_path) as checkpoints:
        monkeypatch.setattr(tensorstore, "open", late_open)
        checkpoints.save(1, state, {})
        state["host"][:] = -1
        weights = state["params"]["w"]
        for _ in range(4):
            weights = step(weights)
        assert weights[5] == -1
        assert checkpoints.steps() == []
        gate.set()
        checkpoints.wait()
        assert reached.is_set()
        monkeypatch.undo()
        restored, _, _ = checkpoints.restore()
    assert same_bits(restored, expected)


def test_second_save_waits_for_the_first_and_both_are_whole(tmp_path: Path) -> None:
    with Checkpoints(tmp_path, CheckpointConfig(keep_last=9)) as checkpoints:
        for step in (1, 2, 3):
            checkpoints.save(step, {"w": jnp.full((1000,), step)}, {"position": step})
            assert [path for path in checkpoints.steps() if path < step] == list(range(1, step))
        checkpoints.wait()
        for step in (1, 2, 3):
            state, meta, _ = checkpoints.restore(step)
            assert (state["w"] == step).all()
            assert meta == {"position": step}


def test_blocking_save_is_committed_on_return_and_saving_the_same_step_again_is_free(tmp_path: Path) -> None:
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(5, {"w": jnp.ones(3)}, {}, block=True)
        assert checkpoints.steps() == [5]
        before = checkpoints.directory.joinpath("00000005").stat().st_mtime_ns
        checkpoints.save(5, {"w": jnp.ones(3)}, {}, block=True)
        assert checkpoints.directory.joinpath("00000005").stat().st_mtime_ns == before


def test_without_asynchronous_every_save_is_committed_on_return(tmp_path: Path) -> None:
    with Checkpoints(tmp_path, CheckpointConfig(asynchronous=False)) as checkpoints:
        for step in (1, 2):
            blocked = checkpoints.save(step, {"w": jnp.ones(3)}, {})
            assert checkpoints.idle()
            assert checkpoints.steps()[-1] == step
            assert 0 < blocked <= checkpoints.blocked_s


def test_arrays_without_elements_and_of_every_width_return(tmp_path: Path) -> None:
    state = {
        "empty": jnp.zeros((0, 4), jnp.bfloat16),
        "flag": jnp.array([True, False]),
        "byte": jnp.arange(-3, 3, dtype=jnp.int8),
        "f8": jnp.arange(4).astype(jnp.float8_e4m3fn),
        "nan": jnp.array([jnp.nan, -0.0, jnp.inf]),
        "scalar": np.float64(1 / 3),
    }
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state, {})
        restored, _, _ = checkpoints.restore()
    assert same_bits(restored, state)


def test_wrong_states_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    donated = jnp.ones(4)
    jax.jit(lambda x: x + 1, donate_argnums=0)(donated)
    with Checkpoints(tmp_path / "run") as checkpoints:
        with pytest.raises(
            TypeError, match=r"params/lr is float, not an array; plain values belong in the meta"
        ):
            checkpoints.save(1, {"params": {"lr": 0.1}}, {})
        with pytest.raises(TypeError, match="strings for keys, not 0"):
            checkpoints.save(1, {"opt_state": {0: jnp.ones(1)}}, {})
        with pytest.raises(ValueError, match="w was donated"):
            checkpoints.save(1, {"w": donated}, {})
        with pytest.raises(ValueError, match="without a single number"):
            checkpoints.save(1, {}, {})
        with pytest.raises(TypeError, match="plain JSON values"):
            checkpoints.save(1, {"w": jnp.ones(1)}, {"path": Path()})
        assert not (tmp_path / "run").exists()
