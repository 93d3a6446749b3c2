"""What a checkpoint costs the training beside it: blocked time, and the slowdown of the steps it overlaps.

    python benchmarks/checkpoint_overhead.py --million-parameters 30

The state is float32 parameters with two Adam moments, the step is a few large matrix products and an update in donated
buffers. Prints one JSON object. Bytes go to the disk of --out, or to that of temporary files.
"""

import argparse
import json
import shutil
import statistics
import tempfile
import time
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp

from maxstack.checkpoint import CheckpointConfig, Checkpoints

WIDTH = 1024


@partial(jax.jit, donate_argnums=0, static_argnums=2)
def train_step(state: dict[str, dict[str, jax.Array]], x: jax.Array, products: int) -> tuple[dict, jax.Array]:
    """A step of about the shape of training: products of matrices, then every buffer is rewritten."""
    for number in range(products):
        x = jnp.tanh(x @ state["params"][f"w{number % len(state['params'])}"])
    change = jnp.mean(x)
    return jax.tree.map(lambda leaf: leaf * 0.999 + change * 1e-6, state), change


def timed_steps(state: dict, x: jax.Array, products: int, count: int) -> tuple[dict, list[float]]:
    seconds = []
    for _ in range(count):
        start = time.perf_counter()
        state, change = train_step(state, x, products)
        jax.block_until_ready((state, change))
        seconds.append(time.perf_counter() - start)
    return state, seconds


def measure(million: float, products: int, rows: int, out: Path) -> dict[str, float]:
    """Seconds with and without a save underway, and the share of a run that saves every 100 steps."""
    layers = max(1, round(million * 1e6 / WIDTH**2))
    weights = {f"w{number}": jnp.full((WIDTH, WIDTH), 1e-3) for number in range(layers)}
    state = {name: jax.tree.map(jnp.copy, weights) for name in ("params", "mu", "nu")}
    x = jnp.ones((rows, WIDTH))
    state, _ = timed_steps(state, x, products, 3)
    blocked, overlapped, alone = [], [], []
    with Checkpoints(out, CheckpointConfig(keep_last=1)) as checkpoints:
        for step in range(4):
            state, seconds = timed_steps(state, x, products, 8)
            alone += seconds
            blocked.append(checkpoints.save(step, state, {}))
            start = time.perf_counter()
            extra = []
            while not checkpoints.idle():
                state, seconds = timed_steps(state, x, products, 1)
                extra += seconds
            overlapped.append(
                (time.perf_counter() - start, sum(extra) - len(extra) * statistics.median(alone))
            )
            checkpoints.wait()
    # The first save imports Orbax and makes its threads.
    step_s, lost_s = statistics.median(alone), statistics.median(extra for _, extra in overlapped[1:])
    return {
        "state_mib": 3 * layers * WIDTH**2 * 4 / 2**20,
        "step_s": step_s,
        "first_blocked_s": blocked[0],
        "blocked_s": statistics.median(blocked[1:]),
        "background_s": statistics.median(whole for whole, _ in overlapped[1:]),
        "lost_to_overlap_s": lost_s,
        "slowdown_of_overlapped_steps": lost_s / statistics.median(whole for whole, _ in overlapped[1:]),
        "cost_of_saving_every_100_steps": (statistics.median(blocked[1:]) + lost_s) / (100 * step_s),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--million-parameters", type=float, default=30)
    parser.add_argument("--products", type=int, default=60, help="matrix products a step")
    parser.add_argument("--rows", type=int, default=1024)
    parser.add_argument("--out", type=Path, help="folder for the checkpoints, removed at the end")
    arguments = parser.parse_args()
    out = arguments.out or Path(tempfile.mkdtemp(prefix="checkpoint_overhead."))
    result = measure(arguments.million_parameters, arguments.products, arguments.rows, out)
    shutil.rmtree(out)
    print(json.dumps({name: round(value, 4) for name, value in result.items()}, indent=1))


if __name__ == "__main__":
    main()
