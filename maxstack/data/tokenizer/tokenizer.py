"""Text to token ids and back, around the text of a tokenizer.json."""

import functools
import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers

from maxstack.config import UserError, write_atomically
from maxstack.data.tokenizer.files import CONFIG_FILE, MODEL_CONFIG_FILES, TOKENIZER_FILE, write_files
from maxstack.data.tokenizer.pieces import Assembly, has_byte_fallback
from maxstack.data.tokenizer.settings import chat_template, content, named_tokens

END_OF_TEXT = "<|endoftext|>"
# Looked for in this order when a tokenizer comes without a config that names its specials.
_BOS_NAMES = (END_OF_TEXT, "<s>", "<|begin_of_text|>", "<bos>")
_EOS_NAMES = (END_OF_TEXT, "</s>", "<|end_of_text|>", "<eos>")


class Tokenizer:
    """A tokenizer definition with its special ids and chat template. A value: nothing changes after it is built.

    Text is plain text: the characters of a special token, "<|endoftext|>" say, are encoded as those characters unless
    `special=True`. Tokens that a model's makers added without calling them special (Qwen's "<think>", Gemma's runs of
    newlines) are words of its vocabulary, and are found in any text; `added_tokens` tells which is which.
    """

    def __init__(self, definition: str, settings: dict[str, Any] | None = None, stop_ids: Sequence[int] = ()):
        """`definition` is the text of a tokenizer.json, `settings` the content of a tokenizer_config.json.

        `stop_ids` are ids beside `eos_id` that end a generation, from a model's generation_config.json.
        """
        self.definition = definition
        self.settings = dict(settings or {})
        self.inner = tokenizers.Tokenizer.from_str(self.definition)
        """The library's object, for this package; set so that it finds no special token in text."""
        self.inner.encode_special_tokens = True
        self.inner.no_padding()
        self.inner.no_truncation()
        vocabulary = self.inner.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocabulary.values()) + 1
        """Largest id + 1: the least number of rows an embedding table needs."""
        self.bos_id: int | None = self._special("bos_token", _BOS_NAMES)
        self.eos_id: int | None = self._special("eos_token", _EOS_NAMES)
        # A pad or unknown token that the vocabulary lacks is none: no row of the embedding is its.
        self.pad_id: int | None = self._known("pad_token")
        self.unk_id: int | None = self._known("unk_token")
        given = (self.eos_id, *stop_ids)
        self.stop_ids: tuple[int, ...] = tuple(dict.fromkeys(one for one in given if one is not None))
        """All ids that end a generation, `eos_id` first."""
        self.special_tokens: dict[str, str] = self._named()
        """Texts by name ("bos_token", "eos_token", …), as chat templates use them."""
        self.chat_template: str | dict[str, str] | None = chat_template(self.settings)
        """Text of a jinja template; by name where a model has several ("default" is the usual one)."""
        added = self.inner.get_added_tokens_decoder()
        self.added_tokens: dict[str, bool] = {token.content: token.special for token in added.values()}
        """Tokens that are found in text before it is cut into words, and whether each is special."""
        self.special_ids: frozenset[int] = frozenset(i for i, token in added.items() if token.special)
        self._byte_fallback = has_byte_fallback(self.inner)

    @functools.cached_property
    def fingerprint(self) -> str:
        """Equal exactly when ids mean the same: sha256 of the definition and the begin and end ids."""
        meaning = [json.loads(self.definition), self.bos_id, self.eos_id]
        text = json.dumps(meaning, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()

    def _special(self, key: str, names: Sequence[str]) -> int | None:
        if key in self.settings:
            token = content(self.settings[key])
            if token is None:
                return None
            found = self.inner.token_to_id(token)
            if found is None:
                raise UserError(f"{CONFIG_FILE} names {key} {token!r}, which is not in {TOKENIZER_FILE}")
            return found
        known = (self.inner.token_to_id(name) for name in names)
        return next((token_id for token_id in known if token_id is not None), None)

    def _known(self, key: str) -> int | None:
        token = content(self.settings.get(key))
        return None if token is None else self.inner.token_to_id(token)

    def _named(self) -> dict[str, str]:
        ids = {"bos_token": self.bos_id, "eos_token": self.eos_id}
        found = {
            key: token for key, i in ids.items() if i is not None and (token := self.token(i)) is not None
        }
        return {**named_tokens(self.settings), **found}

    @functools.cached_property
    def _with_specials(self) -> tokenizers.Tokenizer:
        """One that finds special tokens in text; it has the same vocabulary in memory where that can be had."""
        ours, added = self.inner, self.inner.get_added_tokens_decoder()
        other = tokenizers.Tokenizer(ours.model)
        for part in ("normalizer", "pre_tokenizer", "decoder"):
            if getattr(ours, part) is not None:
                setattr(other, part, getattr(ours, part))
        other.add_tokens([added[token_id] for token_id in sorted(added)])
        if other.get_added_tokens_decoder() != added:  # ids with gaps
            other = tokenizers.Tokenizer.from_str(self.definition)
            other.no_padding()
            other.no_truncation()
        other.encode_special_tokens = False
        return other

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        """Ids of the text, none added. `special`: the texts of special tokens in it become those tokens."""
        inner = self._with_specials if special else self.inner
        return inner.encode(well_formed(text), add_special_tokens=False).ids

    def encode_spans(self, text: str, *, special: bool = False) -> tuple[list[int], list[tuple[int, int]]]:
        """Ids as `encode` gives them, and the span of characters of the text that each stands for.

        Spans follow each other without gaps but where the tokenizer drops characters; the pieces of one character all
        have its span. The text must be well formed.
        """
        inner = self._with_specials if special else self.inner
        encoding = inner.encode(text, add_special_tokens=False)
        spans, last = [], 0
        for begin, end in encoding.offsets:  # which may leave out the blank that a token begins with
            spans.append((min(begin, last), max(end, last)))
            last = max(end, last)
        return encoding.ids, spans

    def encode_batch(self, texts: Sequence[str], *, special: bool = False) -> list[list[int]]:
        """Ids of each text as `encode` gives them; runs on the tokenizer's own threads."""
        inner = self._with_specials if special else self.inner
        fixed = [well_formed(text) for text in texts]
        return [e.ids for e in inner.encode_batch_fast(fixed, add_special_tokens=False)]

    def decode(self, ids: Sequence[int] | np.ndarray, *, skip_special: bool = True) -> str:
        """Text of the ids; bytes that are not UTF-8, such as half a character at the end, become U+FFFD."""
        numbers = [int(token_id) for token_id in ids]
        text = self.inner.decode(numbers, skip_special_tokens=skip_special)
        if self._byte_fallback and "\ufffd" in text:
            # `tokenizers` gives up a whole run of bytes for one bad byte, where sentencepiece keeps what is good.
            assembly = Assembly(self.inner)
            kept = (i for i in numbers if not (skip_special and i in self.special_ids))
            parts = [assembly.add(token) for i in kept if (token := self.token(i)) is not None]
            return "".join(parts) + assembly.end()
        return text

    def token(self, token_id: int) -> str | None:
        """The vocabulary entry of an id, in the vocabulary's own spelling."""
        return self.inner.id_to_token(token_id)

    def token_id(self, token: str) -> int | None:
        """The id of a vocabulary entry, special ones included."""
        return self.inner.token_to_id(token)

    def assembly(self) -> Assembly:
        """What joins the spellings of tokens to text one by one. Raises UserError for decoders it has no way for."""
        return Assembly(self.inner)

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write the files that `load_tokenizer` and transformers' AutoTokenizer open, chat templates included.

        Several stop ids go into generation_config.json, unless a model's is there already.
        """
        write_files(Path(folder), self.definition, self.settings, self.special_tokens, self.chat_template)
        target = Path(folder) / MODEL_CONFIG_FILES[0]
        if len(self.stop_ids) > 1 and not target.exists():
            write_atomically(target, json.dumps({"eos_token_id": self.stop_ids}, indent=2).encode())

    def __reduce__(self):
        return Tokenizer, (self.definition, self.settings, self.stop_ids)

    def __repr__(self) -> str:
        return f"Tokenizer(vocab_size={self.vocab_size}, fingerprint={self.fingerprint[:12]})"


def well_formed(text: str) -> str:
    """The text with halves of surrogate pairs, which no UTF-8 can hold, joined or replaced by U+FFFD."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text
