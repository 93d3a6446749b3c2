"""The service of maxstack.proto: the same jobs as HTTP's routes, in other clothes."""

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from typing import Any

import maxstack
from maxstack.models.generation.output import TokenLogprobs
from maxstack.serve.engine import Stream
from maxstack.serve.http.counted import finish_of, note_tokens
from maxstack.serve.http.errors import ClientGone, refused
from maxstack.serve.http.front import Front, adapters_of
from maxstack.serve.http.operation import Operation, Seen
from maxstack.serve.http.routes import chat, completions
from maxstack.serve.http.routes.embeddings import embedded
from maxstack.serve.http.said import CallStart, Parser, delta_of
from maxstack.serve.http.schemas.tokens import DetokenizeRequest, TokenizeRequest
from maxstack.serve.http.streams import best, closing, merged, wholes
from maxstack.serve.output import Delta
from maxstack.serve.rpc import maxstack_pb2 as pb
from maxstack.serve.rpc.calls import Failed, code_of, trailing, watched
from maxstack.serve.rpc.translate import calls_of, chat_of, checked, completion_of, embedding_of, logprobs_of

Context = Any  # grpc hands over another class than the one it documents
Job = completions.Completion | chat.Chat


class Service:
    """One engine behind gRPC."""

    def __init__(self, front: Front, operation: Operation | None):
        self._front, self._operation = front, operation

    async def Generate(self, request: pb.GenerateRequest, context: Context) -> pb.GenerateResponse:
        """Continue text or tokens."""

        async def work(seen: Seen) -> pb.GenerateResponse:
            asked = within(completion_of(request, stream=False), context)
            return await self._whole(await completions.ready(self._front, asked, seen), seen)

        return await self._answer("Generate", context, work)

    async def Chat(self, request: pb.ChatRequest, context: Context) -> pb.GenerateResponse:
        """Answer a conversation."""

        async def work(seen: Seen) -> pb.GenerateResponse:
            asked = within(chat_of(request, stream=False), context)
            return await self._whole(await chat.ready(self._front, asked, seen), seen)

        return await self._answer("Chat", context, work)

    async def StreamGenerate(self, request: pb.GenerateRequest, context: Context) -> None:
        """Continue, piece by piece."""

        async def begin(seen: Seen) -> Job:
            asked = within(completion_of(request, stream=True), context)
            return await completions.ready(self._front, asked, seen)

        await self._stream("StreamGenerate", context, begin)

    async def StreamChat(self, request: pb.ChatRequest, context: Context) -> None:
        """Answer, piece by piece."""

        async def begin(seen: Seen) -> Job:
            asked = within(chat_of(request, stream=True), context)
            return await chat.ready(self._front, asked, seen)

        await self._stream("StreamChat", context, begin)

    async def Tokenize(self, request: pb.TokenizeRequest, context: Context) -> pb.TokenizeResponse:
        """Text to tokens."""

        async def work(seen: Seen) -> pb.TokenizeResponse:
            front = self._front
            front.adapter(request.model if request.HasField("model") else None)
            names = ("add_special_tokens", "parse_special")
            given = {name: getattr(request, name) for name in names if request.HasField(name)}
            asked = checked(TokenizeRequest, {"prompt": request.text} | given)
            [ids] = await front.ids_of([request.text], asked.add_special_tokens, asked.parse_special)
            return pb.TokenizeResponse(ids=ids, max_length=front.engine.limits.max_length)

        return await self._answer("Tokenize", context, work)

    async def Detokenize(self, request: pb.DetokenizeRequest, context: Context) -> pb.DetokenizeResponse:
        """Tokens to text."""

        async def work(seen: Seen) -> pb.DetokenizeResponse:
            front = self._front
            asked = checked(DetokenizeRequest, {"tokens": list(request.ids)})
            most = front.engine.config.vocab_size
            if strange := [token for token in asked.tokens if token >= most]:
                raise refused(f"token id {strange[0]}: the model knows 0 to {most - 1}", "ids")
            text = front.tokenizer.decode(asked.tokens, skip_special=request.skip_special_tokens)
            return pb.DetokenizeResponse(text=text)

        return await self._answer("Detokenize", context, work)

    async def Embed(self, request: pb.EmbedRequest, context: Context) -> pb.EmbedResponse:
        """Texts or tokens as vectors."""

        async def work(seen: Seen) -> pb.EmbedResponse:
            asked = within(embedding_of(request), context)
            told = await embedded(self._front, asked, seen)
            vectors = [pb.Vector(values=one["embedding"]) for one in told["data"]]
            return pb.EmbedResponse(model=seen.model, vectors=vectors, prompt_tokens=seen.prompt_tokens)

        return await self._answer("Embed", context, work)

    async def ModelInfo(self, request: pb.ModelInfoRequest, context: Context) -> pb.ModelInfoResponse:
        """What is served."""

        async def work(seen: Seen) -> pb.ModelInfoResponse:
            engine = self._front.engine
            return pb.ModelInfoResponse(
                model=self._front.names[0], adapters=adapters_of(engine), version=maxstack.__version__,
                max_length=engine.limits.max_length, vocab_size=engine.config.vocab_size,
            )  # fmt: skip

        return await self._answer("ModelInfo", context, work)

    async def _answer[T](self, method: str, context: Context, work: Callable[[Seen], Awaitable[T]]) -> T:
        """One answer to one request."""
        try:
            with watched(method, context, self._front.settings, self._operation) as seen:
                return await work(seen)
        except Failed as failed:
            return await refuse(context, failed)

    async def _stream(self, method: str, context: Context, begin: Callable[[Seen], Awaitable[Job]]) -> None:
        """Answers as they come. A reader that takes nothing for long is given up."""
        try:
            with watched(method, context, self._front.settings, self._operation) as seen:
                job = await begin(seen)
                async for piece in self._pieces(job, seen):
                    await send(context, piece, self._front.settings.send_s)
        except Failed as failed:
            await refuse(context, failed)

    async def _whole(self, job: Job, seen: Seen) -> pb.GenerateResponse:
        streams = job.open()
        with closing(self._front.engine, streams):
            outputs = await wholes(streams)
        note_tokens(seen, sum(len(output.token_ids) for output in outputs))
        of_prompt = outputs[0].prompt_logprobs
        outputs = best(outputs, job.asked.answers) if job.asked.tries > job.asked.answers else outputs
        answers = []
        for i, output in enumerate(outputs):
            shown = (output.logprobs or []) if job.wants_logprobs else []
            delta = Delta(output.token_ids, output.text, shown, output.finish_reason)
            answers.append(Writer(job, i, seen).answer(delta, of_prompt if not i else None))
        return pb.GenerateResponse(
            id=job.id, model=job.model, answers=answers, usage=usage_of(job, streams, seen)
        )

    async def _pieces(self, job: Job, seen: Seen) -> AsyncGenerator[pb.GenerateResponse]:
        streams = job.open()
        with closing(self._front.engine, streams):
            writers = [Writer(job, i, seen) for i in range(len(streams))]
            told = False
            async for i, delta in merged(streams):
                note_tokens(seen, len(delta.token_ids))
                if delta.token_ids or delta.text or delta.finish_reason:
                    of_prompt = None if told or i else streams[0].answer.output.prompt_logprobs
                    told |= not i
                    answer = writers[i].answer(delta, of_prompt)
                    yield pb.GenerateResponse(id=job.id, model=job.model, answers=[answer])
            yield pb.GenerateResponse(id=job.id, model=job.model, usage=usage_of(job, streams, seen))


