"""What the loop costs the host a step, beyond the step itself: the whole loop beside its bare compiled step.

    python benchmarks/step_overhead.py

Both run the same compiled step of a model so small that the devices are done at once, with as many arrays in its state
as a large model has (layers are stacked). The bare side calls it on one batch and reads the metrics of the step
before, the loop side is `maxstack train` itself: data, batch to the devices, metrics row, display, signals. They take
turns in one process. The difference in wall time is an upper bound: with devices that have work, the thread that reads
data is done long before the loop asks, and here it holds the interpreter at the same time. The difference in processor
time of the training thread is what the loop itself does.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


def tiny_run(folder: Path, steps: int) -> Any:
    """A run whose device work is next to nothing."""
    from maxstack.checkpoint import CheckpointConfig
    from maxstack.data import DataConfig, SourceConfig, TokenizerConfig
    from maxstack.models import llama
    from maxstack.telemetry import TelemetryConfig
    from maxstack.train.run import EvaluationConfig, RunConfig, SampleConfig
    from maxstack.train.step import SafetyConfig

    (folder / "text.txt").write_text("to be or not to be that is the question " * 2000)
    return RunConfig(
        model=llama(vocab_size=320, width=16, depth=2, heads=1, kv_heads=1, feed_forward=16, max_length=16),
        data=DataConfig(
            sources=(SourceConfig(name="text", path=str(folder / "text.txt"), split_documents_bytes=256),),
            tokenizer=TokenizerConfig(path="bytes"), seq_len=16, cache=str(folder / "cache"),
        ),
        out=str(folder / "run"), steps=steps, batch_rows=1, safety=SafetyConfig(spike_factor=0.0),
        evaluation=EvaluationConfig(every=-1), samples=SampleConfig(every=-1),
        checkpoint=CheckpointConfig(save_every=0), telemetry=TelemetryConfig(display="off"),
    )  # fmt: skip


def clocks() -> tuple[float, float]:
    """Wall time, and processor time of this thread (seconds)."""
    return time.perf_counter(), time.thread_time()


def since(start: tuple[float, float], steps: int) -> tuple[float, float]:
    """Milliseconds a step on both clocks."""
    wall, thread = (1e3 * (now - then) / steps for now, then in zip(clocks(), start, strict=True))
    return wall, thread


def bare(session: Any, batch: Any, steps: int) -> tuple[float, float]:
    """Milliseconds a step: the compiled step, and the metrics of the one before read."""
    import jax

    state, before = session.state, None
    start = clocks()
    for _ in range(steps):
        state, metrics = session._advance(state, batch)
        for value in metrics.values():
            value.copy_to_host_async()
        if before is not None:
            {name: float(value) for name, value in before.items()}
        before = metrics
    jax.block_until_ready(state)
    session.state = state
    return since(start, steps)


def looped(session: Any, steps: int) -> tuple[float, float]:
    """Milliseconds a step of the loop, without evaluation, samples and saves."""
    import jax

    start = clocks()
    for _, batch in zip(range(steps), session.batches(), strict=False):
        session.advance(batch)
        for every in (session.run.evaluation.every, session.run.samples.every):
            session.due(every)
    jax.block_until_ready(session.state)
    return since(start, steps)


def measure(rounds: int, steps: int) -> dict[str, list[tuple[float, float]]]:
    """(wall, thread) milliseconds a step of each side, round by round."""
    import jax

    from maxstack.train.session import Session

    found: dict[str, list[tuple[float, float]]] = {"bare": [], "loop": []}
    with tempfile.TemporaryDirectory() as scratch:
        run = tiny_run(Path(scratch), (rounds + 1) * (steps + 1) + 10)
        with Session(run, jax.devices()[:1]) as session:
            batch = next(session.batches())
            for round_ in range(rounds + 1):
                pair = bare(session, batch, steps), looped(session, steps)
                if round_:  # the first one warms up
                    for name, took in zip(found, pair, strict=True):
                        found[name].append(took)
    return found


def main() -> None:
    """Run the script."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=300, help="steps a round")
    parser.add_argument("--json", default="", help="file for all figures")
    args = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    found = measure(args.rounds, args.steps)
    for index, clock in enumerate(("wall", "training thread")):
        sides = {name: [took[index] for took in each] for name, each in found.items()}
        beyond = [loop - step for step, loop in zip(sides["bare"], sides["loop"], strict=True)]
        print(
            f"{clock}: bare step {statistics.median(sides['bare']):.2f} ms, beyond it in the loop "
            f"{statistics.median(beyond):.2f} ms ({min(beyond):.2f} to {max(beyond):.2f})"
        )
    if args.json:
        Path(args.json).write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
