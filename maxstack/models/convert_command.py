"""`maxstack convert SRC DST --format hf|gguf`: write any readable model in another format."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from maxstack.models.load import load
from maxstack.models.save import FORMATS, save

DTYPES = ("float32", "float16", "bfloat16", "q8_0", "q4_0")


def parser() -> argparse.ArgumentParser:
    """The verb's arguments."""
    result = argparse.ArgumentParser(
        prog="maxstack convert",
        description="Write a model in another format. What was written is read again and its logits compared before "
        "it appears under its name.",
    )
    add = result.add_argument
    add("source", help="run folder, model folder, GGUF file, hf:owner/name, or a packaged model")
    add("target", help="folder (hf) or file (gguf) to write; must not be there yet")
    add(
        "--format",
        choices=FORMATS,
        default="hf",
        help="hf: safetensors for transformers; gguf: for llama.cpp",
    )
    add(
        "--dtype",
        choices=DTYPES,
        default=None,
        help="type of the weights (default: as they are; q… for gguf only)",
    )
    add(
        "--family",
        default=None,
        help="family to write when several hold the model (default: the first that does)",
    )
    add("--shard-gb", type=float, default=5.0, help="largest safetensors shard (GB, default %(default)s)")
    add("--step", type=int, default=None, help="checkpoint step of a run (default: the newest)")
    add("--averaged", action="store_true", help="the moving average of a run's weights")
    return result


def main(argv: Sequence[str]) -> int:
    """Run the verb; returns the exit code."""
    args = parser().parse_args(argv)
    model, tokenizer = load(args.source, step=args.step, averaged=args.averaged)
    manifest = save(
        model, tokenizer, Path(args.target), format=args.format, dtype=args.dtype, family=args.family,
        shard_bytes=int(args.shard_gb * 1e9), made=f"Converted by `maxstack convert` from {args.source}.",
    )  # fmt: skip
    print(
        f"{args.target}: {manifest['family']}, {manifest['dtype']}; read again, logits differ by at most "
        f"{manifest['largest_logit_difference']:.3g} of {manifest['largest_logit']:.3g}"
    )
    return 0
