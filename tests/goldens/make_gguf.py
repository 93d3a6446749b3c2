"""Makes the golden GGUF file and blocks of tests/models/files with llama.cpp's own Python package.

Run by hand, in an environment with gguf (made with gguf 0.19.0 and numpy 2.4):

    python tests/goldens/make_gguf.py

gguf_all_types.gguf   one small tensor of each type that is read and metadata of each type. Blocks of the K types are
                      random bytes with finite scales: the package does not make such blocks, it only reads them.
gguf_written.gguf     the same metadata and one tensor of each type that is written
gguf_blocks.npz       "decoded:<tensor>": the same tensors as float32, by gguf.quants.dequantize;
                      "values" [rows, 64] float32, and "encoded:<type>": those in blocks, by gguf.quants.quantize
"""

from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter
from gguf.constants import GGML_QUANT_SIZES
from gguf.quants import dequantize, quantize

FOLDER = Path(__file__).parent
MADE = ("F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")
# Where the float16 scales of a block lie.
SCALES = {"Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}


def random_blocks(name: str, rng: np.random.Generator) -> np.ndarray:
    """[3, bytes of two blocks], every bit of which can be either."""
    nbytes = GGML_QUANT_SIZES[GGMLQuantizationType[name]][1]
    blocks = rng.integers(0, 256, (6, nbytes), dtype=np.uint8)
    for place in SCALES[name]:
        blocks[:, place : place + 2] = rng.standard_normal((6, 1)).astype(np.float16).view(np.uint8)
    return blocks.reshape(3, -1)


def hard_values(rng: np.random.Generator) -> np.ndarray:
    """Rows on which rounding shows: ties, zeros, one sign only, tiny and large."""
    rows = [rng.standard_normal((8, 64)), np.zeros((1, 64))]
    rows += [np.arange(64)[None] - 31.5, np.arange(64)[None] % 17 / 2 - 4, np.arange(64)[None] + 100]
    # Multiples of half a step: every element is a tie of Q8_0, or of Q4_0.
    rows += [np.where(np.arange(64) % 32 == 0, 127, np.arange(64) % 32 + 0.5)[None]]
    rows += [np.where(np.arange(64) % 32 == 0, -8, np.arange(64) % 15 - 7.5)[None]]
    rows += [1e-6 * rng.standard_normal((2, 64)), 3e4 * rng.uniform(-1, 1, (2, 64))]
    return np.concatenate(rows).astype(np.float32)


def add_metadata(writer: GGUFWriter) -> None:
    writer.add_name("every type")
    writer.add_uint8("x.uint8", 200)
    writer.add_int8("x.int8", -100)
    writer.add_uint16("x.uint16", 60_000)
    writer.add_int16("x.int16", -30_000)
    writer.add_uint32("x.uint32", 4_000_000_000)
    writer.add_int32("x.int32", -2_000_000_000)
    writer.add_uint64("x.uint64", 2**63)
    writer.add_int64("x.int64", -(2**62))
    writer.add_float32("x.float32", 0.1)
    writer.add_float64("x.float64", 0.1)
    writer.add_bool("x.bool", True)
    writer.add_string("x.string", "línea\n日本 🙂")
    writer.add_array("x.strings", ["", "a", "▁the", "🙂"])
    writer.add_array("x.integers", [1, -2, 3])
    writer.add_array("x.floats", [0.5, -1.25])
    writer.add_array("x.booleans", [True, False, True])


def make_written(values: np.ndarray) -> dict[str, np.ndarray]:
    """A file of these values in each type that is written; returns their blocks."""
    writer = GGUFWriter(FOLDER / "gguf_written.gguf", "llama")
    add_metadata(writer)
    arrays = {}
    for name in ("F32", "F16", "BF16", "Q8_0", "Q4_0"):
        blocks = quantize(values, GGMLQuantizationType[name])
        writer.add_tensor(f"blk.{name}", blocks, raw_dtype=GGMLQuantizationType[name])
        arrays[f"encoded:{name}"] = np.ascontiguousarray(blocks).view(np.uint8)
    cube = values[:2].reshape(2, 4, 16)
    writer.add_tensor("cube", cube.astype(np.float16))
    finish(writer)
    return arrays


def finish(writer: GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def main() -> None:
    rng = np.random.default_rng(4)
    path = FOLDER / "gguf_all_types.gguf"
    writer = GGUFWriter(path, "llama")
    add_metadata(writer)
    arrays = {}
    for name in (*MADE, *SCALES):
        kind = GGMLQuantizationType[name]
        if name in SCALES:
            blocks = random_blocks(name, rng)
        else:
            blocks = quantize(rng.standard_normal((3, 64)).astype(np.float32), kind)
        writer.add_tensor(f"blk.{name}", blocks, raw_dtype=kind)
        arrays[f"decoded:blk.{name}"] = dequantize(blocks, kind)
    vector = quantize(rng.standard_normal(96).astype(np.float32), GGMLQuantizationType.Q8_0)
    writer.add_tensor("vector", vector, raw_dtype=GGMLQuantizationType.Q8_0)
    arrays["decoded:vector"] = dequantize(vector, GGMLQuantizationType.Q8_0)
    cube = rng.standard_normal((2, 3, 4)).astype(np.float32)
    writer.add_tensor("cube", cube)
    arrays["decoded:cube"] = cube
    finish(writer)
    arrays["values"] = hard_values(rng)
    arrays |= make_written(arrays["values"])
    np.savez_compressed(FOLDER / "gguf_blocks.npz", **arrays)
    for made in (path, FOLDER / "gguf_written.gguf", FOLDER / "gguf_blocks.npz"):
        print(f"{made.name}: {made.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    main()
