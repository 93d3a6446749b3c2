"""What is wrong with a safetensors file or folder is said before memory is taken for it."""

import json
import os
import struct
import time
import tracemalloc

import numpy as np
import pytest

from maxstack.config import UserError
from maxstack.models.files import Safetensors, TensorInfo, open_weights, write_safetensors
from tests.models.files.made import field, floats, safetensors_bytes

TWO = {"a": field([2], 0, 8), "b": field([3], 8, 20)}
NESTED = "[" * 100_000


@pytest.mark.parametrize(
    ("content", "word"),
    [
        (b"", "has 0 bytes"),
        (b"1234567", "has 7 bytes"),
        (safetensors_bytes(TWO, floats(5), length=1 << 60), "header of 1,152,921,504,606,846,976 bytes"),
        (safetensors_bytes(TWO, floats(5), length=100_000_001), "header of 100,000,001 bytes"),
        (safetensors_bytes("{}", length=3), "header of 3 bytes"),
        (safetensors_bytes("[1]"), "no object"),
        (safetensors_bytes("{"), "no valid JSON"),
        (safetensors_bytes(b'{"\xff": 1}'), "no valid JSON"),
        (safetensors_bytes(NESTED), "nested without end"),
        (safetensors_bytes('{"a": ' + NESTED), "nested without end"),
        (safetensors_bytes('{"a": NaN}'), "NaN"),
        (safetensors_bytes('{"a": ' + "9" * 5000 + "}"), "no valid JSON"),
        (safetensors_bytes('{"a": 1, "a": 1}'), "'a' comes twice"),
        (
            safetensors_bytes('{"a": {"dtype": "F32", "dtype": "F16", "shape": [], "data_offsets": [0, 4]}}'),
            "twice",
        ),
        (safetensors_bytes({"a": 1}), "no object"),
        (safetensors_bytes({"a": field([2], 0, 8) | {"dtype": "Q4"}}, floats(2)), "dtype 'Q4'"),
        (safetensors_bytes({"a": field([2], 0, 8) | {"dtype": ["F32"]}}, floats(2)), "dtype"),
        (safetensors_bytes({"a": field([-2], 0, 8)}, floats(2)), "shape"),
        (safetensors_bytes({"a": field([2.0], 0, 8)}, floats(2)), "shape"),
        (safetensors_bytes({"a": field([True, 2], 0, 8)}, floats(2)), "shape"),
        (safetensors_bytes({"a": field([1] * 65, 0, 4)}, floats(1)), "shape"),
        (safetensors_bytes({"a": field([1 << 40, 1 << 40, 0], 0, 0)}), "more than memory can be"),
        (safetensors_bytes({"a": field([1 << 64], 0, 8)}, floats(2)), "shape"),
        (safetensors_bytes({"a": field([3], 0, 8)}, floats(2)), "8 bytes; its shape"),
        (safetensors_bytes({"a": field([2], 8, 0)}, floats(2)), "data_offsets"),
        (safetensors_bytes({"a": field([2], 0, 8) | {"data_offsets": [0]}}, floats(2)), "data_offsets"),
        (safetensors_bytes({"a": field([2], 0, 8) | {"data_offsets": "08"}}, floats(2)), "data_offsets"),
        (
            safetensors_bytes({"a": field([2], 0, 8), "b": field([2], 4, 12)}, floats(3)),
            "'a' and 'b' overlap",
        ),
        (safetensors_bytes({"a": field([2], 0, 8), "b": field([2], 0, 8)}, floats(2)), "overlap"),
        (safetensors_bytes({"a": field([2], 0, 8), "b": field([2], 12, 20)}, floats(5)), "4 bytes before"),
        (safetensors_bytes({"a": field([2], 4, 12)}, floats(3)), "4 bytes before"),
        (safetensors_bytes(TWO, floats(4)), "cut off"),
        (safetensors_bytes(TWO, floats(6)), "longer than"),
        (safetensors_bytes({"__metadata__": {"a": 1}}), "not an object of texts"),
        (safetensors_bytes({"__metadata__": "a"}), "not an object of texts"),
    ],
    ids=lambda value: value if isinstance(value, str) else "file",
)
def test_a_damaged_file_is_refused(tmp_path, content, word):
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    tracemalloc.start()
    before = time.monotonic()
    with pytest.raises(UserError, match=word) as caught:
        Safetensors(path)
    assert time.monotonic() - before < 2
    assert tracemalloc.get_traced_memory()[1] < 16_000_000
    tracemalloc.stop()
    assert str(path) in str(caught.value)
    assert len(str(caught.value)) < 1000


