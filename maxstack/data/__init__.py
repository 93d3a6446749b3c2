"""Data: from text files to the packed rows of a training step.

Read in this order: `config` (what the user sets), `formats` (files to documents), `tokenizer`, `prepare` (documents to
a prepared folder, described in `store`), `packing` (documents to rows), `mixture` (which source a row comes from),
`batches` (step to `Batch`, a pure function), `loader` (the same through Grain, read ahead).

Only `loader` imports grain; nothing here needs jax.
"""

from maxstack.data.batch import Batch
from maxstack.data.config import DataConfig, MixtureStage, SourceConfig, TokenizerConfig, shakespeare
from maxstack.data.tokenizer import Tokenizer, load_tokenizer, train_bpe

__all__ = [
    "Batch",
    "DataConfig",
    "MixtureStage",
    "SourceConfig",
    "Tokenizer",
    "TokenizerConfig",
    "load_tokenizer",
    "shakespeare",
    "train_bpe",
]
