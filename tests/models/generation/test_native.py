"""The optional C++ against the plain forms."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maxstack.kernels import cpu_native
from maxstack.models.cached import KVCache, native_one_token, one_token
from maxstack.models.generation.matrix import Panels

pytestmark = pytest.mark.skipif(not cpu_native.available(), reason=f"no C++: {cpu_native.problem()}")


def normal(*shape: int, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


@pytest.mark.parametrize("rows", [1, 2, 3, 8, 13, 100])
@pytest.mark.parametrize("size", [(17, 9), (576, 1537), (1100, 50)])
@pytest.mark.parametrize("kind", [jnp.bfloat16, jnp.float32])
def test_products_with_panels(rows, size, kind):
    x, w = normal(rows, size[0]), normal(size[1], size[0], seed=1).astype(kind).astype(jnp.float32)
    panels = Panels(np.asarray(w))
    assert panels.w[...].dtype == kind  # bfloat16 only where that loses nothing
    wanted = np.asarray(x, np.float64) @ np.asarray(w, np.float64).T
    # Sums of up to 1100 products of size 1, in float32.
    np.testing.assert_allclose(panels(x), wanted, atol=2e-4)
    np.testing.assert_array_equal(panels.matrix(jnp.dtype("float32")), w.T)
    np.testing.assert_array_equal(Panels(np.asarray(w.T).T).w[...], panels.w[...])


@pytest.mark.parametrize("kind", [jnp.bfloat16, jnp.float32])
def test_a_row_has_the_same_products_in_any_company(kind):
    x, w = normal(205, 1100), normal(3, 1100, 16, seed=1).astype(kind)
    wanted = np.asarray(cpu_native.panel_product(x, w))
    for rows in (1, 2, 5, 7, 12, 14, 32, 97):
        np.testing.assert_array_equal(cpu_native.panel_product(x[-rows:], w), wanted[-rows:])


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"window": 5},
        {"window": 300, "softcap": 2.0},
        {"scale": 0.4, "sinks": True},
        {"window": 1, "sinks": True},
    ],
)
def test_attention_of_one_token(options):
    b, k, g, h, w, slots = 4, 2, 3, 12, 10, 600
    q, new = normal(b, 1, k * g, h), KVCache(normal(b, k, 1, h, seed=1), normal(b, k, 1, w, seed=2))
    cache = KVCache(normal(b, k, slots, h, seed=3), normal(b, k, slots, w, seed=4))
    lengths = jnp.asarray([0, 3, 257, 600], jnp.int32)
    options = dict(options)
    sinks = normal(k * g, seed=5) if options.pop("sinks", False) else None
    given = native_one_token(q, new, cache, lengths, sinks, **options)
    wanted = one_token(q, new, cache, lengths, sinks, **options)
    np.testing.assert_allclose(given, wanted, atol=2e-6)


def test_it_can_be_switched_off(monkeypatch):
    monkeypatch.setenv("MAXSTACK_NATIVE", "0")
    assert cpu_native.build.problem.__wrapped__() == "MAXSTACK_NATIVE=0"


def test_without_a_compiler_the_reason_is_told(monkeypatch):
    monkeypatch.setattr("shutil.which", lambda name: None)
    assert "no C++ compiler" in str(cpu_native.build.problem.__wrapped__())


def test_loading_the_library_leaves_small_numbers_to_others():
    """With its flags, some compilers link what makes the whole process round denormal numbers to 0."""
    script = (
        "import numpy as np; from maxstack.kernels import cpu_native; assert cpu_native.available();"
        "assert np.float32(1e-38) * np.float32(0.1) != 0"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