def test_a_file_that_gets_shorter_while_it_is_open_is_an_error(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(safetensors_bytes(TWO, floats(5)))
    source = Safetensors(path)
    os.truncate(path, path.stat().st_size - 4)
    np.testing.assert_array_equal(source.read("a"), [0, 1])
    with pytest.raises(UserError, match="got shorter"):
        source.read("b")


def sharded(folder, **changes):
    """Two shards, `a` in the first and `b` in the second; `changes` go into the index."""
    for number, name in enumerate("ab", start=1):
        path = folder / f"model-0000{number}-of-00002.safetensors"
        path.write_bytes(safetensors_bytes({name: field([2], 0, 8)}, floats(2)))
    fields = {name: f"model-0000{number}-of-00002.safetensors" for number, name in enumerate("ab", start=1)}
    index = {"weight_map": {name: file for name, file in (fields | changes).items() if file}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def test_the_shards_that_the_next_tests_break_are_read(tmp_path):
    assert Safetensors(sharded(tmp_path)).names() == ("a", "b")


@pytest.mark.parametrize(
    "file",
    [
        "../model.safetensors", "/etc/passwd", "/x.safetensors", "sub/model.safetensors", "..", "a\\b.safetensors",
        "c:x.safetensors", ".hidden.safetensors", "weights.bin", "x\0.safetensors", "x\n.safetensors", 3, ["x"],
    ],
)  # fmt: skip
def test_an_index_opens_nothing_but_shards_beside_it(tmp_path, file):
    (tmp_path / "model.safetensors").write_bytes(safetensors_bytes({"b": field([2], 0, 8)}, floats(2)))
    (tmp_path / "m").mkdir()
    with pytest.raises(UserError, match=r"model\.safetensors\.index\.json"):
        Safetensors(sharded(tmp_path / "m", b=file))


def test_a_link_out_of_the_folder_is_refused_and_one_within_it_is_not(tmp_path):
    folder = sharded(tmp_path)
    shard = folder / "model-00002-of-00002.safetensors"
    shard.rename(folder / "stored.safetensors")
    shard.symlink_to("stored.safetensors")
    assert Safetensors(folder).names() == ("a", "b")
    (folder / "stored.safetensors").rename(tmp_path.parent / "outside.safetensors")
    shard.unlink()
    shard.symlink_to(tmp_path.parent / "outside.safetensors")
    with pytest.raises(UserError, match="is a link to"):
        Safetensors(folder)


def test_the_links_of_the_hubs_cache_are_followed(tmp_path):
    """snapshots/<revision>/file -> ../../blobs/<etag>, which may be a link to <cache>/blobs/…/<hash> itself."""
    snapshot = tmp_path / "models--owner--name" / "snapshots" / "0123abcd"
    blobs, shared = tmp_path / "models--owner--name" / "blobs", tmp_path / "blobs" / "ff"
    for folder in (snapshot, blobs, shared):
        folder.mkdir(parents=True)
    sharded(snapshot)
    for number, place in ((1, blobs / "aaaa"), (2, shared / "bbbb")):
        shard = snapshot / f"model-0000{number}-of-00002.safetensors"
        shard.rename(place)
        shard.symlink_to(os.path.relpath(place, snapshot))
    assert Safetensors(snapshot).names() == ("a", "b")
    other = tmp_path / "models--owner--other" / "blobs"
    other.mkdir(parents=True)
    (blobs / "aaaa").rename(other / "aaaa")
    shard = snapshot / "model-00001-of-00002.safetensors"
    shard.unlink()
    shard.symlink_to(other / "aaaa")
    with pytest.raises(UserError, match="is a link to"):
        Safetensors(snapshot)


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"b": None}, "does not name 'b'|names"),
        ({"c": "model-00002-of-00002.safetensors"}, "names 'c', which its shards do not hold"),
        ({"c": "model-00003-of-00003.safetensors"}, "model-00003-of-00003.safetensors is missing"),
        (
            {"a": "model-00002-of-00002.safetensors", "b": "model-00001-of-00002.safetensors"},
            "puts tensor 'a'.*lies in",
        ),
    ],
)
def test_an_index_that_disagrees_with_its_shards_is_refused(tmp_path, changes, word):
    folder = sharded(tmp_path, **changes)
    if changes == {"b": None}:  # listed nowhere, in a shard that is listed
        for path in folder.glob("*.safetensors"):
            path.unlink()
        path = folder / "model-00001-of-00002.safetensors"
        path.write_bytes(safetensors_bytes({"a": field([2], 0, 8), "b": field([2], 8, 16)}, floats(4)))
    with pytest.raises(UserError, match=word):
        Safetensors(folder)


