"""InternLM2-7B from scratch (arXiv:2403.17297) on 16 TPU v5e chips (v5e:4x4, 16 GiB each), 4,096-token rows.

A step takes 14 GiB a chip as the compiler counts (docs/benchmarks.md).

Put the text (WanJuan-style JSONL: `id`, `content`) into data/pretrain and a tokenizer of at most 92,544 tokens into
data/tokenizer, or name other places: --data.sources.0.path, --data.tokenizer.path.
"""

from maxstack.checkpoint import CheckpointConfig
from maxstack.data import DataConfig, SourceConfig, TokenizerConfig
from maxstack.models import (
    AttentionConfig,
    BlockConfig,
    FeedForwardConfig,
    RMSNormConfig,
    RopeConfig,
    StackConfig,
    TransformerConfig,
)
from maxstack.optim import OptimConfig, ScheduleConfig
from maxstack.sharding import MeshConfig
from maxstack.train.run import EvaluationConfig, RunConfig, SampleConfig


def config():
    norm = RMSNormConfig(eps=1e-5)
    block = BlockConfig(
        attention=AttentionConfig(heads=32, kv_heads=8, head_size=128, rope=RopeConfig(theta=1_000_000.0)),
        feed_forward=FeedForwardConfig(size=14_336),
        norm=norm,
    )
    return RunConfig(
        model=TransformerConfig(
            vocab_size=92_544,
            width=4096,
            stacks=(StackConfig(pattern=(block,), repeats=32),),
            final_norm=norm,
            tie_embeddings=False,
            max_length=32_768,
            remat="full",
        ),
        data=DataConfig(
            sources=(SourceConfig(name="text", path="data/pretrain"),),
            tokenizer=TokenizerConfig(path="data/tokenizer"),
            seq_len=4096,
            packing="best_fit",
            read_workers=4,
        ),
        out="runs/internlm2_7b",
        steps=25_000,  # one hundred billion tokens
        batch_rows=1024,  # 4.2 million tokens
        micro_batches=64,  # one row a chip at a time
        z_loss=1e-4,
        optim=OptimConfig(
            peak_lr=3e-4,
            schedule=ScheduleConfig(kind="cosine", warmup_steps=1000, final_fraction=0.1),
        ),
        mesh=MeshConfig(fsdp=-1),
        evaluation=EvaluationConfig(every=500),
        samples=SampleConfig(every=500, prompts=("", "The capital of France is")),
        checkpoint=CheckpointConfig(save_every=100, keep_last=3, keep_every=2500),
    )
