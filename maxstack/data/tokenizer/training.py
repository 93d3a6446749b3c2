"""Tokenizers made here: bytes, and byte BPE trained on texts."""

from collections.abc import Iterable

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from maxstack.config import UserError
from maxstack.data.tokenizer.pieces import byte_characters
from maxstack.data.tokenizer.tokenizer import END_OF_TEXT, Tokenizer, well_formed


def byte_tokenizer() -> Tokenizer:
    """One token a byte, its id the byte's value; id 256 begins and ends documents."""
    vocabulary = {char: byte for byte, char in enumerate(byte_characters())}
    inner = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens([END_OF_TEXT])
    return Tokenizer(inner.to_str(), {"bos_token": END_OF_TEXT, "eos_token": END_OF_TEXT})


def train_bpe(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Train a byte BPE: any text can be encoded, the same texts give the same tokenizer.

    Words are split as GPT-2 does, digits one by one. A small corpus can run out of pairs and give fewer tokens.
    """
    if vocab_size < 257:
        raise UserError(f"vocab_size {vocab_size} must be at least 257: 256 bytes and {END_OF_TEXT}")
    inner = tokenizers.Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    inner.train_from_iterator(map(well_formed, texts), trainer)
    return Tokenizer(inner.to_str(), {"bos_token": END_OF_TEXT, "eos_token": END_OF_TEXT})
