"""`maxstack generate RUN PROMPT`: continue a prompt with a trained model."""

import argparse
import sys
import time
from collections.abc import Sequence

from maxstack.config import UserError
from maxstack.models.generate import GenerateConfig, generate, prompt_ids, stop_ids
from maxstack.models.load import load


def parser() -> argparse.ArgumentParser:
    """The verb's arguments."""
    defaults = GenerateConfig()
    result = argparse.ArgumentParser(
        prog="maxstack generate",
        description="Continue a prompt with a trained model; text streams to standard output.",
    )
    result.add_argument("model", help="run folder or checkpoint")
    result.add_argument(
        "prompt", nargs="?", default="", help="text to continue (default: the start of a document)"
    )
    number = result.add_argument
    number(
        "--max-tokens", type=int, default=defaults.max_tokens, help="new tokens at most (default %(default)s)"
    )
    number(
        "--temperature",
        type=float,
        default=defaults.temperature,
        help="0: the likeliest token (default %(default)s)",
    )
    number("--top-k", type=int, default=0, help="only the k likeliest tokens; 0 for all (default 0)")
    number(
        "--top-p", type=float, default=1.0, help="only the likeliest tokens of this probability (default 1)"
    )
    number("--seed", type=int, default=0, help="the same seed gives the same text (default 0)")
    number("--step", type=int, default=None, help="checkpoint step (default: the newest)")
    result.add_argument("--averaged", action="store_true", help="use the moving average of the weights")
    return result


def main(argv: Sequence[str]) -> int:
    """Run the verb; returns the exit code."""
    args = parser().parse_args(argv)
    config = GenerateConfig(
        max_tokens=args.max_tokens,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        seed=args.seed,
    )
    model, tokenizer = load(args.model, step=args.step, averaged=args.averaged)
    if tokenizer is None:
        raise UserError(
            f"{args.model}: no tokenizer beside the checkpoints, so there is no way to read a prompt"
        )
    ids = prompt_ids(tokenizer, args.prompt)
    tokens = generate(model, [ids], config, stop_ids(tokenizer))
    print(args.prompt, end="", flush=True)
    start, new = time.perf_counter(), []
    shown = ""
    for [token] in tokens:
        if token is None:
            break
        new.append(token)
        shown = show(tokenizer.decode(new), shown)
    print(flush=True)
    seconds = time.perf_counter() - start
    print(f"{len(new)} tokens, {len(new) / seconds:.1f} tokens/s with compilation", file=sys.stderr)
    return 0


def show(text: str, shown: str) -> str:
    """Print what is new and final of `text`: a character cut in half decodes to U+FFFD and waits for its rest."""
    final = text.rstrip("\ufffd")
    print(final[len(shown) :], end="", flush=True)
    return final
