"""safetensors: read as the published library reads them, written so that it reads them, sharded or not."""

import json
import weakref

import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.numpy

from maxstack.config import UserError
from maxstack.models.files import Safetensors, TensorInfo, TensorSource, open_weights, write_safetensors
from maxstack.models.files.header import DTYPES
from maxstack.models.files.source import dtype_of

RNG = np.random.default_rng(0)
ARRAYS = {
    "b": RNG.standard_normal((5, 3)).astype(np.float32),
    "a.half": RNG.standard_normal((4, 2, 3)).astype(np.float16),
    "bytes": np.arange(7, dtype=np.uint8),
    "scalar": np.array(1.5),
    "empty": np.zeros((0, 4), np.int64),
    "flags": np.array([True, False, True]),
}
BF16 = {"w": RNG.standard_normal((6, 4)).astype(ml_dtypes.bfloat16)}


def lazily(arrays):
    return [(name, TensorInfo(a.shape, a.dtype.name), lambda a=a: a) for name, a in arrays.items()]


def assert_holds(source, arrays):
    assert sorted(source.names()) == sorted(arrays)
    for name, array in arrays.items():
        assert source.info(name) == TensorInfo(array.shape, array.dtype.name)
        read = source.read(name)
        assert read.dtype == array.dtype
        assert read.tobytes() == array.tobytes()


def test_what_the_published_library_wrote_is_read_alike(tmp_path):
    safetensors.numpy.save_file(ARRAYS, tmp_path / "model.safetensors", {"format": "pt"})
    for place in (tmp_path, tmp_path / "model.safetensors"):
        with open_weights(place) as source:
            assert isinstance(source, TensorSource)
            assert_holds(source, safetensors.numpy.load_file(tmp_path / "model.safetensors"))
            assert source.metadata == {"format": "pt"}
            assert source.where == str(place)


def test_what_is_written_is_read_by_the_published_library(tmp_path):
    write_safetensors(tmp_path, lazily(ARRAYS))
    read = safetensors.numpy.load_file(tmp_path / "model.safetensors")
    assert read.keys() == ARRAYS.keys()
    for name, array in ARRAYS.items():
        assert read[name].dtype == array.dtype
        np.testing.assert_array_equal(read[name], array)
    with safetensors.safe_open(tmp_path / "model.safetensors", "np") as file:
        assert file.metadata() == {"format": "pt"}


def test_bfloat16_has_the_published_librarys_bytes(tmp_path):
    """Its numpy side does not know the type, its serializer does."""
    write_safetensors(tmp_path, lazily(BF16))
    bare = safetensors.TensorSpec(
        dtype="bfloat16", shape=(6, 4), data_ptr=BF16["w"].ctypes.data, data_len=BF16["w"].nbytes
    )
    assert (tmp_path / "model.safetensors").read_bytes() == safetensors.serialize(
        {"w": bare}, {"format": "pt"}
    )
    assert_holds(Safetensors(tmp_path), BF16)


@pytest.mark.parametrize("name", sorted(set(DTYPES.values()) - {"bool"}))
def test_every_dtype_comes_back(tmp_path, name):
    array = (
        RNG.integers(0, 100, (3, 8), np.uint8).repeat(dtype_of(name).itemsize, axis=1).view(dtype_of(name))
    )
    write_safetensors(tmp_path, lazily({"x": array}))
    assert_holds(Safetensors(tmp_path), {"x": array})


@pytest.mark.parametrize("rows", [(0, 5), (1, 3), (2, 2), (4, 5)])
def test_rows_are_the_arrays_rows_in_memory_of_their_own(tmp_path, rows):
    write_safetensors(tmp_path, lazily(ARRAYS))
    source = Safetensors(tmp_path)
    read = source.read("b", *rows)
    np.testing.assert_array_equal(read, ARRAYS["b"][slice(*rows)])
    read[...] = 0
    np.testing.assert_array_equal(source.read("b", *rows), ARRAYS["b"][slice(*rows)])
    np.testing.assert_array_equal(source.read("a.half", 3), ARRAYS["a.half"][3:])


