"""Sampling from a model: one compiled prefill a prompt length bucket, one compiled step for all settings."""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from maxstack.config import UserError
from maxstack.data.tokenizer import Tokenizer
from maxstack.models.decode import DecodeCache, decode, init_cache
from maxstack.models.transformer import Transformer

SMALLEST_BUCKET = 16


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerateConfig:
    """How tokens are chosen, and when to stop."""

    max_tokens: int = 128
    """New tokens at most."""
    temperature: float = 0.8
    """Logits are divided by it; 0 takes the likeliest token."""
    top_k: int = 0
    """Only the k likeliest tokens; 0 for all."""
    top_p: float = 1.0
    """Only the likeliest tokens that make up this probability."""
    seed: int = 0
    """The same seed, prompt and settings give the same tokens."""

    def __post_init__(self):
        if self.max_tokens < 1:
            raise UserError(f"max_tokens is {self.max_tokens}: it must be at least 1")
        if not 0 <= self.temperature < math.inf:  # refuses NaN too
            raise UserError(
                f"temperature is {self.temperature}: it must be 0 (likeliest token) or more, and finite"
            )
        if not 0.0 < self.top_p <= 1.0:
            raise UserError(f"top_p is {self.top_p}: it must be in (0, 1]")
        if self.top_k < 0:
            raise UserError(f"top_k is {self.top_k}: it must be 0 (all tokens) or more")
        if not 0 <= self.seed < 2**32:
            raise UserError(f"seed is {self.seed}: it must be 0 to 2**32 - 1")


def choose(
    logits_bv: Float[Array, "b v"], key: Array, positions_b: Int[Array, "b"], temperature: Array, top_k: Array,
    top_p: Array,
) -> Int[Array, "b"]:  # fmt: skip
    """A token per row. A row's draw depends on the key, its row and its position alone."""
    vocab = logits_bv.shape[-1]
    ordered = jnp.sort(logits_bv / jnp.maximum(temperature, 1e-6), axis=-1)[:, ::-1]
    kth = ordered[:, jnp.clip(top_k, 1, vocab) - 1]
    floor = jnp.where(top_k > 0, kth, -jnp.inf)
    probabilities = jax.nn.softmax(ordered, -1)
    before = jnp.cumsum(probabilities, -1) - probabilities
    nucleus = jnp.min(jnp.where(before < top_p, ordered, jnp.inf), -1)
    scaled = logits_bv / jnp.maximum(temperature, 1e-6)
    kept = jnp.where(scaled >= jnp.maximum(floor, nucleus)[:, None], scaled, -jnp.inf)
    keys = jax.vmap(lambda row, at: jax.random.fold_in(jax.random.fold_in(key, row), at))(
        jnp.arange(logits_bv.shape[0]), positions_b
    )
    drawn = jax.vmap(jax.random.categorical)(keys, kept)
    return jnp.where(temperature == 0, jnp.argmax(logits_bv, -1), drawn).astype(jnp.int32)


@partial(jax.jit, donate_argnums=2)
def advance(
    model: Transformer, tokens_bt: Int[Array, "b t"], cache: DecodeCache, counts_b: Int[Array, "b"], key: Array,
    settings: tuple[Array, Array, Array],
) -> tuple[Int[Array, "b"], DecodeCache]:  # fmt: skip
    """Read tokens and choose the next one of each row."""
    logits, cache = decode(model, tokens_bt, cache, counts_b)
    return choose(logits, key, cache.lengths_b, *settings), cache


def prompt_ids(tokenizer: Tokenizer, text: str) -> list[int]:
    """Text as the start of a document."""
    start = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    return [*start, *tokenizer.encode(text)]


def stop_ids(tokenizer: Tokenizer) -> frozenset[int]:
    """The tokens that end a document."""
    return frozenset() if tokenizer.eos_id is None else frozenset({tokenizer.eos_id})


def bucket(length: int) -> int:
    """The next power of two, so that few prompt lengths are compiled."""
    return max(SMALLEST_BUCKET, 1 << (length - 1).bit_length())


def generate(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    config: GenerateConfig,
    stop: frozenset[int] = frozenset(),
) -> Iterator[list[int | None]]:
    """One new token id per prompt at a time; None for a prompt that has stopped (a stop id is not given).

    Raises UserError, before the first token is asked for, for an empty prompt or one that with its answer exceeds the
    model's longest sequence.
    """
    lengths = [len(prompt) for prompt in prompts]
    if min(lengths, default=0) < 1:
        raise UserError(
            "a prompt has no tokens: give it at least one character, or the tokenizer a start token"
        )
    if max(lengths) + config.max_tokens > model.config.max_length:
        raise UserError(
            f"prompt of {max(lengths)} tokens and max_tokens {config.max_tokens} exceed the model's "
            f"{model.config.max_length} tokens: shorten the prompt or lower max_tokens"
        )
    return _tokens(model, prompts, config, stop)


def _tokens(
    model: Transformer, prompts: Sequence[Sequence[int]], config: GenerateConfig, stop: frozenset[int]
) -> Iterator[list[int | None]]:
    lengths = [len(prompt) for prompt in prompts]
    room = bucket(max(lengths)) + config.max_tokens
    padded = np.zeros((len(prompts), bucket(max(lengths))), np.int32)
    for row, prompt in enumerate(prompts):
        padded[row, : len(prompt)] = prompt
    cache = init_cache(model.config, len(prompts), bucket(room))
    settings = tuple(jnp.asarray(v) for v in (config.temperature, config.top_k, config.top_p))
    key = jax.random.key(config.seed)
    tokens, cache = advance(model, jnp.asarray(padded), cache, jnp.asarray(lengths, jnp.int32), key, settings)
    ones, alive = jnp.ones(len(prompts), jnp.int32), [True] * len(prompts)
    for _ in range(config.max_tokens):
        upcoming, cache = advance(model, tokens[:, None], cache, ones, key, settings)
        chosen = np.asarray(tokens).tolist()
        alive = [live and token not in stop for live, token in zip(alive, chosen, strict=True)]
        if not any(alive):
            return
        yield [token if live else None for live, token in zip(alive, chosen, strict=True)]
        tokens = upcoming
