"""`maxstack bench kernels --tune` on tiny cases: what is faster is kept, what is wrong never is."""

import json

import jax
import jax.numpy as jnp
import pytest

from maxstack.bench import kernels as cases
from maxstack.bench.command import main
from maxstack.bench.measure import Case, prepared
from maxstack.bench.tune import Found, apart, keep, table, tuned
from maxstack.config import UserError
from maxstack.kernels import tiles
from maxstack.kernels.attention import attention

TURNS = {1: 1, 2: 2000, 4: 1, 8: 1}
"""Of a loop: 2, the rule's, is the slow one."""


def toy(x, wrong=(), refused=()):
    """A sum whose blocks change its speed; `wrong` ones its result too, `refused` ones do not compile."""

    def fault(sizes):
        return "8 is too many" if sizes["block"] == 8 else None

    block = tiles.chosen(
        "toy", x.dtype, {"t": x.size}, {"block": 2}, axes={"block": tuple(TURNS)}, fault=fault
    )["block"]
    if block in refused:
        raise ValueError(f"no room for {block}\nand more")
    turned = jax.lax.fori_loop(0, TURNS[block], lambda _, y: jnp.roll(y, 1), x)
    return jnp.sum(turned) * (1.01 if block in wrong else 1.0)


def case(**options):
    x = jnp.arange(2048.0)
    return Case(
        kernel="toy",
        shape="2,048 numbers",
        contenders={"ours": lambda: prepared(lambda x: toy(x, **options), x)},
    )


def tune(**options) -> Found:
    (found,) = tuned(case(**options), rounds=3, least_seconds=0.01, done={})
    return found


def test_what_is_faster_is_found():
    found = tune()
    assert found.best in ({"block": 1}, {"block": 4})
    assert found.ratio > 3
    assert found.tried == 2
    assert found.dropped == ("{'block': 8}: 8 is too many",)


def test_a_candidate_with_other_results_is_not_taken():
    found = tune(wrong=(1,))
    assert found.best == {"block": 4}
    assert "{'block': 1}: other results than the default's" in found.dropped[0]
    found = tune(wrong=(1, 4))
    assert (found.best, found.ratio, found.tried) == (None, 1.0, 0)


def test_a_candidate_that_does_not_compile_is_passed_over():
    found = tune(refused=(1,))
    assert found.best == {"block": 4}
    assert found.dropped[0] == "{'block': 1}: no room for 1"


def test_what_is_not_faster_beyond_noise_is_not_kept(monkeypatch):
    monkeypatch.setitem(TURNS, 2, 1)
    assert tune(wrong=(1, 4)).best is None
    from maxstack.bench import tune as module

    # 1 in the first comparison, by luck; in the second it wins 4 of 6 rounds, which is not enough.
    told = iter([[1.5], [1.0], [1.1, 1.1, 1.1, 1.1, 0.9, 0.9]])
    monkeypatch.setattr(module, "_ratios", lambda *_: next(told))
    assert tune().best is None


def test_a_trace_that_did_not_ask_again_is_no_candidate():
    x, asked = jnp.arange(8.0), []

    def stale(x):
        if not asked:
            asked.append(True)
            return toy(x)
        return jnp.sum(x)

    stuck = Case(kernel="toy", shape="", contenders={"ours": lambda: prepared(stale, x)})
    (found,) = tuned(stuck, rounds=1, least_seconds=0.0, done={})
    assert found.tried == 0
    assert "did not ask again" in found.dropped[0]


def test_results_are_compared_where_they_are_finite():
    a = jnp.array([1.0, -jnp.inf, 3.0])
    assert apart(a, a) is None
    assert apart(a.at[0].add(5e-4), a) is None  # a sixth of a thousandth of the largest: below 2**-12
    assert apart(a.at[0].add(1e-2), a) == "by 0.01 of 3"
    assert apart(a.at[1].set(0), a) == "not finite in other places"
    assert apart(a.at[2].set(jnp.nan), a) == "not finite in other places"


@pytest.fixture
def user(tmp_path, monkeypatch):
    file = tmp_path / "cache" / "tiles.json"
    monkeypatch.setenv(tiles.SWITCH, str(file))
    tiles.forget()
    yield file
    tiles.forget()


def test_the_verb_fills_the_users_table_which_kernels_then_take(user, monkeypatch, capsys):
    monkeypatch.setattr(cases, "CASES", {"toy": lambda: iter([case(wrong=(1,))])})
    assert (
        main(
            [
                "kernels",
                "--tune",
                "--rounds",
                "3",
                "--seconds",
                "0.01",
                "--json",
                str(user.with_name("all.json")),
            ]
        )
        == 0
    )
    said = capsys.readouterr().out
    assert "| toy cpu float32 t2048 | block 2 | block 4 |" in said
    assert f"1 of 1 are faster than the default; {user} has 1 lines" in said
    (line,) = tiles.read(user).values()
    assert line["sizes"] == {"block": 4}
    assert "times as fast as the default" in line["source"]
    assert json.loads(user.with_name("all.json").read_text())[0]["best"] == {"block": 4}
    with tiles.asked() as requests:
        jax.eval_shape(toy, jnp.zeros(2048))
    assert requests["toy cpu float32 t2048"].current == {"block": 4}
    # Another table's lines stay, and one of a default that is best again goes.
    keep([Found(case(), requests["toy cpu float32 t2048"], 1, (), None, 1.0)], user)
    assert tiles.read(user) == {}


def test_a_file_that_is_no_table_is_not_overwritten(user, monkeypatch):
    user.parent.mkdir()
    user.write_text("mine")
    with pytest.raises(
        UserError, match=r"tiles.json: it is no JSON .*; move it away, or name another with MAXSTACK_TILES"
    ):
        main(["kernels", "--tune", "--only", "attention"])
    assert user.read_text() == "mine"
    monkeypatch.setenv(tiles.SWITCH, "")
    with pytest.raises(UserError, match="MAXSTACK_TILES is empty, so there is no table to fill"):
        main(["kernels", "--tune", "--only", "attention"])


def test_a_real_kernel_is_tuned():
    """Attention of few tokens: both passes, each of its sizes; the passes do not disturb each other."""
    # Of ones alone the gradients would be what rounding leaves of sums that cancel.
    q = jax.random.normal(jax.random.key(0), (1, 32, 2, 8))
    kv = jax.random.normal(jax.random.key(1), (1, 32, 1, 8))

    def gradients(q, k, v):
        return jax.grad(lambda *each: jnp.sum(attention(*each) ** 2), (0, 1, 2))(q, k, v)

    small = Case(
        kernel="attention", shape="32 tokens", contenders={"ours": lambda: prepared(gradients, q, kv, kv)}
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("maxstack.kernels.attention.blocks.AXES", {"query": (16, 4)})
        found = list(tuned(small, rounds=1, least_seconds=0.0, done={}))
    assert [each.request.kernel for each in found] == ["attention.xla.forward", "attention.xla.backward"]
    for each in found:
        assert each.tried == 1
        assert "blocks are of 8 positions at least" in each.dropped[0]
    assert table(found).count("\n") == 3
