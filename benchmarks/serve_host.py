"""Host time of a decode step: scheduler, launch and results, with a device that computes nothing.

    python benchmarks/serve_host.py [--rows 32 256] [--steps 200]

Processor time of the thread, so that a busy machine does not count. The null device takes plans and gives tokens at
once, as numpy, so what is timed is Python alone: the plan, the arrays of the launch, the results, the scheduler's
bookkeeping; and apart from those the answers (tokens to text), which run in the callers' thread while the device works.
"""

import argparse
import json
import time
from typing import Any

import jax
import numpy as np

from maxstack.data.tokenizer import byte_tokenizer
from maxstack.kernels import dispatch
from maxstack.models import llama
from maxstack.models.generation import SamplingParams
from maxstack.serve.device import Asked, Device
from maxstack.serve.loop import Loop
from maxstack.serve.news import News
from maxstack.serve.output import Answer
from maxstack.serve.plan import Limits
from maxstack.serve.programs import TOKEN, Told
from maxstack.serve.request import Request
from maxstack.serve.scheduler import Scheduler

LENGTH = 2048
NO_FORM: Any = None


class Numbers(np.ndarray):
    """An array that is on the host already."""

    def copy_to_host_async(self) -> None:
        """Nothing to do."""


def numbers(values: np.ndarray) -> Any:
    return values.view(Numbers)


class NullDevice(Device):
    """Runs nothing: every row says token 65."""

    def _run(self, key, given):
        rows = len(given.rows_b)
        said = Told(
            numbers(np.full(rows, 65, np.int32)), numbers(np.full(rows, TOKEN, np.int32)),
            numbers(np.zeros(rows)), numbers(np.zeros((rows, 20), np.int32)), numbers(np.zeros((rows, 20))),
        )  # fmt: skip
        return said if key[0] == "decode" else (said, None)


def measured(rows: int, steps: int, per_plan: tuple[int, ...]) -> dict[str, float]:
    """Milliseconds a decode step with all rows busy."""
    limits = Limits(
        rows=rows, page=64, pages=rows * LENGTH // 64, max_length=LENGTH, chunks=((8, 32),), steps=per_plan,
        tokens_a_step=rows + 256, waiting=rows,
    )  # fmt: skip
    config = llama(vocab_size=512, width=64, depth=1, heads=1, kv_heads=1, feed_forward=64)
    device = NullDevice(config, NO_FORM, [], limits, "float32")
    answers: dict[str, Answer] = {}
    spent = {"answers": 0.0}
    tokenizer = byte_tokenizer()

    def hear(news: list[News]) -> None:
        begun = time.thread_time()
        for each in news:
            answers[each.id].take(each)
        spent["answers"] += time.thread_time() - begun

    loop = Loop(device, Scheduler(limits), hear)
    params = SamplingParams(max_tokens=LENGTH - 64, temperature=0.0)
    for i in range(rows):
        prompt = tuple(range(65, 95))
        answers[f"{i}"] = Answer(f"{i}", prompt, params, tokenizer, frozenset())
        loop.submit(
            Request(
                id=f"{i}", prompt=prompt, max_tokens=params.max_tokens, arrived=0.0, params=Asked(params, ())
            )
        )
    while any(not answer.output.token_ids for answer in answers.values()):
        loop.turn()
    for _ in range(10):
        loop.turn()
    samples = []
    answering = []
    done = sum(len(answer.output.token_ids) for answer in answers.values())
    for _ in range(steps):
        spent["answers"] = 0.0
        begun = time.thread_time()
        loop.turn()
        samples.append(time.thread_time() - begun - spent["answers"])
        answering.append(spent["answers"])
    each = (sum(len(answer.output.token_ids) for answer in answers.values()) - done) / rows / steps
    return {
        "rows": rows, "steps a plan": each,
        "host ms a step, median": 1e3 * float(np.median(samples)) / each,
        "host ms a step, 99 of 100": 1e3 * float(np.quantile(samples, 0.99)) / each,
        "answers ms a step, median": 1e3 * float(np.median(answering)) / each,
    }  # fmt: skip


def main() -> None:
    """Print one line of JSON a number of rows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[32, 256])
    parser.add_argument("--steps", type=int, default=200)
    args = parser.parse_args()
    print(json.dumps({"chip": dispatch.chip().name, "jax": jax.__version__}))
    for rows in args.rows:
        for per_plan in ((1,), (1, 4)):
            print(json.dumps(measured(rows, args.steps, per_plan)))


if __name__ == "__main__":
    main()
