"""A 3M-parameter model of Shakespeare: minutes on two cores. The model that `make demo` trains."""

from maxstack.checkpoint import CheckpointConfig
from maxstack.data import shakespeare
from maxstack.models import llama
from maxstack.optim import OptimConfig, ScheduleConfig
from maxstack.train.run import EvaluationConfig, RunConfig, SampleConfig


def config() -> RunConfig:
    return RunConfig(
        model=llama(
            vocab_size=2048,
            width=192,
            depth=6,
            heads=6,
            kv_heads=3,
            head_size=32,
            feed_forward=512,
            max_length=1024,
        ),
        data=shakespeare(vocab_size=2048, seq_len=256),
        out="runs/tiny",
        steps=180,
        batch_rows=16,
        optim=OptimConfig(
            name="muon",
            peak_lr=0.02,
            schedule=ScheduleConfig(kind="wsd", warmup_fraction=0.03, decay_fraction=0.4),
        ),
        evaluation=EvaluationConfig(every=45, max_bytes=1 << 16),
        samples=SampleConfig(every=45, prompts=("HAMLET.\n",), max_tokens=96),
        checkpoint=CheckpointConfig(save_every=45, keep_last=2),
    )
