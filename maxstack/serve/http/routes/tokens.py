"""POST /tokenize and /detokenize, GET /tokenizer_info."""

from typing import Any

from fastapi import APIRouter

from maxstack.serve.http.conversation import render
from maxstack.serve.http.errors import refused
from maxstack.serve.http.front import Front
from maxstack.serve.http.schemas.chat import ChatRequest
from maxstack.serve.http.schemas.tokens import DetokenizeRequest, TokenizeRequest

OF_CHAT = (
    "messages", "add_generation_prompt", "continue_final_message", "tools", "chat_template_kwargs", "documents",
)  # fmt: skip


def token_routes(front: Front) -> APIRouter:
    """The routes, for one engine."""
    router = APIRouter(tags=["tokens"])

    @router.post("/tokenize", summary="Text or messages to tokens")
    async def tokenize(asked: TokenizeRequest) -> dict[str, Any]:
        front.adapter(asked.model)
        ids = await tokens_of(front, asked)
        told: dict[str, Any] = {
            "count": len(ids), "max_model_len": front.engine.limits.max_length, "tokens": ids, "token_strs": None,
        }  # fmt: skip
        if asked.return_token_strs:
            told["token_strs"] = [front.spelling.text(token) for token in ids]
        return told

    @router.post("/detokenize", summary="Tokens to text")
    async def detokenize(asked: DetokenizeRequest) -> dict[str, Any]:
        front.adapter(asked.model)
        most = front.engine.config.vocab_size
        if strange := [token for token in asked.tokens if token >= most]:
            raise refused(f"token id {strange[0]}: the model knows 0 to {most - 1}", "tokens")
        return {"prompt": front.tokenizer.decode(asked.tokens, skip_special=bool(asked.skip_special_tokens))}

    @router.get("/tokenizer_info", summary="What the tokenizer is")
    async def info() -> dict[str, Any]:
        own = front.tokenizer
        return {
            "tokenizer_class": type(own).__name__,
            "vocab_size": own.vocab_size,
            "max_model_len": front.engine.limits.max_length,
            "chat_template": front.settings.chat_template or own.chat_template,
            "bos_token": own.special_tokens.get("bos_token"),
            "eos_token": own.special_tokens.get("eos_token"),
            "pad_token": own.special_tokens.get("pad_token"),
            "bos_token_id": own.bos_id,
            "eos_token_id": own.eos_id,
            "stop_token_ids": list(own.stop_ids),
            "added_tokens": sorted(own.added_tokens),
            "fingerprint": own.fingerprint,
        }

    return router


async def tokens_of(front: Front, asked: TokenizeRequest) -> list[int]:
    """The tokens of a text, as completions read it, or of messages, as chat does."""
    if (asked.prompt is None) == (asked.messages is None):
        raise refused("give one of prompt and messages", "prompt", "missing_required_parameter")
    if asked.prompt is not None:
        return (await front.ids_of([asked.prompt], asked.add_special_tokens, asked.parse_special))[0]
    return (await render(front, ChatRequest.model_construct(**{n: getattr(asked, n) for n in OF_CHAT}))).ids
