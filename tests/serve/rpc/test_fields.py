"""The fields of messages: each means what it means over HTTP, and an engine's numbers come through."""

import json
from typing import Any

import grpc
import pytest

from maxstack.serve.http.front import Front
from maxstack.serve.http.settings import Settings
from maxstack.serve.operate.operation import Operation
from maxstack.serve.plan import Limits
from maxstack.serve.rpc import maxstack_pb2 as pb
from maxstack.serve.rpc import maxstack_pb2_grpc
from maxstack.serve.rpc.server import grpc_served
from tests.serve.http.serving import SETTINGS as BY_HTTP
from tests.serve.http.serving import tiny_engine
from tests.serve.rpc.test_service import CODES, TEMPLATE, asked, refusal, run, served

ONE = pb.Sampling(max_tokens=1)
SMALL = Limits(
    rows=1, page=8, pages=64, max_length=256, chunks=((1, 32),), steps=(1,), tokens_a_step=40, waiting=8
)  # fmt: skip


def test_fields_mean_what_they_mean_over_http():
    """Special tokens by name, log-probabilities of the prompt, vectors, adapters and forms that cannot be."""

    async def work() -> None:
        async with served() as here:
            stub, end = here.stub, "<|endoftext|>"
            for changes, count in (({}, 1), ({"parse_special": False}, len(end) + 1)):
                plain = pb.TokenizeRequest(text=end, **changes)
                assert len((await stub.Tokenize(plain)).ids) == count
                done = await stub.Generate(pb.GenerateRequest(text=end, sampling=ONE, **changes))
                assert done.usage.prompt_tokens == count
            bare = pb.GenerateRequest(text="hi", sampling=ONE, add_special_tokens=False)
            assert (await stub.Generate(bare)).usage.prompt_tokens == 2
            for call, param in (
                (stub.Generate(pb.GenerateRequest(text="x", prompt_logprobs=21)), "prompt_logprobs"),
                (stub.Chat(chat_of(reasoning_effort="wild")), "reasoning_effort"),
                (stub.Chat(chat_of(add_generation_prompt=True, continue_final_message=True)), "choose one"),
                (stub.Chat(chat_of(tool_choice="required")), "tool_choice"),
                (stub.Embed(pb.EmbedRequest()), "texts"),
                (stub.Embed(pb.EmbedRequest(texts=["x"], pooling="most")), "pooling"),
                (stub.Generate(asked(structured_outputs=pb.StructuredOutputs(regex="(("))), "regex"),
            ):  # fmt: skip
                code, details, _ = await refusal(call)
                assert (code, param in details) == (CODES.INVALID_ARGUMENT, True), details
            code, _, _ = await refusal(stub.Embed(pb.EmbedRequest(texts=["x"], model="other")))
            assert code == CODES.NOT_FOUND

    run(work)


def chat_of(**fields: Any) -> pb.ChatRequest:
    return pb.ChatRequest(messages=[pb.Message(role="user", content="hi")], sampling=ONE, **fields)


def test_thoughts_are_told_apart_and_counted():
    template = TEMPLATE + "a:<think>{# </think> #}"
    settings = Settings(model_name="tiny", chat_template=template)

    async def work() -> None:
        async with served(settings) as here:
            done = await here.stub.Chat(chat_of())
            assert (done.answers[0].reasoning_content, done.answers[0].text) == ("a", "")
            assert done.usage.reasoning_tokens == 1
            *_, last = [piece async for piece in here.stub.StreamChat(chat_of())]
            assert last.usage.reasoning_tokens == 1

    run(work)


def test_an_engine_s_numbers_come_through():
    """Log-probabilities of prompt and answer, vectors, and calls in a form, of an engine that computes."""

    async def work() -> None:
        engine = tiny_engine(limits=SMALL, buckets=(1,))
        operation = Operation("tiny")
        operation.attach(engine)
        operation.phases.finish("")
        front = Front(engine, BY_HTTP, operation)
        try:
            async with (
                grpc_served(front, BY_HTTP, operation, "127.0.0.1:0") as port,
                grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel,
            ):
                await numbers(maxstack_pb2_grpc.MaxstackStub(channel), engine)
        finally:
            engine.close()

    run(work)


async def numbers(stub: Any, engine: Any) -> None:
    scored = pb.GenerateRequest(
        text="hello", prompt_logprobs=1, logprobs=2, add_special_tokens=False, sampling=pb.Sampling(max_tokens=2)
    )  # fmt: skip
    wanted = (await engine.score(list(b"hello"), 1)).prompt_logprobs[1:]
    whole = (await stub.Generate(scored)).answers[0]
    pieces = [answer async for piece in stub.StreamGenerate(scored) for answer in piece.answers]
    for found in (whole.prompt_logprobs, pieces[0].prompt_logprobs):
        assert [one.token_id for one in found] == list(b"ello")
        assert [one.logprob for one in found] == pytest.approx([one.logprob for one in wanted], abs=1e-5)
    assert [len(one.top) for one in whole.logprobs] == [2, 2]
    assert not any(piece.prompt_logprobs for piece in pieces[1:])
    vectors = (await stub.Embed(pb.EmbedRequest(texts=["one", "two"], pooling="last"))).vectors
    assert [sum(x * x for x in vector.values) for vector in vectors] == pytest.approx([1, 1], abs=1e-3)
    tool = pb.Tool(name="lamp")
    tool.parameters.update({"type": "object", "properties": {"on": {"type": "boolean"}}, "required": ["on"],
                            "additionalProperties": False})  # fmt: skip
    called = pb.ChatRequest(
        messages=[pb.Message(role="user", content="hi")], tools=[tool], tool_choice="lamp",
        sampling=pb.Sampling(max_tokens=120, seed=5), parallel_tool_calls=False,
    )  # fmt: skip
    [call] = (await stub.Chat(called)).answers[0].tool_calls
    assert isinstance(json.loads(call.arguments)["on"], bool)
