"""Text written by the model during training."""

import logging
from collections.abc import Iterator

import jax

from maxstack.data.tokenizer import Tokenizer
from maxstack.models import tree
from maxstack.models.generate import prompt_ids
from maxstack.models.generation import Generator, SamplingParams
from maxstack.train.run import RunConfig
from maxstack.train.state import Layout, TrainState

log = logging.getLogger(__name__)

# Larger weights are not brought onto one device for a sample.
LARGEST_SAMPLED_BYTES = 8 << 30


def sample_texts(
    run: RunConfig, plan: Layout, state: TrainState, tokenizer: Tokenizer
) -> Iterator[tuple[str, str]]:
    """(prompt, continuation) for each prompt of the run. Weights are brought onto one device for it."""
    size = sum(leaf.nbytes for leaf in state.params.values())
    if jax.process_count() > 1 or size > LARGEST_SAMPLED_BYTES:
        log.warning(
            "no samples during training with %d processes and %.1f GiB of weights: load a checkpoint for that",
            jax.process_count(), size / 2**30,
        )  # fmt: skip
        return
    # By way of the host: a direct copy would keep the mesh in the arrays' types.
    weights = jax.device_get({**state.params, **state.buffers})
    model = tree.rebuild(plan.model, jax.device_put(weights, jax.local_devices()[0]))
    prompts = [prompt_ids(tokenizer, prompt) for prompt in run.samples.prompts]
    room = model.config.max_length - max(map(len, prompts))
    common = {
        "max_tokens": min(run.samples.max_tokens, room), "temperature": run.samples.temperature,
    }  # fmt: skip
    params = [SamplingParams(seed=(run.seed + i) % 2**32, **common) for i in range(len(prompts))]
    for prompt, completion in zip(
        run.samples.prompts, Generator(model, tokenizer).generate(prompts, params), strict=True
    ):
        yield prompt, completion.text
