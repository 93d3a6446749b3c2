"""The demo's model, larger and trained for about an hour on two cores: `make demo-full`."""

import dataclasses
from pathlib import Path

from maxstack.checkpoint import CheckpointConfig
from maxstack.config import load_run
from maxstack.models import llama
from maxstack.optim import OptimConfig, ScheduleConfig
from maxstack.train.run import EvaluationConfig, RunConfig, SampleConfig


def config() -> RunConfig:
    base = load_run(Path(__file__).with_name("tiny.py"))
    model = llama(
        vocab_size=2048,
        width=256,
        depth=6,
        heads=4,
        kv_heads=2,
        head_size=64,
        feed_forward=704,
        max_length=1024,
    )
    schedule = ScheduleConfig(kind="wsd", warmup_fraction=0.01, decay_fraction=0.5, final_fraction=0.0)
    return dataclasses.replace(
        base,
        model=model,
        out="runs/tiny-full",
        steps=1500,
        optim=OptimConfig(name="muon", peak_lr=0.02, weight_decay=0.1, ema_decay=0.998, schedule=schedule),
        evaluation=EvaluationConfig(every=200, max_bytes=1 << 16, overlap=128),
        samples=SampleConfig(every=400, prompts=("HAMLET.\n",), max_tokens=96),
        checkpoint=CheckpointConfig(save_every=200, keep_last=2),
    )
