"""Log-probabilities in OpenAI's two forms."""

from collections.abc import Sequence
from typing import Any

from maxstack.models.generation.output import TokenLogprobs
from maxstack.serve.http.schemas.sampling import finite
from maxstack.serve.http.spelling import Spelling


def chat_logprobs(found: Sequence[TokenLogprobs], spelling: Spelling) -> dict[str, Any]:
    """Of a chat's answer or a piece of it."""
    return {"content": [_entry(each, spelling) for each in found], "refusal": None}


def _entry(found: TokenLogprobs, spelling: Spelling) -> dict[str, Any]:
    top = [_token(token, value, spelling) for token, value in found.top]
    return {**_token(found.token_id, found.logprob, spelling), "top_logprobs": top}


def _token(token: int, value: float, spelling: Spelling) -> dict[str, Any]:
    spelled = spelling.raw(token)
    return {"token": spelled.decode(errors="replace"), "logprob": finite(value), "bytes": list(spelled)}


def legacy_logprobs(
    tokens: Sequence[int], found: Sequence[TokenLogprobs | None], offsets: list[int], spelling: Spelling
) -> dict[str, Any]:
    """Of a completion: lists with an entry a token. None stands for the first token of a prompt."""
    return {
        "tokens": [spelling.text(token) for token in tokens],
        "token_logprobs": [None if each is None else finite(each.logprob) for each in found],
        "top_logprobs": [None if each is None else _top(each, spelling) for each in found],
        "text_offset": offsets,
    }


def _top(found: TokenLogprobs, spelling: Spelling) -> dict[str, float]:
    top: dict[str, float] = {}
    for token, value in found.top:
        top.setdefault(spelling.text(token), finite(value))  # of tokens that look alike, the likeliest
    return top


def prompt_logprobs(found: Sequence[TokenLogprobs | None], spelling: Spelling) -> list[dict[str, Any] | None]:
    """Of a prompt, as vLLM has them: by token id, the token itself and the likeliest."""
    return [None if each is None else _by_id(each, spelling) for each in found]


def _by_id(found: TokenLogprobs, spelling: Spelling) -> dict[str, Any]:
    pairs = [(found.token_id, found.logprob), *found.top]
    return {
        str(token): {"logprob": finite(value), "decoded_token": spelling.text(token)}
        for token, value in pairs
    }
