"""The service over a real channel: answers, streams, keys, limits, errors, leaving, health, reflection."""

import asyncio
import contextlib
import filecmp
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from maxstack.serve.http.front import Front
from maxstack.serve.http.settings import Settings
from maxstack.serve.operate.operation import Operation
from maxstack.serve.rpc import maxstack_pb2 as pb
from maxstack.serve.rpc import maxstack_pb2_grpc, regenerate
from maxstack.serve.rpc.server import NAME, grpc_served
from tests.serve.operate.pretend import engine

KEY = "k" * 32
TEMPLATE = "{% for m in messages %}{{ m.role }}:{{ m.content }};{% endfor %}"
SETTINGS = Settings(model_name="tiny", chat_template=TEMPLATE)
CODES = grpc.StatusCode


class Served:
    """A server in this event loop, and a stub for it."""

    def __init__(self, channel: grpc.aio.Channel, operation: Operation, engine: Any):
        self.stub, self.channel = maxstack_pb2_grpc.MaxstackStub(channel), channel
        self.operation, self.engine, self.device = operation, engine, engine._loop.device


@contextlib.asynccontextmanager
async def served(settings: Settings = SETTINGS) -> AsyncIterator[Served]:
    with engine() as (made, _):
        operation = Operation("tiny")
        operation.attach(made)
        operation.phases.finish("")
        front = Front(made, settings, operation)
        async with contextlib.AsyncExitStack() as stack:
            port = await stack.enter_async_context(grpc_served(front, settings, operation, "127.0.0.1:0"))
            channel = await stack.enter_async_context(grpc.aio.insecure_channel(f"127.0.0.1:{port}"))
            yield Served(channel, operation, made)


def asked(text: str = "hello", max_tokens: int = 8, **fields: Any) -> pb.GenerateRequest:
    sampling = pb.Sampling(max_tokens=max_tokens, temperature=0, **fields)
    return pb.GenerateRequest(text=text, sampling=sampling)


def run(work: Callable[[], Any]) -> None:
    asyncio.run(asyncio.wait_for(work(), 60))