class Writer:
    """One answer, whole or in pieces."""

    def __init__(self, job: Job, index: int, seen: Seen):
        self._job, self._index, self._seen = job, index, seen
        talk = isinstance(job, chat.Chat)
        self._parser: Parser | None = job.parser() if talk else None
        self._thoughts = job.prompt.counter() if talk else None
        self._called = False

    def answer(self, delta: Delta, of_prompt: list[TokenLogprobs | None] | None = None) -> pb.Answer:
        """What a piece of the engine's answer says, and what is known of the prompt."""
        if self._thoughts is not None:
            self._seen.reasoning_tokens += self._thoughts.take(delta.token_ids)
        text, said = delta.text, {}
        if self._parser is not None:
            pieces = [*self._parser.feed(text), *(self._parser.end() if delta.finish_reason else ())]
            self._called |= any(isinstance(piece, CallStart) for piece in pieces)
            said = delta_of(pieces)
            text = said.get("content", "")
        reason = "" if delta.finish_reason is None else finish_of(delta.finish_reason, self._seen)
        return pb.Answer(
            index=self._index, text=text, token_ids=delta.token_ids,
            reasoning_content=said.get("reasoning_content", ""), tool_calls=calls_of(said.get("tool_calls", ())),
            logprobs=logprobs_of(delta.logprobs) if self._job.wants_logprobs else (),
            prompt_logprobs=logprobs_of(of_prompt or ()),
            finish_reason="tool_calls" if self._called and reason == "stop" else reason,
        )  # fmt: skip


async def send(context: Context, piece: pb.GenerateResponse, most_s: float) -> None:
    """Send a piece. Raises ClientGone where nothing is taken for long."""
    try:
        async with asyncio.timeout(most_s):
            await context.write(piece)
    except TimeoutError:
        raise ClientGone from None


def within[T: Any](asked: T, context: Context) -> T:
    """A request that ends when the caller's deadline does."""
    left = context.time_remaining()
    return asked if left is None else asked.model_copy(update={"timeout_s": max(left, 0.001)})


def usage_of(job: Job, streams: Sequence[Stream], seen: Seen) -> pb.Usage:
    """Of one prompt and its answers."""
    seen.cached_tokens = max(stream.answer.output.cached_tokens for stream in streams)
    return pb.Usage(
        prompt_tokens=len(streams[0].answer.output.prompt_token_ids), completion_tokens=seen.completion_tokens,
        cached_tokens=seen.cached_tokens, reasoning_tokens=seen.reasoning_tokens,
    )  # fmt: skip


async def refuse(context: Context, failed: Failed) -> Any:
    """End a call with its error."""
    error = failed.error
    await context.abort(code_of(error), error.detail, trailing(error))
