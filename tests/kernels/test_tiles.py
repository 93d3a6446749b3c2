"""Sizes of blocks: which table is asked first, what is refused, and that every kernel takes what it is given."""

import json
import logging
from functools import partial

import jax
import jax.numpy as jnp
import pytest

from maxstack.kernels import tiles
from maxstack.kernels.attention import attention
from maxstack.kernels.cross_entropy import cross_entropy
from maxstack.kernels.dispatch import Chip, compiling_for
from maxstack.kernels.grouped_matmul import grouped_matmul
from maxstack.kernels.paged_attention import init_cache, paged_attention
from maxstack.kernels.quantized_matmul import QuantizedWeight, quantized_matmul

RULE = {"rows": 8, "columns": 16}
HOPPER = Chip("gpu", "sm90")


def fault(sizes):
    return "rows are odd" if sizes["rows"] % 2 else None


def ask(t=100):
    return tiles.chosen("toy", jnp.float32, {"t": tiles.about(t)}, RULE, axes={"rows": (4,)}, fault=fault)


@pytest.fixture
def tables(tmp_path, monkeypatch):
    """Writes the user's table and the package's, and forgets what was read."""
    monkeypatch.setattr(tiles, "PACKAGE", tmp_path / "package.json")
    monkeypatch.setenv(tiles.SWITCH, str(tmp_path / "user.json"))
    tiles.forget()

    def write(name, lines):
        text = lines if isinstance(lines, str) else tiles.written({k: {"sizes": v} for k, v in lines.items()})
        (tmp_path / f"{name}.json").write_text(text)
        tiles.forget()

    yield write
    tiles.forget()


def test_a_missing_line_and_missing_files_leave_the_rule(tables):
    assert ask() == RULE
    tables("user", {"toy cpu float32 t64": {"rows": 2}, "toy v5e float32 t128": {"rows": 2}})
    assert ask() == RULE


def test_the_table_wins_over_the_rule_and_the_users_over_the_packages(tables):
    tables("package", {"toy cpu float32 t128": {"rows": 4}})
    assert ask() == {"rows": 4, "columns": 16}
    assert ask(t=128) == ask(t=65) == {"rows": 4, "columns": 16}
    tables("user", {"toy cpu float32 t128": {"columns": 32}})
    assert ask() == {"rows": 8, "columns": 32}


def test_the_closest_line_of_a_table_is_taken(tables):
    tables(
        "package", {"toy cpu * *": {"rows": 2}, "toy cpu float32 *": {"rows": 4}, "toy v6e * *": {"rows": 6}}
    )
    assert ask()["rows"] == 4
    with compiling_for(Chip("tpu", "v6e")):
        assert ask()["rows"] == 6


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("{", "it is no JSON"),
        ("[" * 100_000, "it is no JSON"),
        ("[]", "it is no table of the form"),
        ('{"form": "tokamax", "lines": {}}', "it is no table of the form"),
        (json.dumps({"form": tiles.FORM, "lines": 3}), "it is no table of the form"),
    ],
)
def test_a_damaged_or_foreign_file_is_told_of_once_in_one_line(tables, caplog, text, why):
    tables("user", text)
    tables("package", {"toy cpu * *": {"rows": 2}})
    with caplog.at_level(logging.WARNING):
        assert [ask()["rows"] for _ in range(3)] == [2, 2, 2]
    (record,) = caplog.records
    assert why in record.getMessage()
    assert "user.json" in record.getMessage()
    assert "\n" not in record.getMessage()


def test_bytes_that_are_no_text_and_folders_are_left_alone(tables, tmp_path, caplog, monkeypatch):
    (tmp_path / "user.json").write_bytes(b"\xff\xfe\x00")
    assert ask() == RULE
    monkeypatch.setenv(tiles.SWITCH, str(tmp_path))
    assert ask() == RULE
    assert [record.levelname for record in caplog.records] == ["WARNING"] * 2


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ({"sizes": {"rows": 3}}, "rows are odd"),
        ({"sizes": {"rows": 2, "depth": 4}}, "there is no 'depth'; sizes are rows, columns"),
        ({"sizes": {"rows": "2"}}, "rows is '2'; it must be a positive integer"),
        ({"sizes": {"rows": True}}, "positive integer"),
        ({"sizes": {"rows": 0}}, "positive integer"),
        ({"sizes": {}}, "it has no sizes"),
        ({"rows": 2}, "it has no sizes"),
        (7, "it has no sizes"),
    ],
)
def test_a_line_that_the_kernel_refuses_is_left_alone(tables, caplog, line, why):
    tables(
        "user", json.dumps({"form": tiles.FORM, "lines": {"toy cpu float32 t128": line, "toy cpu * *": 1}})
    )
    tables("package", {"toy cpu * *": {"rows": 2}})
    assert ask()["rows"] == 2
    assert why in caplog.text


def test_a_user_may_have_no_table_and_the_cache_has_it_by_default(monkeypatch, tmp_path):
    monkeypatch.setenv(tiles.SWITCH, "")
    assert tiles.user_file() is None
    monkeypatch.delenv(tiles.SWITCH)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert tiles.user_file() == tmp_path / "maxstack" / "tiles.json"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert tiles.user_file() == tmp_path / ".cache" / "maxstack" / "tiles.json"