async def refusal(call: Any) -> tuple[grpc.StatusCode, str, dict[str, str]]:
    """How a call ends that is refused."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    error = caught.value
    return (
        error.code(),
        error.details() or "",
        {str(key): str(value) for key, value in error.trailing_metadata()},
    )


async def settled(here: Served) -> None:
    """Nothing is under way any more, and every page is free."""
    scheduler = here.engine.scheduler
    while not scheduler.idle or here.operation.under_way:
        await asyncio.sleep(0.01)
    assert scheduler.pages.available == here.engine.limits.pages


def test_text_tokens_and_chats_are_answered_whole_and_in_pieces():
    async def work() -> None:
        async with served() as here:
            whole = await here.stub.Generate(asked(n=2))
            assert [answer.text for answer in whole.answers] == ["a" * 8] * 2
            assert (whole.usage.prompt_tokens, whole.usage.completion_tokens) == (6, 16)
            ids = pb.GenerateRequest(token_ids=pb.TokenIds(ids=[1, 2, 3]), sampling=pb.Sampling(max_tokens=2))
            assert (await here.stub.Generate(ids)).answers[0].token_ids == [97, 97]
            pieces = [piece async for piece in here.stub.StreamGenerate(asked())]
            answers = [answer for piece in pieces for answer in piece.answers]
            assert "".join(answer.text for answer in answers) == "a" * 8
            assert [answer.finish_reason for answer in answers][-1] == "length"
            assert pieces[-1].usage.completion_tokens == 8
            chat = pb.ChatRequest(
                messages=[pb.Message(role="user", content="hi")], sampling=pb.Sampling(max_tokens=5)
            )
            assert (await here.stub.Chat(chat)).answers[0].text == "a" * 5
            pieces = [piece async for piece in here.stub.StreamChat(chat)]
            assert "".join(answer.text for piece in pieces for answer in piece.answers) == "a" * 5
            await settled(here)

    run(work)


def test_tokens_and_what_is_served():
    async def work() -> None:
        async with served() as here:
            ids = await here.stub.Tokenize(pb.TokenizeRequest(text="hi", add_special_tokens=False))
            assert (list(ids.ids), ids.max_length) == ([104, 105], 64)
            assert (await here.stub.Detokenize(pb.DetokenizeRequest(ids=ids.ids))).text == "hi"
            info = await here.stub.ModelInfo(pb.ModelInfoRequest())
            assert (info.model, info.max_length, info.vocab_size) == ("tiny", 64, 257)
            code, _, _ = await refusal(here.stub.Detokenize(pb.DetokenizeRequest(ids=[70000])))
            assert code == CODES.INVALID_ARGUMENT

    run(work)


def test_what_http_refuses_is_refused_here_with_a_code_and_the_same_words():
    async def work() -> None:
        async with served() as here:
            generate = here.stub.Generate
            for call, wanted, part in (
                (generate(pb.GenerateRequest()), CODES.INVALID_ARGUMENT, "Missing required parameter"),
                (generate(asked(top_p=0.0)), CODES.INVALID_ARGUMENT, "top_p"),
                (generate(asked(max_tokens=1000)), CODES.INVALID_ARGUMENT, "64"),
                (generate(asked(n=129)), CODES.INVALID_ARGUMENT, "'n'"),
                (generate(asked(stop=["x"] * 17)), CODES.INVALID_ARGUMENT, "'stop'"),
                (generate(pb.GenerateRequest(text="x", model="other")), CODES.NOT_FOUND, "does not exist"),
                (generate(asked(text="x" * 2_100_000)), CODES.RESOURCE_EXHAUSTED, "larger than max"),
            ):  # fmt: skip
                code, details, _ = await refusal(call)
                assert code == wanted, details
                assert part in details
            here.device.fails = RuntimeError("the device is gone")
            code, _, told = await refusal(here.stub.Generate(asked()))
            assert (code, told["maxstack-error-code"]) == (CODES.INTERNAL, "generation_failed")
            here.operation.draining = True
            code, _, told = await refusal(here.stub.Generate(asked()))
            assert (code, told["retry-after"]) == (CODES.UNAVAILABLE, "5")

    run(work)


def test_every_call_but_health_takes_a_key():
    settings = Settings(model_name="tiny", api_keys=(KEY,), chat_template=TEMPLATE)

    async def work() -> None:
        async with served(settings) as here:
            stub = here.stub
            calls = (
                stub.Generate(asked()),
                stub.Tokenize(pb.TokenizeRequest(text="x")),
                reflected(here.channel),
            )
            for call in calls:
                code, details, _ = await refusal(call)
                assert code == CODES.UNAUTHENTICATED, details
            metadata = (("authorization", f"Bearer {KEY}"),)
            assert (await stub.Generate(asked(), metadata=metadata)).answers[0].text == "a" * 8
            health = health_pb2_grpc.HealthStub(here.channel)
            assert (await health.Check(health_pb2.HealthCheckRequest())).status == 1

    run(work)


async def reflected(channel: grpc.aio.Channel, metadata: Any = ()) -> list[str]:
    stub: Any = reflection_pb2_grpc.ServerReflectionStub(channel)
    request = reflection_pb2.ServerReflectionRequest(list_services="")
    call = stub.ServerReflectionInfo(iter([request]), metadata=metadata)
    return [
        service.name for answer in [await call.read()] for service in answer.list_services_response.service
    ]


def test_reflection_names_the_service_and_health_is_what_ready_says():
    async def work() -> None:
        async with served() as here:
            assert NAME == "maxstack.v1.Maxstack"
            assert NAME in await reflected(here.channel)
            health = health_pb2_grpc.HealthStub(here.channel)
            for service in ("", NAME):
                assert (await health.Check(health_pb2.HealthCheckRequest(service=service))).status == 1
            here.operation.draining = True
            assert (await health.Check(health_pb2.HealthCheckRequest())).status == 2
            code, _, _ = await refusal(health.Check(health_pb2.HealthCheckRequest(service="other")))
            assert code == CODES.NOT_FOUND

    run(work)


def test_each_key_has_prefixes_of_its_own():
    settings = Settings(model_name="tiny", api_keys=(KEY, KEY[::-1] + "2"), chat_template=TEMPLATE)

    async def work() -> None:
        async with served(settings) as here:
            cached = []
            for key in (*settings.api_keys, KEY):
                metadata = (("authorization", f"Bearer {key}"),)
                done = await here.stub.Generate(asked("a prompt of several pages", 1), metadata=metadata)
                cached.append(done.usage.cached_tokens > 0)
            assert cached == [False, False, True]

    run(work)


def test_who_leaves_or_runs_out_of_time_frees_its_pages():
    async def work() -> None:
        async with served() as here:
            here.device.takes_s = 0.02
            call = here.stub.StreamGenerate(asked(max_tokens=50))
            await call.read()
            call.cancel()
            await settled(here)
            assert here.engine.scheduler.counters.request_success == {"cancelled": 1}
            code, _, _ = await refusal(here.stub.Generate(asked(max_tokens=50), timeout=0.2))
            assert code == CODES.DEADLINE_EXCEEDED
            await settled(here)
            assert here.engine.scheduler.counters.request_success.get("length") is None

    run(work)


def test_the_generated_files_are_those_of_the_proto(tmp_path):
    pytest.importorskip("grpc_tools")
    assert regenerate.main(tmp_path) == 0
    own = Path(regenerate.__file__).parent
    for name in ("maxstack_pb2.py", "maxstack_pb2.pyi", "maxstack_pb2_grpc.py"):
        assert filecmp.cmp(own / name, tmp_path / "maxstack/serve/rpc" / name, shallow=False), (
            f"{name}: run python -m maxstack.serve.rpc.regenerate"
        )
