"""Llama-3-8B from scratch (arXiv:2407.21783, table 3) on 128 TPU v5p chips (v5p:4x4x8), 8,192-token rows.

Put the text (JSONL or Parquet, plain or in subfolders) into data/pretrain and a tokenizer of at most 128,256 tokens
into data/tokenizer, or name other places: --data.sources.0.path, --data.tokenizer.path.
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
        attention=AttentionConfig(heads=32, kv_heads=8, head_size=128, rope=RopeConfig(theta=500_000.0)),
        feed_forward=FeedForwardConfig(size=14_336),
        norm=norm,
    )
    return RunConfig(
        model=TransformerConfig(
            vocab_size=128_256,
            width=4096,
            stacks=(StackConfig(pattern=(block,), repeats=32),),
            final_norm=norm,
            tie_embeddings=False,
            max_length=8192,
            remat="attention",
        ),
        data=DataConfig(
            sources=(SourceConfig(name="text", path="data/pretrain"),),
            tokenizer=TokenizerConfig(path="data/tokenizer"),
            seq_len=8192,
            packing="best_fit",
            read_workers=4,
        ),
        out="runs/llama3_8b",
        steps=250_000,  # one trillion tokens
        batch_rows=512,  # 4.2 million tokens, 4 rows a chip
        z_loss=1e-4,
        optim=OptimConfig(
            peak_lr=3e-4,
            schedule=ScheduleConfig(kind="cosine", warmup_steps=2000, final_fraction=0.1),
        ),
        mesh=MeshConfig(fsdp=-1),
        evaluation=EvaluationConfig(every=5000),
        samples=SampleConfig(every=5000, prompts=("", "The capital of France is")),
        checkpoint=CheckpointConfig(save_every=1000, keep_last=3, keep_every=25_000),
    )
