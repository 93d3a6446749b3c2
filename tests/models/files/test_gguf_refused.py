"""What is wrong with a GGUF file is said within moments, before memory is taken for it."""

import struct
import time
import tracemalloc

import numpy as np
import pytest

from maxstack.config import UserError
from maxstack.models.files import GGUF, open_weights
from tests.models.files.made import entry, floats, gguf_bytes, tensor, text

U32, U64, BOOL, TEXT, ARRAY = 4, 10, 7, 8, 9
HUGE = 1 << 60


def array(item: int, count: int, data: bytes = b"") -> bytes:
    return struct.pack("<IQ", item, count) + data


NESTED = array(ARRAY, 1, array(ARRAY, 1, array(ARRAY, 1)))
PADDED = bytes(4096)


def test_the_file_that_the_next_tests_break_is_read(tmp_path):
    path = tmp_path / "m.gguf"
    for version in (2, 3):
        path.write_bytes(gguf_bytes(
            [entry("a", U32, struct.pack("<I", 7)), entry("b", ARRAY, array(TEXT, 2, text("x") + text("y")))],
            [tensor("t", [2, 3]), tensor("u", [2], offset=32)], floats(10), version=version,
        ))  # fmt: skip
        source = open_weights(tmp_path)
        assert source.metadata == {"a": 7, "b": ["x", "y"]}
        np.testing.assert_array_equal(source.read("t"), np.arange(6).reshape(3, 2))
        np.testing.assert_array_equal(source.read("u"), [8, 9])


