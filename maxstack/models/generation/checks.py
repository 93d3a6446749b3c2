"""What is refused before anything is computed."""

from collections.abc import Sequence

from maxstack.config import UserError
from maxstack.models.generation.params import SamplingParams


def check_request(
    prompt: Sequence[int],
    params: SamplingParams,
    vocab: int,
    longest: int,
    *,
    tokenizer: bool,
    least: int = 1,
) -> None:
    """Raise UserError for a request that cannot be served: `longest` tokens with its answer, ids below `vocab`,
    an answer of `least` tokens or more."""
    if params.max_tokens < least:
        raise UserError(f"max_tokens is {params.max_tokens}: it must be at least {least}")
    if not prompt:
        raise UserError(
            "a prompt has no tokens: give it at least one character, or the tokenizer a start token"
        )
    if len(prompt) + params.max_tokens > longest:
        raise UserError(
            f"prompt of {len(prompt)} tokens and max_tokens {params.max_tokens} exceed the model's "
            f"{longest} tokens: shorten the prompt or lower max_tokens"
        )
    if not (min(prompt) >= 0 and max(prompt) < vocab):
        raise UserError(
            f"a prompt has token ids {min(prompt)} to {max(prompt)}: the model knows 0 to {vocab - 1}"
        )
    if strange := [token for token, _ in params.logit_bias if not 0 <= token < vocab]:
        raise UserError(f"logit_bias: token id {strange[0]} is not in 0 to {vocab - 1}")
    if params.min_tokens > params.max_tokens:
        raise UserError(
            f"min_tokens {params.min_tokens} is more than max_tokens {params.max_tokens}: change one of them"
        )
    if params.stop and not tokenizer:
        raise UserError("stop strings need a tokenizer: give the Generator one, or stop_token_ids")
