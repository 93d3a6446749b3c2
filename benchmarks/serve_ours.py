"""Our side of serve_cpu.py: the engine alone, the whole server, and what an int8 cache costs. One line of JSON.

python serve_ours.py [--weights W] [--no-prefix-cache] engine|server|cache TRACE AT_ONCE QUICK
"""

import argparse
import asyncio
import dataclasses
import json
import math
import statistics
import time
from pathlib import Path
from typing import Any, cast

MODEL = "smollm2-135m-instruct"
WARM_TOKENS = 8


def asks_of(file: str) -> list[tuple[tuple[int, ...], int]]:
    """Prompt and length of the answer, of each request."""
    rows = [json.loads(line) for line in Path(file).read_text().splitlines()]
    return [(tuple(row["prompt"]), row["output_tokens"]) for row in rows]


def engine_of(args: argparse.Namespace, kv: str | None = None) -> Any:
    """Compiled and warm."""
    import maxstack
    from maxstack.models.compiled_cache import use_compiled_cache
    from maxstack.serve import AsyncEngine
    from maxstack.serve.sizes import default_limits

    use_compiled_cache()
    packed = None if args.weights == "float32" else args.weights
    model, tokenizer = maxstack.load(MODEL, dtype="float32", weights=cast(Any, packed))
    kv_dtype = cast(Any, kv or "float32")
    limits = default_limits(model.config, kv_dtype)
    limits = dataclasses.replace(limits, prefix_cache=not args.no_prefix_cache)
    engine = AsyncEngine(model, tokenizer, limits=limits, kv_dtype=kv_dtype)
    engine.warm_up()
    return engine


async def ask(engine: Any, prompt: tuple[int, ...], tokens: int) -> tuple[float, float, int]:
    """Seconds to the first token and of each further one, and how many came."""
    from maxstack.serve import SamplingParams

    params = SamplingParams(max_tokens=tokens, temperature=0.0, ignore_eos=True)
    begun, first, count = time.perf_counter(), 0.0, 0
    async for delta in engine.stream(prompt, params):
        first = first or time.perf_counter()
        count += len(delta.token_ids)
    return first - begun, (time.perf_counter() - first) / max(count - 1, 1), count


async def closed_loop(engine: Any, asks: list[Any], at_once: int) -> list[tuple[float, float, int]]:
    """So many clients, one request after another each."""
    left, heard = iter(asks), []

    async def client() -> None:
        for prompt, tokens in left:
            heard.append(await ask(engine, prompt, tokens))

    await asyncio.gather(*(client() for _ in range(at_once)))
    return heard


def run_engine(args: argparse.Namespace) -> dict[str, float]:
    """The engine alone, called by coroutines of its own process."""
    engine, asks = engine_of(args), asks_of(args.trace)

    async def both() -> tuple[list[tuple[float, float, int]], float, float]:
        warm = [((7, 8, 9, i), WARM_TOKENS) for i in range(args.at_once)]
        await closed_loop(engine, warm, args.at_once)
        begun = time.perf_counter()
        heard = await closed_loop(engine, asks, args.at_once)
        return heard, time.perf_counter() - begun, host.seconds

    with Host(engine) as host:
        heard, seconds, spent = asyncio.run(both())
    found = engine.scheduler.counters
    engine.close()
    assert engine.compilations == 0
    return figures(heard, seconds) | {
        "host_share": spent / seconds, "preemptions": found.num_preemptions,
        "cached_tokens": found.prefix_cache_hits,
    }  # fmt: skip


class Host:
    """Adds up the time that the engine's thread spends in the scheduler, by wrapping its two calls."""

    def __init__(self, engine: Any):
        self.scheduler, self.seconds = engine.scheduler, 0.0

    def __enter__(self) -> "Host":
        for name in ("plan", "done"):
            setattr(self.scheduler, name, self._timed(getattr(self.scheduler, name)))
        return self

    def __exit__(self, *reason: object) -> None:
        for name in ("plan", "done"):
            delattr(self.scheduler, name)

    def _timed(self, call: Any) -> Any:
        def timed(*args: Any) -> Any:
            begun = time.perf_counter()
            try:
                return call(*args)
            finally:
                self.seconds += time.perf_counter() - begun

        return timed


