"""1,000 damaged headers: each is a UserError or is read, in bounded time and memory, and nothing else happens."""

import json
import random
import time
import tracemalloc

import numpy as np
import pytest

from maxstack.config import UserError
from maxstack.models.files import TensorInfo, open_weights, write_safetensors
from tests.models.files.made import GOLDENS

SAFETENSORS, INDEX, GGUF_FILE = "model.safetensors", "model.safetensors.index.json", "m.gguf"
TRIALS = {SAFETENSORS: 250, INDEX: 150, GGUF_FILE: 200}
# Bytes that mean something to one of the formats, more often than chance has them.
TELLING = [*b'{}[]":,0189-eE.\\/', 0, 1, 2, 9, 127, 128, 255]


def damaged(content: bytes, header: int, random: random.Random) -> bytes:
    """A few changes at once, nearly all within the first `header` bytes."""
    found = bytearray(content)
    for _ in range(random.choice((1, 1, 2, 5))):
        where = random.randrange(min(header, len(found)) or 1)
        length = random.choice((1, 1, 4, 8, 40))
        change = random.choice(("flip", "set", "insert", "cut", "repeat", "end"))
        fresh = bytes(random.choice(TELLING) for _ in range(length))
        if change == "flip" and found:
            found[where] ^= 1 << random.randrange(8)
        elif change == "set":
            found[where : where + length] = fresh
        elif change == "insert":
            found[where:where] = fresh
        elif change == "cut":
            del found[where : where + length]
        elif change == "repeat":
            found[where:where] = found[where : where + length] * random.choice((1, 3))
        elif random.random() < 0.3:
            del found[where:]
    return bytes(found)


def originals(folder):
    """A file of each format and the length of its header."""
    arrays = {f"layers.{n}.w": np.arange(12, dtype=np.float32).reshape(3, 4) for n in range(6)}
    tensors = [(name, TensorInfo(a.shape, a.dtype.name), lambda a=a: a) for name, a in arrays.items()]
    write_safetensors(folder / "whole", tensors)
    write_safetensors(folder / "sharded", tensors, shard_bytes=100)
    whole = (folder / "whole" / SAFETENSORS).read_bytes()
    index = (folder / "sharded" / INDEX).read_bytes()
    gguf = (GOLDENS / "gguf_all_types.gguf").read_bytes()
    return {
        SAFETENSORS: (whole, 8 + int.from_bytes(whole[:8], "little")),
        INDEX: (index, len(index)),
        GGUF_FILE: (gguf, 2000),
    }


def read_all(path):
    with open_weights(path) as source:
        for name in source.names():
            info = source.info(name)
            read = source.read(name)
            assert (read.shape, read.dtype) == (info.shape, info.dtype)


@pytest.mark.parametrize("name", TRIALS)
def test_damaged_headers_end_in_messages(tmp_path, name):
    content, header = originals(tmp_path)[name]
    folder = tmp_path / ("sharded" if name == INDEX else "whole")
    path, dice = folder / name, random.Random(name)
    refused = 0
    for trial in range(TRIALS[name]):
        broken = damaged(content, header, dice)
        path.write_bytes(broken)
        tracemalloc.start()
        before = time.monotonic()
        message = ""
        try:
            read_all(folder if name == INDEX else path)
        except UserError as error:
            message = str(error)
        except BaseException as error:
            error.add_note(f"trial {trial}: {broken!r}")
            raise
        taken, peak = time.monotonic() - before, tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        refused += bool(message)
        assert len(message.encode()) < 2000, (trial, broken)  # which also says that it can be printed
        assert taken < 5, (trial, broken)
        assert peak < 64_000_000, (trial, broken)
    # Most changes show. Those that do not are to names, to values of metadata and to blanks.
    assert refused > TRIALS[name] * 0.5


def test_the_untouched_files_are_read(tmp_path):
    content = originals(tmp_path)
    assert json.loads(content[INDEX][0])["metadata"]["total_size"] == 6 * 48
    for place in (tmp_path / "whole", tmp_path / "sharded", GOLDENS / "gguf_all_types.gguf"):
        read_all(place)
