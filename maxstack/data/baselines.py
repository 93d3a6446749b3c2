"""What general compressors make of held-out text: the bar a language model has to clear."""

import gzip
import lzma
from typing import NamedTuple

from maxstack.data.prepare import PreparedData


class Baseline(NamedTuple):
    """A compressor and the bits it spends on a byte of held-out text."""

    name: str
    bits_per_byte: float


def held_out_baselines(prepared: PreparedData) -> list[Baseline]:
    """gzip and xz of the held-out text alone, and PPMd that has read the training text first.

    The last is there when pyppmd is installed. It spends on the held-out text what the training text followed by it
    takes more than the training text alone.
    """
    held_out = b"".join(source.held_out_text() for source in prepared.sources.values())
    result = [
        Baseline("gzip -9", bits(len(gzip.compress(held_out, 9)), held_out)),
        Baseline("xz -9", bits(len(lzma.compress(held_out, preset=9)), held_out)),
    ]
    try:
        import pyppmd
    except ImportError:
        return result
    training = training_text(prepared)
    for order in (5, 8):
        before, after = (
            len(pyppmd.compress(text, max_order=order, mem_size=512 << 20))
            for text in (training, training + held_out)
        )
        result.append(Baseline(f"PPMd order {order}, trained", bits(after - before, held_out)))
    return result


def bits(compressed: int, text: bytes) -> float:
    """Bits a byte."""
    return 8 * compressed / len(text)


def training_text(prepared: PreparedData) -> bytes:
    """The training documents of all sources, decoded from their tokens (byte BPE loses nothing)."""
    decode = prepared.tokenizer.decode
    texts = [
        decode(source.train.document(i).tolist())
        for source in prepared.sources.values()
        for i in range(source.train.documents)
    ]
    return "".join(texts).encode()
