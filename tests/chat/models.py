"""A model folder that can be talked with: random weights, byte tokens, ChatML."""

import json
from pathlib import Path

import jax

import maxstack
from maxstack.data.tokenizer import Tokenizer, byte_tokenizer
from maxstack.models import llama

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def chat_tokenizer(template: str | None = CHATML) -> Tokenizer:
    """Bytes, and the marks of ChatML as special tokens."""
    definition = json.loads(byte_tokenizer().definition)
    for i, mark in enumerate(("<|im_start|>", "<|im_end|>")):
        token = {"id": 257 + i, "content": mark, "special": True, "normalized": False}
        definition["added_tokens"].append(token | dict.fromkeys(("single_word", "lstrip", "rstrip"), False))
    settings = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}
    return Tokenizer(json.dumps(definition), settings | ({"chat_template": template} if template else {}))


def write_model(folder: Path, *, template: str | None = CHATML, context: int = 4096) -> Path:
    """A folder as transformers has it."""
    config = llama(
        vocab_size=320,
        width=32,
        depth=2,
        heads=4,
        kv_heads=2,
        feed_forward=64,
        max_length=context,
        dtype="float32",
    )
    maxstack.save(config.build(jax.random.key(0)), chat_tokenizer(template), folder)
    return folder
