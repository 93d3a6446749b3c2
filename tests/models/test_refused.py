"""Configurations that cannot work are refused when they are made, with the numbers."""

import dataclasses
from collections.abc import Callable

import pytest

from maxstack.config import UserError
from maxstack.models import (
    AttentionConfig,
    BlockConfig,
    FeedForwardConfig,
    MLAConfig,
    MoEConfig,
    RopeConfig,
    StackConfig,
    llama,
)
from tests.models.tiny import CONFIGS, EXPERTS, GATED, GROUPED, LATENT

MODEL = CONFIGS["grouped"]


def attention(**fields) -> Callable[[], AttentionConfig]:
    return lambda: dataclasses.replace(GROUPED, **fields)


def latent(**fields) -> Callable[[], MLAConfig]:
    return lambda: dataclasses.replace(LATENT, **fields)


def moe(**fields) -> Callable[[], MoEConfig]:
    return lambda: dataclasses.replace(EXPERTS, **fields)


def rope(**fields) -> Callable[[], RopeConfig]:
    return lambda: RopeConfig(**fields)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (attention(heads=6, kv_heads=4), "query heads 6 must be a multiple of kv heads 4"),
        (attention(kv_heads=0), "attention.kv_heads is 0: it must be at least 1"),
        (attention(head_size=0), "attention.head_size is 0"),
        (attention(head_size=7), "rope rotates 7 of 7 dimensions: that must be an even number"),
        (attention(window=0), "attention window is 0 tokens: it must be at least 1, or None"),
        (attention(softcap=0.0), "attention softcap is 0.0: it must be above 0, or None"),
        (attention(head_size=2, rope=RopeConfig(scaling="dynamic")), "rotates 2 of 2 .* even number from 4 on"),
        (latent(rope_size=3), "rope rotates 3 of 3 dimensions"),
        (latent(kv_rank=0), "attention.kv_rank is 0"),
        (latent(q_rank=0), "attention.q_rank is 0"),
        (moe(experts_per_token=5), "moe.experts_per_token is 5: it must be 1 to moe.experts = 4"),
        (moe(experts_per_token=0), "moe.experts_per_token is 0"),
        (moe(size=0), "moe.size is 0"),
        (moe(auxiliary_loss=-0.1), "moe.auxiliary_loss is -0.1: it must be at least 0"),
        (lambda: FeedForwardConfig(size=0), "feed_forward.size is 0"),
        (rope(fraction=0.0), r"rope.fraction is 0.0: it must be in \(0, 1\]"),
        (rope(fraction=1.5), "rope.fraction is 1.5"),
        (rope(factor=0.5), "rope.factor is 0.5: it must be at least 1"),
        (rope(theta=0.0), "rope.theta is 0.0: it must be above 1"),
        (rope(original_length=0), "rope.original_length is 0 tokens"),
        (rope(low_frequency_factor=4.0), "rope.low_frequency_factor is 4.0: .* below its fast counterpart, 4.0"),
        (rope(beta_slow=0.0), "rope.beta_slow is 0.0"),
        (lambda: StackConfig(pattern=(), repeats=2), "stack.pattern has no layers"),
        (lambda: dataclasses.replace(MODEL.stacks[0], repeats=0), "stack.repeats is 0"),
        (lambda: dataclasses.replace(MODEL, stacks=()), "model.stacks has no layers"),
        (lambda: dataclasses.replace(MODEL, vocab_size=0), "model.vocab_size is 0"),
        (lambda: dataclasses.replace(MODEL, logit_softcap=-1.0), "model.logit_softcap is -1.0"),
        (
            lambda: BlockConfig(attention=GROUPED, feed_forward=GATED, pre_norm=False),
            "pre_norm and post_norm are both off",
        ),
        (
            lambda: llama(vocab_size=8, width=30, depth=1, heads=4, kv_heads=2, feed_forward=8),
            "width 30 does not divide by heads 4",
        ),
    ],
)  # fmt: skip
def test_what_cannot_work_is_refused_with_the_numbers(make, words):
    with pytest.raises(UserError, match=words):
        make()