@pytest.mark.parametrize(
    ("content", "word"),
    [
        (b"", "no GGUF file"),
        (b"GGUF", "inside its header"),
        (gguf_bytes(magic=b"GGML"), "begins with b'GGML'"),
        (gguf_bytes(version=1), "version 1; versions 2 and 3"),
        (gguf_bytes(version=4), "version 4"),
        (gguf_bytes(version=3 << 24), "big-endian"),
        (gguf_bytes(tensor_count=HUGE), "list of tensors claims 1,152,921,504,606,846,976"),
        (gguf_bytes(entry_count=HUGE), "metadata claims 1,152,921,504,606,846,976"),
        (gguf_bytes(entry_count=3, data=PADDED), "twice"),
        (gguf_bytes(entry_count=70_000, data=bytes(1 << 20)), "70,000 entries"),
        (gguf_bytes(tensor_count=140_000, data=bytes(1 << 22)), "140,000 entries"),
        (gguf_bytes([entry("a", U32, bytes(4))] * 2), "'a' twice"),
        (gguf_bytes([entry("a", 13, bytes(4))], data=PADDED), "type 13"),
        (gguf_bytes([entry("a", BOOL, b"\2")]), "neither true nor false"),
        (gguf_bytes([entry("a", TEXT, struct.pack("<Q", HUGE))]), "of text"),
        (gguf_bytes([entry("a", TEXT, struct.pack("<Q", 5000))]), "inside its header"),
        (gguf_bytes([entry("a", TEXT, text(b"\xff\xfe"))]), "no UTF-8"),
        (gguf_bytes([entry("a", ARRAY, array(TEXT, 1, text(b"\xff\xfe")))]), "no UTF-8"),
        (gguf_bytes([struct.pack("<Q", 70_000) + bytes(70_000)]), "70,000 bytes of text"),
        (gguf_bytes([entry("a", ARRAY, array(TEXT, HUGE))]), "claims"),
        (gguf_bytes([entry("a", ARRAY, array(0, HUGE))]), "claims"),
        (gguf_bytes([entry("a", ARRAY, array(0, 1 << 24))], data=bytes(1 << 25)), "16,777,216 entries"),
        (gguf_bytes([entry("a", ARRAY, array(TEXT, 2, text("x") + struct.pack("<Q", HUGE)))]), "of text"),
        (gguf_bytes([entry("a", ARRAY, array(13, 1))], data=PADDED), "array of type 13"),
        (gguf_bytes([entry("a", ARRAY, NESTED)]), "array of arrays"),
        (gguf_bytes([entry("a", ARRAY, array(BOOL, 3, b"\0\1\2"))]), "neither"),
        (gguf_bytes([entry("general.alignment", U32, struct.pack("<I", 0))]), "power of two"),
        (gguf_bytes([entry("general.alignment", U32, struct.pack("<I", 24))]), "power of two"),
        (gguf_bytes([entry("general.alignment", U32, struct.pack("<I", 1 << 31))]), "power of two"),
        (gguf_bytes([entry("general.alignment", TEXT, text("32"))]), "power of two"),
        (gguf_bytes([entry("split.count", 2, struct.pack("<H", 3))]), "one of 3 parts"),
        (gguf_bytes(tensors=[tensor("t", [2])] * 2, data=floats(2)), "'t' comes twice"),
        (gguf_bytes(tensors=[tensor("t", [1] * 5)], data=floats(2)), "5 axes"),
        (gguf_bytes(tensors=[text("t") + struct.pack("<I", 1 << 31)], data=PADDED), "2,147,483,648 axes"),
        (gguf_bytes(tensors=[tensor("t", [HUGE])], data=floats(2)), "more than memory can be"),
        (gguf_bytes(tensors=[tensor("t", [HUGE, HUGE, 0])], data=floats(2)), "more than memory can be"),
        (gguf_bytes(tensors=[tensor("t", [2], kind=99)], data=floats(2)), "type number 99"),
        (gguf_bytes(tensors=[tensor("t", [32], kind=20)], data=PADDED), "type IQ4_NL, which is not read"),
        (gguf_bytes(tensors=[tensor("t", [33], kind=2)], data=PADDED), "blocks of 32, with rows of"),
        (gguf_bytes(tensors=[tensor("t", [2], offset=4)], data=PADDED), "no multiple of 32"),
        (gguf_bytes(tensors=[tensor("t", [2], offset=1 << 62)], data=PADDED), "cut off"),
        (gguf_bytes(tensors=[tensor("t", [3])], data=floats(2)), "cut off"),
        (gguf_bytes(tensors=[tensor("t", [9]), tensor("u", [1], offset=32)], data=PADDED), "'t' and 'u' overlap"),
        (gguf_bytes(tensors=[tensor("t" * 2000, [1])], data=PADDED), "2,000 bytes of text"),
    ],
    ids=lambda value: value if isinstance(value, str) else "file",
)  # fmt: skip
def test_a_damaged_file_is_refused(tmp_path, content, word):
    path = tmp_path / "m.gguf"
    path.write_bytes(content)
    tracemalloc.start()
    before = time.monotonic()
    with pytest.raises(UserError, match=word) as caught:
        GGUF(path)
    assert time.monotonic() - before < 2
    assert tracemalloc.get_traced_memory()[1] < 16_000_000
    tracemalloc.stop()
    assert str(path) in str(caught.value)
    assert len(str(caught.value)) < 1000


def test_an_endless_header_of_a_sparse_file_is_given_up(tmp_path):
    """A file of 64 GB that takes no place on the disk, whose metadata never ends."""
    path = tmp_path / "m.gguf"
    count = 1 << 23
    with path.open("wb") as file:
        file.write(gguf_bytes([entry("a", ARRAY, array(11, count))], entry_count=3)[: 24 + 9 + 4 + 12])
        file.truncate(1 << 36)
    tracemalloc.start()
    before = time.monotonic()
    with pytest.raises(UserError, match="none that is in use comes near"):
        GGUF(path)
    assert time.monotonic() - before < 20
    assert tracemalloc.get_traced_memory()[1] < 600_000_000
    tracemalloc.stop()


def test_of_several_files_one_must_be_named(tmp_path):
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).write_bytes(gguf_bytes())
    with pytest.raises(UserError, match=r"'a\.gguf', 'b\.gguf'; name the file"):
        open_weights(tmp_path)
    assert open_weights(tmp_path / "a.gguf").names() == ()
