"""What invariant mode costs where XLA computes: the same requests with and without it, in turns, in one process.

    python benchmarks/invariant_cost.py [--native] [--rows 32] [--at-once 1 8 32] [--requests 2] [--rounds 3] [--json F]

SmolLM2-135M in float32 with ShareGPT's lengths (`--quick`: short ones), engines of the same number of rows, closed
loops of so many clients, `--requests` for each client. Without C++ unless `--native`; there invariance costs nothing,
so with it the mode is forced, to see what one shape for all costs there. Prints, for each number of clients, the output
tokens a second of both and their ratio: the median of the rounds.
"""

import argparse
import asyncio
import dataclasses
import json
import os
import statistics
import time
from pathlib import Path
from typing import Any, cast

from maxstack.serve.load import SHAREGPT_ANSWER, SHAREGPT_PROMPT, Lengths, Load

MODEL = "smollm2-135m-instruct"
VOCABULARY = 49_152
KINDS = ("as usual", "invariant")
MOST_LENGTH = 2048
PAGES_A_ROW = 16


def engines(args: argparse.Namespace) -> dict[str, Any]:
    """Both, compiled."""
    import maxstack
    from maxstack.models.compiled_cache import use_compiled_cache
    from maxstack.serve import AsyncEngine
    from maxstack.serve.sizes import default_limits

    use_compiled_cache()
    model, _ = maxstack.load(MODEL, dtype="float32")
    made = {}
    for kind in KINDS:
        limits = default_limits(
            model.config, "float32", rows=args.rows, max_length=MOST_LENGTH, invariant=kind == "invariant"
        )
        pages = min(limits.pages, args.rows * PAGES_A_ROW)
        limits = dataclasses.replace(limits, prefix_cache=False, pages=pages)
        made[kind] = AsyncEngine(model, limits=limits, kv_dtype="float32", end_ids=())
        made[kind].warm_up()
    return made


async def tokens_a_second(engine: Any, asks: list[tuple[tuple[int, ...], int]], at_once: int) -> float:
    """Of a closed loop."""
    from maxstack.serve import SamplingParams

    left, count = iter(asks), 0

    async def client() -> None:
        nonlocal count
        for prompt, tokens in left:
            params = SamplingParams(max_tokens=tokens, temperature=0.0, ignore_eos=True)
            count += len((await engine.complete(prompt, params)).token_ids)

    begun = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(at_once)))
    return count / (time.perf_counter() - begun)


def asks_of(at_once: int, args: argparse.Namespace) -> list[tuple[tuple[int, ...], int]]:
    """Prompts and lengths of answers, the same for both."""
    from maxstack.bench.serve.asks import drawn

    short = Lengths(mean=40, sigma=0.8, least=4, most=100), Lengths(mean=12, sigma=0.8, least=2, most=24)
    prompt, answer = short if args.quick else (SHAREGPT_PROMPT, SHAREGPT_ANSWER)
    load = Load(requests=args.requests * at_once, clients=at_once, prompt=prompt, answer=answer, seed=at_once)
    return [(cast(tuple[int, ...], ask.prompt), ask.tokens) for ask in drawn(load, VOCABULARY)]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--native", action="store_true", help="with the C++ part")
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--at-once", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--requests", type=int, default=2, help="of each client")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if not args.native:
        os.environ["MAXSTACK_NATIVE"] = "0"
    made, found = engines(args), {}
    for at_once in args.at_once:
        asks, speeds = asks_of(at_once, args), {kind: [] for kind in KINDS}
        for turn in range(args.rounds):
            for kind in KINDS if turn % 2 else KINDS[::-1]:
                speeds[kind].append(asyncio.run(tokens_a_second(made[kind], asks, at_once)))
        usual, invariant = (statistics.median(speeds[kind]) for kind in KINDS)
        found[at_once] = {"usual": usual, "invariant": invariant, "ratio": invariant / usual, "all": speeds}
        print(
            f"{at_once:3d} at once: {usual:7.1f} tokens/s as usual, {invariant:7.1f} invariant, "
            f"{invariant / usual:.2f} times",
            flush=True,
        )
    for engine in made.values():
        engine.close()
        assert engine.compilations == 0
    if args.json is not None:
        args.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
