"""How long a plan takes on a chip, by its roofline: bytes over bandwidth or products over their rate, the larger."""

from dataclasses import dataclass
from typing import NamedTuple

from maxstack.serve.plan import Plan, places


class Chip(NamedTuple):
    """Published peaks of one chip."""

    flops_a_second: int | float
    """Of bfloat16 products, dense."""
    bytes_a_second: int | float


# cloud.google.com/tpu/docs/{v5e,v5p,v6e,tpu7x} and NVIDIA's datasheets.
CHIPS = {
    "v5e": Chip(197e12, 819e9),
    "v5p": Chip(459e12, 2765e9),
    "v6e": Chip(918e12, 1640e9),
    "v7x": Chip(2307e12, 7380e9),
    "a100": Chip(312e12, 2039e9),  # SXM, 80 GB
    "h100": Chip(989.4e12, 3350e9),
    "h200": Chip(989.4e12, 4800e9),
}


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Seconds of a step. Over several chips: their rates together, and what they exchange in `step_s`."""

    weight_bytes: int | float
    """Read once a step."""
    kv_bytes_a_token: int | float
    flops_a_token: int | float
    """2 × the parameters that a token meets."""
    attention_flops_a_pair: int | float
    """Of one query and one key, in all layers and heads: 4 × layers × heads × head size."""
    bytes_a_second: int | float
    flops_a_second: int | float
    """Rates that are reached, not the peaks."""
    step_s: int | float = 0.0
    """What every step takes besides."""
    bytes_a_token: int | float = 0.0
    """What each token of a step moves besides: its key and value written, its activations and logits."""
    seconds_a_token: int | float = 0.0
    """What it takes besides, to travel between chips."""

    def seconds(self, plan: Plan) -> float:
        """Time of a plan: each of its steps reads the weights, the keys and values of its rows, and no others."""
        total = 0.0
        for step in range(max(plan.steps, 1)):
            lengths = [decode.length + step for decode in plan.decodes if step < decode.count]
            # Guesses are checked with the token before them: its row's keys are read once for all.
            each = 1 + plan.drafts
            tokens, keys, pairs = each * len(plan.decodes), sum(lengths), each * sum(lengths)
            if step == 0 and plan.chunk_shape is not None:
                tokens += places(plan.chunk_shape)
                keys += sum(chunk.end for chunk in plan.chunks)
                pairs += sum(chunk.count * (chunk.start + chunk.end) // 2 for chunk in plan.chunks)
            read = self.weight_bytes + keys * self.kv_bytes_a_token + tokens * self.bytes_a_token
            flops = tokens * self.flops_a_token + pairs * self.attention_flops_a_pair
            total += max(read / self.bytes_a_second, flops / self.flops_a_second)
            total += self.step_s + tokens * self.seconds_a_token
        return total


def transformer(
    chip: Chip, *, parameters: int | float, layers: int, heads: int, kv_heads: int, head_size: int,
    active: int | float = 0.0,
    weight_bytes: int | float = 2.0, kv_bytes: int | float = 2.0, chips: int = 1, of_bandwidth: int | float = 0.8,
    of_products: int | float = 0.5, step_s: int | float = 0.0,
) -> Cost:  # fmt: skip
    """The cost of a transformer, from its sizes and the shares of the peaks that are expected to be reached.

    `active` parameters meet each token, all of them unless given; `weight_bytes` and `kv_bytes` are per number.
    """
    return Cost(
        weight_bytes=parameters * weight_bytes,
        kv_bytes_a_token=2 * layers * kv_heads * head_size * kv_bytes,
        flops_a_token=2 * (active or parameters),
        attention_flops_a_pair=4 * layers * heads * head_size,
        bytes_a_second=chip.bytes_a_second * chips * of_bandwidth,
        flops_a_second=chip.flops_a_second * chips * of_products,
        step_s=step_s,
    )