def test_a_tensor_in_two_shards_is_refused(tmp_path):
    folder = sharded(tmp_path)
    path = folder / "model-00002-of-00002.safetensors"
    path.write_bytes(safetensors_bytes({"a": field([2], 0, 8), "b": field([2], 8, 16)}, floats(4)))
    with pytest.raises(UserError, match=r"'a' lies in .*00001.* and in .*00002"):
        Safetensors(folder)


@pytest.mark.parametrize("index", ["", "[]", "{}", '{"weight_map": {}}', '{"weight_map": [1]}', NESTED])
def test_a_damaged_index_is_refused(tmp_path, index):
    (tmp_path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(UserError, match=r"model\.safetensors\.index\.json is damaged"):
        Safetensors(tmp_path)


def test_pickles_are_refused_with_the_way_to_convert_them(tmp_path):
    for name in ("pytorch_model.bin", "model.pt", "model.pth"):
        (tmp_path / "m").mkdir(exist_ok=True)
        path = tmp_path / "m" / name
        path.write_bytes(b"\x80\x02")
        for place in (path, path.parent):
            with pytest.raises(UserError, match=r"safe_serialization=True"):
                open_weights(place)
        path.unlink()


def test_places_without_weights_say_what_is_there(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        open_weights(tmp_path / "nowhere")
    with pytest.raises(UserError, match="it is empty"):
        open_weights(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match=r"only 'config\.json'"):
        open_weights(tmp_path)
    with pytest.raises(UserError, match="no kind of weights"):
        open_weights(tmp_path / "config.json")
    (tmp_path / "a.safetensors").write_bytes(safetensors_bytes(TWO, floats(5)))
    with pytest.raises(UserError, match=r"'a\.safetensors'; name the file"):
        open_weights(tmp_path)
    assert open_weights(tmp_path / "a.safetensors").names() == ("a", "b")
    os.mkfifo(tmp_path / "pipe.safetensors")
    with pytest.raises(UserError, match="is not a file"):
        open_weights(tmp_path / "pipe.safetensors")


@pytest.mark.parametrize(
    ("length", "word"), [(10_000_000, "no valid JSON"), (100_000_001, "header of 100,000,001 bytes")]
)
def test_a_header_in_a_file_that_has_room_for_it_is_still_bounded(tmp_path, length, word):
    """64 GB of zeros that take no place on the disk."""
    path = tmp_path / "model.safetensors"
    with path.open("wb") as file:
        file.write(struct.pack("<Q", length))
        file.truncate(1 << 36)
    with pytest.raises(UserError, match=word):
        Safetensors(path)


def test_writing_refuses_what_would_mix_two_exports(tmp_path):
    def tensors():
        return [("a", TensorInfo((2,), "float32"), lambda: np.ones(2, np.float32))]

    write_safetensors(tmp_path, tensors())
    with pytest.raises(UserError, match="holds weights already"):
        write_safetensors(tmp_path, tensors())


@pytest.mark.parametrize(
    ("info", "array", "word"),
    [
        (TensorInfo((2,), "float32"), np.ones(2, np.float16), "announced as"),
        (TensorInfo((2,), "float32"), np.ones(3, np.float32), "announced as"),
        (TensorInfo((2,), "float32"), np.ones(2, ">f4"), "announced as"),
        (TensorInfo((2,), "complex128"), np.ones(2, np.complex128), "safetensors hold"),
    ],
)
def test_writing_refuses_another_array_than_announced_and_leaves_nothing(tmp_path, info, array, word):
    tensors = [
        ("first", TensorInfo((1,), "float32"), lambda: np.ones(1, np.float32)),
        ("a", info, lambda: array),
    ]
    with pytest.raises(ValueError, match=word):
        write_safetensors(tmp_path / "new", tensors, shard_bytes=4)
    assert list(tmp_path.iterdir()) == []
