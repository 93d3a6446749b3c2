"""How tokens are chosen and when a row ends: one value a row, turned into arrays so that one program serves all."""

import dataclasses
import math
from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Array, Float, Int, UInt32

from maxstack.config import UserError

MOST_LOGPROBS = 20
"""Alternatives that a step reports at most."""
MOST_BIASES = 300
"""Tokens whose logits one row may shift."""
MOST_ENDS = 16
"""Tokens that end a row, as far as the device knows; the host sees to further ones."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """Names and meanings are those of vLLM and transformers: penalties first, then temperature, top_k, top_p, min_p."""

    max_tokens: int = 128
    """New tokens at most; 0 only reads the prompt, which a server does for its log-probabilities."""
    min_tokens: int = 0
    """No end token, and none of stop_token_ids, before so many new tokens; stop strings are looked for behind them."""
    temperature: float = 0.8
    """Logits are divided by it; 0 takes the likeliest token."""
    top_k: int = 0
    """Only the k likeliest tokens; 0 for all. Tokens as likely as the last of them stay too."""
    top_p: float = 1.0
    """Only the likeliest tokens that make up this probability. Tokens as likely as the last of them stay too."""
    min_p: float = 0.0
    """Only tokens at least this many times as likely as the likeliest."""
    repetition_penalty: float = 1.0
    """Logits of tokens in prompt and output are divided by it where positive, multiplied where negative."""
    presence_penalty: float = 0.0
    """Taken from the logits of tokens that the output has."""
    frequency_penalty: float = 0.0
    """Taken from a token's logit for each time the output has it."""
    seed: int = 0
    """The same seed, prompt and settings give the same tokens, whatever else is in the batch."""
    stop: Sequence[str] = ()
    """Texts that end the row; they and what follows are left out."""
    stop_token_ids: Sequence[int] = ()
    """Tokens that end the row besides the end token; left out."""
    ignore_eos: bool = False
    """Go on past the end token."""
    logprobs: int | None = None
    """Report the log-probability of each token, and of this many likeliest ones (0 to 20); None for neither."""
    prompt_logprobs: int | None = None
    """The same of the prompt's tokens but the first; the Generator leaves it out."""
    logit_bias: Sequence[tuple[int, float]] = ()
    """Added to the logits of these token ids before anything else."""

    def __post_init__(self):
        for name in ("stop", "stop_token_ids", "logit_bias"):
            value = getattr(self, name)
            if isinstance(value, str | bytes):
                raise UserError(f"{name} is {value!r}: give a tuple of them")
            object.__setattr__(self, name, tuple(value))
        for name, (fits, rule) in RULES.items():
            if not fits(getattr(self, name)):  # comparisons with NaN are false
                raise UserError(f"{name} is {getattr(self, name)}: it must be {rule}")

    def ends(self, end_ids: frozenset[int]) -> frozenset[int]:
        """Tokens that end a row, where `end_ids` are those of the tokenizer."""
        return frozenset(self.stop_token_ids) | (frozenset() if self.ignore_eos else end_ids)


# What each setting may be.
RULES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "max_tokens": (lambda n: n >= 0, "0 or more"),
    "min_tokens": (lambda n: n >= 0, "0 or more"),
    "temperature": (lambda t: 0 <= t < math.inf, "0 (likeliest token) or more, and finite"),
    "top_k": (lambda k: 0 <= k < 2**31, "0 (all tokens) or more"),
    "top_p": (lambda p: 0 < p <= 1, "in (0, 1]"),
    "min_p": (lambda p: 0 <= p <= 1, "in [0, 1]"),
    "repetition_penalty": (lambda r: 0 < r < math.inf, "above 0, and finite (1 for none)"),
    "presence_penalty": (math.isfinite, "finite (0 for none)"),
    "frequency_penalty": (math.isfinite, "finite (0 for none)"),
    "seed": (lambda seed: 0 <= seed < 2**32, "0 to 2**32 - 1"),
    "stop": (
        lambda texts: all(isinstance(t, str) and t for t in texts),
        "texts of at least one character each",
    ),
    "logprobs": (lambda n: n is None or 0 <= n <= MOST_LOGPROBS, f"0 to {MOST_LOGPROBS}, or None"),
    "prompt_logprobs": (lambda n: n is None or 0 <= n <= MOST_LOGPROBS, f"0 to {MOST_LOGPROBS}, or None"),
    "logit_bias": (
        lambda pairs: len(pairs) <= MOST_BIASES and not any(math.isnan(bias) for _, bias in pairs),
        f"at most {MOST_BIASES} amounts, none of them NaN",
    ),
}


# On the host, on its way to the device, and there.
Values = Array | np.ndarray


class RowSettings(NamedTuple):
    """The settings of `b` rows, as a compiled program takes them."""

    temperature: Float[Values, "b"]
    top_k: Int[Values, "b"]
    top_p: Float[Values, "b"]
    min_p: Float[Values, "b"]
    repetition_penalty: Float[Values, "b"]
    presence_penalty: Float[Values, "b"]
    frequency_penalty: Float[Values, "b"]
    seed: UInt32[Values, "b"]
    logprobs: Int[Values, "b"]
    """-1 for none."""
    bias_ids: Int[Values, "b m"]
    """The vocabulary's size, which no token has, where there is no bias."""
    bias: Float[Values, "b m"]
    ends: Int[Values, "b e"]
    """Tokens that end the row, `MOST_ENDS` at most; the vocabulary's size where there are fewer."""
    earliest: Int[Values, "b"]
    """The first position at which one of them may stand."""


def row_settings(
    params: Sequence[SamplingParams], vocab_size: int, ends: Sequence[Collection[int]] | None = None,
    prompts: Sequence[int] | None = None,
) -> RowSettings:  # fmt: skip
    """Arrays of each row's settings. `ends` are the tokens that end each row, and `prompts` the lengths of its prompt,
    for min_tokens."""

    def column(name: str, dtype: type) -> np.ndarray:
        return np.asarray([getattr(row, name) for row in params], dtype)

    ids = np.full((len(params), MOST_BIASES), vocab_size, np.int32)
    bias = np.zeros(ids.shape, np.float32)
    for row, of_row in enumerate(params):
        for i, (token, amount) in enumerate(of_row.logit_bias):
            ids[row, i], bias[row, i] = token, amount
    ending = np.full((len(params), MOST_ENDS), vocab_size, np.int32)
    for row, own in enumerate(ends or ()):
        known = sorted(own)[:MOST_ENDS]
        ending[row, : len(known)] = known
    lengths = np.zeros(len(params), np.int32) if prompts is None else np.asarray(prompts, np.int32)
    floats = [name for name in RowSettings._fields[:7] if name != "top_k"]
    return RowSettings(
        **{name: column(name, np.float32) for name in floats},
        top_k=column("top_k", np.int32),
        seed=column("seed", np.uint32),
        logprobs=np.asarray([-1 if row.logprobs is None else row.logprobs for row in params], np.int32),
        bias_ids=ids,
        bias=bias,
        ends=ending,
        earliest=np.asarray(
            [n and length + n for n, length in zip(column("min_tokens", np.int32), lengths)], np.int32
        ),
    )
