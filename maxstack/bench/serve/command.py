"""`maxstack bench serve`: load on a server that speaks OpenAI's protocol; times, rates, goodput."""

import argparse
import asyncio
import json
import os
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from maxstack.bench.serve.answers import Answer, read
from maxstack.bench.serve.asks import Ask, drawn, from_trace, write_trace
from maxstack.bench.serve.client import Clients, Heard, Server, first_model
from maxstack.bench.serve.numbers import Report, goal, predicted, report
from maxstack.bench.serve.own import overhead, started
from maxstack.bench.serve.recorded import kept
from maxstack.config import RunError, UserError, write_atomically
from maxstack.serve.load import SHAREGPT_ANSWER, SHAREGPT_PROMPT, Lengths, Load

DONE, FAILED = 0, 1


def parser() -> argparse.ArgumentParser:
    """The verb's arguments."""
    result = argparse.ArgumentParser(prog="maxstack bench serve", description=__doc__)
    add = result.add_argument_group("what is measured").add_argument
    add("--url", help="address of a server, the part before /v1")
    add("--model", help="a model: a server of ours is started for it, and stopped")
    add(
        "--serve-option", nargs="+", default=[], metavar="WORD",
        help="for that server, without the dashes: --serve-option kv-dtype=int8",
    )  # fmt: skip
    add("--name", help="the model's name at the server (default: the first that it offers)")
    add("--chat", action="store_true", help="ask as chat, not as continuation of a text")
    add("--api-key-file", type=Path, help="file with the key (default: OPENAI_API_KEY, where set)")
    add("--plain", action="store_true", help="no field that OpenAI's server does not know (ignore_eos)")
    add(
        "--simulate",
        metavar="CHIP",
        help="do not ask anybody: predict it for this chip and --model, or for a step compiled before (v6e-8b-int8)",
    )
    add = result.add_argument_group("load").add_argument
    add("--requests", type=int, default=200, help="how many (default: 200)")
    add("--at-once", type=int, help="clients that ask again when they are answered (default: 8)")
    add("--rate", type=float, help="requests a second instead, at random times (a Poisson process)")
    add("--trace", type=Path, help="replay this: a line is {arrival, prompt or prompt_tokens, output_tokens}")
    add("--speed", type=float, default=1.0, help="how many times as fast the trace is replayed")
    add("--prompt-tokens", type=int, help="mean length of prompts (default: as in ShareGPT)")
    add("--output-tokens", type=int, help="mean length of answers (default: as in ShareGPT)")
    add("--fixed", action="store_true", help="lengths do not vary")
    add("--shared", type=int, default=0, help="tokens of a system prompt that all share")
    add("--vocabulary", type=int, help="send token ids below this instead of text")
    add("--seed", type=int, default=0, help="of lengths and texts")
    add("--warm-up", type=int, help="requests before those that count (default: as many as are at once)")
    add("--timeout", type=float, default=600.0, help="seconds to wait for the next piece of an answer")
    add = result.add_argument_group("what comes out").add_argument
    add(
        "--goodput",
        nargs="+",
        default=[],
        metavar="KIND:MS",
        help="count requests within ttft:200 tpot:50 e2e:9000",
    )
    add("--json", type=Path, help="file for all numbers")
    add("--picture", type=Path, help="file for a picture (png, svg, pdf)")
    add("--write-trace", type=Path, help="file that the requests are kept in, for --trace")
    return result


def main(argv: Sequence[str]) -> int:
    """Run the verb; returns the exit code."""
    args = parser().parse_args(argv)
    _check(args)
    target = goal(args.goodput)
    if args.simulate:
        _show(_simulated(args, target), [], args)
        return DONE
    asks = asks_of(args)
    if args.write_trace:
        write_trace(args.write_trace, asks)
    console = Console(stderr=True)
    if args.url:
        found, answers = _measured(args, args.url.rstrip("/").removesuffix("/v1"), asks, target, console)
    else:
        options = [f"--{word}" for word in args.serve_option]
        with console.status(f"maxstack serve --model {args.model} …"):
            server = started(args.model, options)
            url = server.__enter__()
        try:
            found, answers = _measured(args, url, asks, target, console)
        finally:
            server.__exit__(None, None, None)
    _show(found, answers, args)
    return FAILED if sum(found.errors.values()) == found.requests else DONE