@pytest.mark.parametrize("rows", [(-1, 2), (3, 2), (0, 6), (6, None)])
def test_rows_that_are_not_there_are_refused(tmp_path, rows):
    write_safetensors(tmp_path, lazily(ARRAYS))
    with pytest.raises(ValueError, match="b has 5 rows"):
        Safetensors(tmp_path).read("b", *rows)


def test_a_tensor_that_is_not_there_is_named_with_those_that_are(tmp_path):
    write_safetensors(tmp_path, lazily(ARRAYS))
    with pytest.raises(UserError, match=r"no tensor 'nope'; it has 6: .* and 3 more"):
        Safetensors(tmp_path).read("nope")


def test_shards_hold_at_most_their_size_and_come_back_whole(tmp_path):
    arrays = {f"layer.{n}": RNG.standard_normal((n + 1, 25)).astype(np.float32) for n in range(8)}
    files = write_safetensors(tmp_path, lazily(arrays), shard_bytes=1000)
    shards = [path for path in files if path.suffix == ".safetensors"]
    # 100 … 800 bytes in order: 100+200+300+400 fill one, then each of the others needs its own.
    assert [path.name for path in shards] == [f"model-0000{n}-of-00005.safetensors" for n in range(1, 6)]
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(array.nbytes for array in arrays.values())
    for shard in shards:
        held = safetensors.numpy.load_file(shard)
        assert sum(array.nbytes for array in held.values()) <= 1000
        assert sorted(held) == sorted(
            name for name, file in index["weight_map"].items() if file == shard.name
        )
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(path.name for path in files)
    assert_holds(open_weights(tmp_path), arrays)
    assert_holds(open_weights(tmp_path / "model.safetensors.index.json"), arrays)


def test_shards_of_equal_tensors_are_equally_full(tmp_path):
    arrays = {f"{n}": np.full(100, n, np.float32) for n in range(5)}
    write_safetensors(tmp_path, lazily(arrays), shard_bytes=1000)
    shards = sorted(tmp_path.glob("*.safetensors"))
    assert [Safetensors(shard).names() for shard in shards] == [("0", "1"), ("2", "3"), ("4",)]


def test_a_tensor_larger_than_a_shard_has_one_to_itself(tmp_path):
    arrays = {"a": np.ones(2, np.float32), "big": np.ones(100, np.float32), "c": np.ones(2, np.float32)}
    assert len(write_safetensors(tmp_path, lazily(arrays), shard_bytes=64)) == 3 + 1
    assert_holds(Safetensors(tmp_path), arrays)


def test_wider_types_come_first_so_that_every_tensor_is_aligned(tmp_path):
    arrays = {"odd": np.ones(3, np.uint8), "x": np.ones(2, np.float64), "y": np.ones(3, np.float16)}
    write_safetensors(tmp_path, lazily(arrays))
    source = Safetensors(tmp_path)
    assert source.names() == ("x", "y", "odd")
    assert all(
        place.tensor.offset % dtype_of(place.tensor.info.dtype).itemsize == 0
        for place in source._places.values()
    )


def test_views_are_written_in_the_order_of_their_elements(tmp_path, monkeypatch):
    monkeypatch.setattr("maxstack.models.files.whole._AT_A_TIME", 64)  # several pieces
    wide = RNG.standard_normal((6, 10, 7)).astype(np.float32)
    arrays = {"t": wide.transpose(2, 0, 1), "s": wide[:, ::2], "r": wide[0, 0, ::3], "whole": wide}
    write_safetensors(tmp_path, lazily(arrays))
    assert_holds(Safetensors(tmp_path), arrays)


def test_an_array_is_let_go_before_the_next_is_made(tmp_path):
    last = []

    def make():
        assert all(array() is None for array in last)
        array = np.ones((4, 4), np.float32)
        last[:] = [weakref.ref(array)]
        return array

    info = TensorInfo((4, 4), "float32")
    write_safetensors(tmp_path, [(f"{n}", info, make) for n in range(6)], shard_bytes=128)


def test_memory_handed_out_begins_where_xla_needs_no_copy(tmp_path):
    write_safetensors(tmp_path, lazily(ARRAYS))
    source = Safetensors(tmp_path)
    assert all(source.read(name).ctypes.data % 64 == 0 for name in ("b", "a.half", "bytes"))