def figures(heard: list[tuple[float, float, int]], seconds: float) -> dict[str, float]:
    """As every contender reports them."""
    tokens = sum(count for _, _, count in heard)
    return {
        "seconds": seconds,
        "output_tokens": tokens,
        "output_tokens_per_s": tokens / seconds,
        "ttft_s": statistics.median(first for first, _, _ in heard),
        "tpot_s": statistics.median(each for _, each, count in heard if count > 1),
    }


def run_server(args: argparse.Namespace) -> dict[str, float]:
    """`maxstack serve` and the clients of `maxstack bench serve`, two processes."""
    from maxstack.bench.serve.answers import read
    from maxstack.bench.serve.asks import Ask
    from maxstack.bench.serve.client import Clients, Server, first_model
    from maxstack.bench.serve.numbers import report
    from maxstack.bench.serve.own import started

    asks = [Ask(prompt=prompt, tokens=tokens) for prompt, tokens in asks_of(args.trace)]
    options = ["--dtype", "float32", "--kv", "float32"]
    if args.weights != "float32":
        options += ["--weights", args.weights]
    with started(MODEL, options) as url:
        server = Server(url=url, model=first_model(url, None))

        async def run() -> tuple[list[Any], float]:
            async with Clients(server) as clients:
                warm = [Ask(prompt=(7, 8, 9, i), tokens=WARM_TOKENS) for i in range(args.at_once)]
                await clients.closed_loop(warm, args.at_once)
                before = time.process_time()
                heard = await clients.closed_loop(asks, args.at_once)
                return heard, time.process_time() - before

        heard, spent = asyncio.run(run())
    found = report("ours", [read(each) for each in heard], {})
    if found.errors:
        raise SystemExit(f"errors: {found.errors} {found.examples}")
    return {
        "seconds": found.seconds,
        "output_tokens": found.output_tokens,
        "output_tokens_per_s": found.output_tokens_per_s,
        "ttft_s": found.percentiles_s["ttft"]["p50"],
        "tpot_s": found.percentiles_s["tpot"]["p50"],
        "client_share": spent / found.seconds,
    }


def run_cache(args: argparse.Namespace) -> dict[str, float]:
    """How many sequences fit, and what perplexity becomes of this repository's own pages."""
    from maxstack.models.paged.pools import page_bytes
    from maxstack.serve import SamplingParams

    perplexity, sizes = {}, {}
    docs = Path(__file__).resolve().parent.parent / "docs"
    for kv in ("float32", "int8"):
        engine = engine_of(args, kv)
        text = "\n".join(file.read_text() for file in sorted(docs.glob("*.md")))
        ids = engine.ids(text)[: 512 if args.quick else 8192]
        params = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0)
        parts = [ids[i : i + 512] for i in range(0, len(ids) - 1, 512)]
        outputs = asyncio.run(engine.generate(parts, params))
        told = [each.logprob for output in outputs for each in output.prompt_logprobs if each is not None]
        perplexity[kv] = math.exp(-statistics.fmean(told))
        sizes = {kind: page_bytes(engine.config, engine.limits.page, cast(Any, kind)) for kind in KINDS}
        engine.close()
    return {
        "sequences_of_bfloat16": sizes["bfloat16"] / sizes["int8"],
        "sequences_of_float32": sizes["float32"] / sizes["int8"],
        "perplexity": perplexity["float32"],
        "perplexity_int8": perplexity["int8"],
    }


KINDS = ("float32", "bfloat16", "int8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--weights", default="float32")
    parser.add_argument("--no-prefix-cache", action="store_true")
    parser.add_argument("what", choices=("engine", "server", "cache"))
    parser.add_argument("trace")
    parser.add_argument("at_once")
    parser.add_argument("quick", type=lambda word: word == "1")
    args = parser.parse_args()
    args.at_once = int(args.at_once) if args.at_once.isdigit() else 1
    found = {"engine": run_engine, "server": run_server, "cache": run_cache}[args.what](args)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
