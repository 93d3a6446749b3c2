"""What HTTP costs: processor time of the event loop for 1,000 streamed tokens, with a device that computes nothing.

    python benchmarks/serve_http.py [--at-once 32] [--tokens 200] [--step-ms 20] [--route chat] [--profile]

Thread time, so that a busy machine hardly counts. The clients are another process; the device answers each step after a
fixed time, so that tokens come one by one, as from a model. What is counted is everything between the engine's thread
and the socket: tokens to text, events, writing; the same without HTTP is printed beside it.
"""

import argparse
import asyncio
import cProfile
import json
import pstats
import subprocess
import sys
import threading
import time
from collections.abc import Awaitable, Callable
from typing import Any
from unittest import mock

import jax

from maxstack.data.tokenizer import byte_tokenizer
from maxstack.models import llama
from maxstack.models.generation import SamplingParams
from maxstack.serve import AsyncEngine
from maxstack.serve import engine as module
from maxstack.serve.device import Device
from maxstack.serve.http import Settings, create_app, server_config
from maxstack.serve.operate.listen import listening, url_of
from maxstack.serve.operate.operation import Operation
from maxstack.serve.operate.running import Server
from maxstack.serve.plan import Limits
from maxstack.serve.request import Result
from maxstack.serve.results import Found, Launched
from maxstack.serve.run import loop_factory

LETTER = ord("a")
MODEL = "null"
PATHS = {"chat": "/v1/chat/completions", "completions": "/v1/completions", "responses": "/v1/responses"}
LENGTH = 2048


class NullDevice(Device):
    """Every row says "a", one plan a step."""

    step_s = 0.02

    def __init__(self, config: Any, form: Any, weights: Any, limits: Limits, *rest: Any, **options: Any):
        self.config, self.limits, self.weights = config, limits, weights

    def warm_up(self, told: Any = None) -> None:
        """Nothing to compile."""

    def launch(self, plan: Any) -> Launched:
        """Nothing to run."""
        return Launched(plan)

    def results(self, launched: Launched) -> Found:
        """After the time of a step."""
        time.sleep(self.step_s)
        found = Found()
        for chunk in launched.plan.chunks:
            found.results[chunk.row] = Result((LETTER,) if chunk.last else ())
        for decode in launched.plan.decodes:
            found.results[decode.row] = Result((LETTER,) * decode.count)
        return found


def engine_for(at_once: int, step_s: float) -> AsyncEngine:
    """At work, with room for so many."""
    limits = Limits(
        rows=at_once, page=64, pages=at_once * LENGTH // 64, max_length=LENGTH, chunks=((8, 64),), steps=(1,),
        tokens_a_step=at_once + 512, waiting=2 * at_once,
    )  # fmt: skip
    config = llama(vocab_size=257, width=64, depth=1, heads=1, kv_heads=1, feed_forward=64)
    NullDevice.step_s = step_s
    with (
        mock.patch.object(module, "Device", NullDevice),
        mock.patch.object(module, "form_for", return_value=(None, [])),
    ):
        engine = AsyncEngine(config.build(jax.random.key(0)), byte_tokenizer(), limits=limits)
    engine.warm_up()
    return engine


class Loop:
    """An event loop of the server's kind in a thread, whose processor time can be asked for."""

    def __init__(self) -> None:
        self._loop = (loop_factory() or asyncio.new_event_loop)()
        threading.Thread(target=self._loop.run_forever, daemon=True).start()

    def run(self, work: Callable[[], Awaitable[Any]]) -> Any:
        """The result of some work in the loop."""

        async def awaited() -> Any:
            return await work()

        return asyncio.run_coroutine_threadsafe(awaited(), self._loop).result()

    def call(self, function: Callable[[], Any]) -> Any:
        """The result of a call in the loop's thread."""

        async def called() -> Any:
            return function()

        return asyncio.run_coroutine_threadsafe(called(), self._loop).result()