def test_what_is_tried_leaves_the_users_table_out(tables):
    tables("user", {"toy cpu float32 t128": {"rows": 4}})
    with tiles.asked() as requests, tiles.trying({}):
        assert ask() == RULE
        with tiles.trying({"toy cpu float32 t128": {"columns": 1}}):
            assert ask() == {"rows": 8, "columns": 1}
    assert requests["toy cpu float32 t128"].current == {"rows": 8, "columns": 1}
    assert ask()["rows"] == 4


def array(*shape, dtype="bfloat16"):
    return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))


def attention_call(implementation="auto"):
    heads = array(1, 256, 2, 128), array(1, 256, 1, 128), array(1, 256, 1, 128)
    call = partial(attention, implementation=implementation)
    return lambda *each: jax.vjp(call, *each)[1](each[0]), heads


def paged_call(implementation="auto"):
    cache = jax.eval_shape(lambda: init_cache(8, 2, 128, page=128, dtype="int8"))
    call = partial(paged_attention, implementation=implementation)
    return call, (array(2, 4, 128), cache, array(2, 4, dtype="int32"), array(2, dtype="int32"))


def quantized_call(tokens=64):
    w = QuantizedWeight(
        values=array(256, 512, dtype="int4"), scale=array(4, 256), zero=None, inputs=512, group=128
    )
    return quantized_matmul, (array(tokens, 512), w)


def grouped_call():
    arrays = array(64, 16), array(4, 16, 8), array(4, dtype="int32")
    return lambda x, w, sizes: jax.vjp(lambda x, w: grouped_matmul(x, w, sizes), x, w)[1](x[:, :8]), arrays


def loss_call():
    def loss(x, w, labels):
        return cross_entropy(x, w, labels)[0]

    return jax.grad(loss, (0, 1)), (array(64, 16), array(16, 1024), array(64, dtype="int32"))


CALLS = {
    # kernel asked: (call, chip, sizes that differ from its rule)
    "attention.xla.forward": (partial(attention_call, "xla"), None, {"query": 64}),
    "attention.xla.backward": (partial(attention_call, "xla"), None, {"query": 64}),
    "attention.mosaic_tpu.forward": (attention_call, Chip("tpu", "v5e"), {"rows": 256, "chunk": 128}),
    "attention.mosaic_tpu.backward": (attention_call, Chip("tpu", "v5e"), {"key": 128, "chunk": 128}),
    "attention.mosaic_gpu.forward": (attention_call, HOPPER, {"forward_key": 64}),
    "attention.mosaic_gpu.backward": (attention_call, HOPPER, {"dq_key": 32}),
    "paged_attention.xla": (partial(paged_call, "xla"), None, {"tokens": 256}),
    "paged_attention.mosaic_tpu": (paged_call, Chip("tpu", "v6e"), {"slots": 2}),
    "paged_attention.mosaic_gpu": (paged_call, HOPPER, {"splits": 2}),
    "quantized_matmul.mosaic_tpu.int4": (quantized_call, Chip("tpu", "v7x"), {"inputs": 256}),
    "quantized_matmul.mosaic_gpu.int4": (quantized_call, HOPPER, {"splits": 1}),
    "grouped_matmul.xla": (grouped_call, None, {"most": 8}),
    "cross_entropy.xla": (loss_call, None, {"chunk": 16}),
}


@pytest.mark.parametrize("kernel", CALLS)
def test_every_kernel_asks_and_takes_what_it_gets(kernel):
    """The program differs with the sizes, so none is a leftover of another trace; and it refuses nonsense."""
    make, chip, sizes = CALLS[kernel]
    function, arguments = make()

    def program(tried):
        with compiling_for(chip or Chip("cpu", "cpu")), tiles.asked() as requests, tiles.trying(tried):
            return str(jax.make_jaxpr(lambda *each: function(*each))(*arguments)), requests

    default, requests = program({})
    request = next(each for each in requests.values() if each.kernel == kernel)
    assert request.axes.keys() <= request.rule.keys()
    assert request.refused(sizes) is None
    other, again = program({request.key: sizes})
    assert again[request.key].current == request.current | sizes
    assert other != default
    assert request.refused({"nonsense": 1}) is not None
    for name, values in request.axes.items():
        assert values
        assert all(size > 0 for size in values), name


def test_the_packages_table_is_of_kernels_that_take_it():
    """Each line is asked for by some call above, and its kernel refuses none of it."""
    lines, used = tiles.read(tiles.PACKAGE), set()
    chips = {key.split()[1] for key in lines}
    for make in {call[0] for name, call in CALLS.items() if any(key.startswith(name) for key in lines)}:
        function, arguments = make()
        for name in chips:
            target = Chip("cpu" if name == "cpu" else "gpu" if name.startswith("sm") else "tpu", name)
            with compiling_for(target), tiles.asked() as requests, tiles.trying({}):
                jax.eval_shape(lambda *each, function=function: function(*each), *arguments)
            for request in requests.values():
                found = next((key for key in request.lines() if key in lines), None)
                if found is not None:
                    used.add(found)
                    assert request.current == request.rule | lines[found]["sizes"]
    assert used == set(lines)
    assert all(line["source"] for line in lines.values())
