"""A run small enough for a test: a few thousand bytes of text, two layers, byte tokens."""

import random
from pathlib import Path
from typing import Any

from maxstack.checkpoint import CheckpointConfig
from maxstack.data import DataConfig, SourceConfig, TokenizerConfig
from maxstack.models import llama
from maxstack.optim import OptimConfig, ScheduleConfig
from maxstack.sharding import MeshConfig
from maxstack.telemetry import TelemetryConfig
from maxstack.train.run import EvaluationConfig, RunConfig, SampleConfig

WORDS = "the king doth sleep and all his men do wake to keep the night from harm o gentle lord".split()


def write_corpus(folder: Path, documents: int = 24, words: int = 90) -> Path:
    """Text files of random words; the same each time."""
    folder.mkdir(parents=True, exist_ok=True)
    choose = random.Random(0)
    for i in range(documents):
        text = " ".join(choose.choice(WORDS) for _ in range(words))
        (folder / f"{i:02}.txt").write_text(text)
    return folder


def tiny_run(folder: Path, **changes: Any) -> RunConfig:
    """A run of a few steps under `folder`, on one device unless told otherwise."""
    corpus = write_corpus(folder / "corpus")
    base: dict[str, Any] = {
        "model": llama(
            vocab_size=320, width=32, depth=2, heads=4, kv_heads=2, feed_forward=64, max_length=64, dtype="float32"
        ),
        "data": DataConfig(
            sources=(SourceConfig(name="words", path=str(corpus), held_out_fraction=0.2),),
            tokenizer=TokenizerConfig(path="bytes"), seq_len=32, cache=str(folder / "cache"),
        ),
        "out": str(folder / "run"), "steps": 7, "batch_rows": 8,
        "optim": OptimConfig(peak_lr=3e-3, schedule=ScheduleConfig(warmup_steps=2)),
        "mesh": MeshConfig(data=1, fsdp=1, tensor=1),
        "evaluation": EvaluationConfig(every=-1), "samples": SampleConfig(every=-1),
        "checkpoint": CheckpointConfig(save_every=3),
        "telemetry": TelemetryConfig(tensorboard=False, display="off"),
    }  # fmt: skip
    return RunConfig(**{**base, **changes})