def _check(args: argparse.Namespace) -> None:
    if args.simulate:
        named = args.simulate in kept()
        if (args.model is not None) == named or args.url or args.trace:
            raise UserError(
                "--simulate wants a chip and --model, or the name of a step compiled before alone; neither --url nor "
                "--trace"
            )
    elif (args.url is None) == (args.model is None):
        raise UserError(
            "give one of --url (a server that runs) and --model (a server of ours is started for it)"
        )
    if sum(given is not None for given in (args.rate, args.at_once, args.trace)) > 1:
        raise UserError("give one of --rate, --at-once and --trace: each says when requests are sent")
    if args.url and not args.url.startswith(("http://", "https://")):
        raise UserError(f"--url {args.url}: an address begins with http:// or https://")
    for name in ("requests", "at_once", "prompt_tokens", "output_tokens", "rate", "speed", "timeout"):
        value = getattr(args, name)
        if value is not None and not 0 < value < 1e9:
            raise UserError(f"--{name.replace('_', '-')} {value}: it must be above 0")
    if args.chat and args.vocabulary:
        raise UserError("--chat --vocabulary: a message is text; leave one of them out")
    if args.vocabulary is not None and args.vocabulary < 16:
        raise UserError(f"--vocabulary {args.vocabulary}: it must be 16 or more")
    if args.shared < 0:
        raise UserError(f"--shared {args.shared}: it must be 0 or more")


def load_of(args: argparse.Namespace) -> Load:
    """The load that the flags describe."""

    def lengths(mean: int | None, usual: Lengths) -> Lengths:
        if mean is None:
            return usual
        return Lengths(mean=mean, sigma=0 if args.fixed else usual.sigma, least=1, most=max(4 * mean, 64))

    return Load(
        requests=args.requests, rate=args.rate, clients=None if args.rate else args.at_once or 8,
        prompt=lengths(args.prompt_tokens, SHAREGPT_PROMPT), answer=lengths(args.output_tokens, SHAREGPT_ANSWER),
        shared=args.shared, seed=args.seed,
    )  # fmt: skip


def asks_of(args: argparse.Namespace) -> list[Ask]:
    """The requests that the flags describe."""
    if args.trace:
        return from_trace(args.trace, speed=args.speed, vocabulary=args.vocabulary)
    return drawn(load_of(args), args.vocabulary)


def _measured(
    args: argparse.Namespace, url: str, asks: Sequence[Ask], target: dict[str, float], console: Console
) -> tuple[Report, list[Answer]]:
    at_once = args.at_once or 8
    key = _key(args.api_key_file)
    server = Server(
        url=url, model=args.name or first_model(url, key), chat=args.chat, key=key, plain=args.plain,
        timeout_s=args.timeout,
    )  # fmt: skip
    with console.status("the client alone …"):
        client = overhead(min(at_once, 64))
    with console.status(f"{len(asks)} requests to {url} …"):
        before, start = time.process_time(), time.perf_counter()
        heard = asyncio.run(_run(server, asks, args, at_once))
        spent, took = time.process_time() - before, time.perf_counter() - start
    answers = [read(each) for each in heard]
    found = report(f"{server.model} at {url}", answers, target)
    found.client = client | {"cpu_share": spent / took}
    return found, answers


async def _run(server: Server, asks: Sequence[Ask], args: argparse.Namespace, at_once: int) -> list[Heard]:
    warm = at_once if args.warm_up is None else args.warm_up
    async with Clients(server) as clients:
        if warm:
            first = [Ask(prompt=ask.prompt, tokens=min(ask.tokens, 8)) for ask in asks[:warm]]
            warmed = await clients.closed_loop(first, at_once)
            if all(each.error is not None for each in warmed):
                raise RunError(f"none of the first requests was answered: {warmed[0].error} {warmed[0].said}")
        if args.rate or args.trace:
            return await clients.timed(asks)
        return await clients.closed_loop(asks, at_once)


def _key(file: Path | None) -> str | None:
    if file is None:
        return os.environ.get("OPENAI_API_KEY")
    try:
        return file.read_text(encoding="utf-8").strip()
    except OSError as error:
        raise UserError(f"--api-key-file {file}: {error.strerror}") from error


def _simulated(args: argparse.Namespace, target: dict[str, float]) -> Report:
    from maxstack.bench.serve.predict import predict

    what = f"{args.model} on {args.simulate}" if args.model else args.simulate
    return predicted(
        f"{what}, predicted by a roofline, not measured",
        predict(args.model, args.simulate, load_of(args), target),
        target,
    )


def _show(found: Report, answers: Sequence[Answer], args: argparse.Namespace) -> None:
    print(found.table())
    if args.json is not None:
        write_atomically(args.json, json.dumps(found.plain(), indent=1).encode())
    if args.picture is not None and answers:
        from maxstack.bench.serve.picture import draw

        draw(args.picture, found, answers)
