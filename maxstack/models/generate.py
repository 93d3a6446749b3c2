"""Prompts of a model's own kind: documents, which start with a start token where the tokenizer has one."""

from maxstack.data.tokenizer import Tokenizer


def prompt_ids(tokenizer: Tokenizer, text: str) -> list[int]:
    """Text as the start of a document: after the start token, unless the tokenizer's settings refuse it. Without text
    there must be one: something has to be read."""
    wanted = not text or tokenizer.settings.get("add_bos_token") is not False
    start = [tokenizer.bos_id] if wanted and tokenizer.bos_id is not None else []
    return [*start, *tokenizer.encode(text)]