def asked(route: str, tokens: int) -> dict[str, Any]:
    """One request."""
    body: dict[str, Any] = {"model": MODEL, "stream": True, "temperature": 0}
    if route == "chat":
        return body | {"messages": [{"role": "user", "content": "hello"}], "max_tokens": tokens}
    if route == "responses":
        return body | {"input": "hello", "max_output_tokens": tokens}
    return body | {"prompt": "hello", "max_tokens": tokens}


async def clients(url: str, route: str, at_once: int, tokens: int) -> None:
    """So many clients, each with one request; run in a process of its own."""
    host, port = url.removeprefix("http://").split(":")
    data = json.dumps(asked(route, tokens)).encode()

    async def one() -> None:
        reader, writer = await asyncio.open_connection(host, int(port))
        head = f"POST {PATHS[route]} HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
        writer.write(f"{head}Connection: close\r\nContent-Length: {len(data)}\r\n\r\n".encode() + data)
        heard = b""
        while part := await reader.read(65536):
            heard = (heard + part)[-4096:]
        writer.close()
        if b"[DONE]" not in heard and b"response.completed" not in heard and b"incomplete" not in heard:
            raise SystemExit(f"not answered: {heard[-500:]!r}")

    await asyncio.gather(*(one() for _ in range(at_once)))


def over_http(loop: Loop, engine: AsyncEngine, args: argparse.Namespace) -> float:
    """Seconds of the loop's thread while the clients are answered."""
    settings = Settings(model_name=MODEL, chat_template="chatml")
    operation = loop.call(lambda: Operation(MODEL))
    operation.attach(engine)
    operation.phases.finish("")
    app = create_app(engine, settings, operation=operation)
    profile = cProfile.Profile()
    with listening("127.0.0.1", 0) as sock:
        server = Server(server_config(app, settings))
        serving = asyncio.run_coroutine_threadsafe(server.serve([sock]), loop._loop)
        command = [sys.executable, __file__, "--client", url_of(sock), "--route", args.route]
        command += ["--at-once", f"{args.at_once}", "--tokens"]
        subprocess.run([*command, "2"], check=True)  # everything is imported and warm
        if args.profile:
            loop.call(profile.enable)
        begun = loop.call(time.thread_time)
        subprocess.run([*command, f"{args.tokens}"], check=True)
        spent = loop.call(time.thread_time) - begun
        if args.profile:
            loop.call(profile.disable)
            pstats.Stats(profile).sort_stats("tottime").print_stats(40)
        server.should_exit = True
        serving.result()
    return spent


def without(loop: Loop, engine: AsyncEngine, args: argparse.Namespace) -> float:
    """Seconds of the loop's thread for the same streams, read by coroutines of its own."""

    async def one() -> None:
        params = SamplingParams(max_tokens=args.tokens, temperature=0.0)
        async for _ in engine.stream("hello", params):
            pass

    async def all_of_them() -> None:
        await asyncio.gather(*(one() for _ in range(args.at_once)))

    begun = loop.call(time.thread_time)
    loop.run(all_of_them)
    return loop.call(time.thread_time) - begun


def main() -> None:
    """Print one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--at-once", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--step-ms", type=float, default=20.0)
    parser.add_argument("--route", choices=sorted(PATHS), default="chat")
    parser.add_argument(
        "--profile", action="store_true", help="what the time is spent on (which costs time itself)"
    )
    parser.add_argument("--client", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.client is not None:
        asyncio.run(clients(args.client, args.route, args.at_once, args.tokens))
        return
    loop, engine = Loop(), engine_for(args.at_once, args.step_ms / 1e3)
    streamed = args.at_once * args.tokens / 1e3
    alone, spent = without(loop, engine, args), over_http(loop, engine, args)
    engine.close()
    told = {"engine alone": alone, "over HTTP": spent, "HTTP": spent - alone}
    told = {f"{name}, ms for 1,000 tokens": 1e3 * seconds / streamed for name, seconds in told.items()}
    print(json.dumps({"route": args.route, "at once": args.at_once, **told}))


if __name__ == "__main__":
    main()
