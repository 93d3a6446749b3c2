"""Text to token ids and back, around a `tokenizers` file; byte BPE trained here.

Text is always plain text: a document that contains the characters of a special token, "<|endoftext|>" say, is encoded
as those characters. Special tokens are put in by id (`bos_id`, `eos_id`), by the code that means them.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from maxstack.config import UserError, write_atomically
from maxstack.data import hub

END_OF_TEXT = "<|endoftext|>"
BYTES = "bytes"
TOKENIZER_FILE = "tokenizer.json"
CONFIG_FILE = "tokenizer_config.json"
SPECIALS_FILE = "special_tokens_map.json"
# Looked for in this order when a tokenizer comes without a config that names its specials.
_BOS_NAMES = (END_OF_TEXT, "<s>", "<|begin_of_text|>", "<bos>")
_EOS_NAMES = (END_OF_TEXT, "</s>", "<|end_of_text|>", "<eos>")


class Tokenizer:
    """A tokenizer file with its begin and end ids. A value: nothing changes after it is built."""

    def __init__(self, definition: str, settings: dict[str, Any] | None = None):
        """`definition` is the text of a tokenizer.json, `settings` the content of a tokenizer_config.json."""
        self.definition = definition
        self.settings = dict(settings or {})
        self._tokenizer = tokenizers.Tokenizer.from_str(self.definition)
        self._tokenizer.encode_special_tokens = True
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocabulary.values()) + 1
        """Largest id + 1: the least number of rows an embedding table needs."""
        self.bos_id: int | None = self._special("bos_token", _BOS_NAMES)
        self.eos_id: int | None = self._special("eos_token", _EOS_NAMES)
        self.fingerprint = hashlib.sha256(
            _canonical([json.loads(self.definition), self.bos_id, self.eos_id]).encode()
        ).hexdigest()
        """Equal exactly when ids mean the same: sha256 of the definition and the begin and end ids."""

    def _special(self, key: str, names: Sequence[str]) -> int | None:
        if key in self.settings:
            token = self.settings[key]
            token = token.get("content") if isinstance(token, dict) else token
            if token is None:
                return None
            found = self._tokenizer.token_to_id(token)
            if found is None:
                raise UserError(f"{CONFIG_FILE} names {key} {token!r}, which is not in {TOKENIZER_FILE}")
            return found
        known = (self._tokenizer.token_to_id(name) for name in names)
        return next((token_id for token_id in known if token_id is not None), None)

    def encode(self, text: str) -> list[int]:
        """Ids of the text, no special ones added."""
        return self._tokenizer.encode(well_formed(text), add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text, no special ones added; runs on the tokenizer's own threads."""
        fixed = [well_formed(text) for text in texts]
        return [e.ids for e in self._tokenizer.encode_batch_fast(fixed, add_special_tokens=False)]

    def decode(self, ids: Sequence[int] | np.ndarray, *, skip_special: bool = True) -> str:
        """Text of the ids; bytes that are not UTF-8, such as half a character at the end, become U+FFFD."""
        return self._tokenizer.decode([int(token_id) for token_id in ids], skip_special_tokens=skip_special)

    def token(self, token_id: int) -> str | None:
        """The vocabulary entry of an id, in the vocabulary's own spelling."""
        return self._tokenizer.id_to_token(token_id)

    def token_id(self, token: str) -> int | None:
        """The id of a vocabulary entry, special ones included."""
        return self._tokenizer.token_to_id(token)

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write the files that `load_tokenizer` and transformers' AutoTokenizer open."""
        target = Path(folder)
        target.mkdir(parents=True, exist_ok=True)
        names = {
            key: self._tokenizer.id_to_token(token_id)
            for key, token_id in (("bos_token", self.bos_id), ("eos_token", self.eos_id))
            if token_id is not None
        }
        settings = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
            **self.settings,
            **names,
        }
        write_atomically(target / TOKENIZER_FILE, self.definition.encode())
        for file, content in ((CONFIG_FILE, settings), (SPECIALS_FILE, names)):
            write_atomically(target / file, json.dumps(content, indent=2, ensure_ascii=False).encode())

    def __reduce__(self):
        return Tokenizer, (self.definition, self.settings)

    def __repr__(self) -> str:
        return f"Tokenizer(vocab_size={self.vocab_size}, fingerprint={self.fingerprint[:12]})"


def load_tokenizer(name_or_path: str | os.PathLike[str]) -> Tokenizer:
    """Open a folder with a tokenizer.json, a tokenizer.json file, "hf:owner/name" on the Hub, or "bytes".

    Raises UserError for what is no tokenizer, RunError when the Hub cannot be reached and its cache has no copy.
    """
    if str(name_or_path) == BYTES:
        return byte_tokenizer()
    if str(name_or_path).startswith(hub.PREFIX):
        name_or_path = hub.hub_folder(str(name_or_path), (TOKENIZER_FILE, CONFIG_FILE))
    path = Path(name_or_path).expanduser()
    file = path / TOKENIZER_FILE if path.is_dir() else path
    if not file.is_file():
        raise UserError(
            f"no tokenizer at {path}: give a folder with {TOKENIZER_FILE}, such a file, "
            f'"{hub.PREFIX}owner/name" on the Hub, or "{BYTES}"'
        )
    config = file.parent / CONFIG_FILE
    try:
        definition = file.read_text(encoding="utf-8")
        json.loads(definition)
        settings = json.loads(config.read_text(encoding="utf-8")) if config.is_file() else None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{file} or {CONFIG_FILE} beside it is not JSON: {error}") from error
    return tokenizer_from_json(definition, settings, where=str(file))


def tokenizer_from_json(
    definition: str, settings: dict[str, Any] | None = None, *, where: str = ""
) -> Tokenizer:
    """Build a tokenizer from the text of its files, or say what is wrong with them."""
    if "model" not in json.loads(definition):
        raise UserError(f"{where or 'the definition'} is JSON but no tokenizer: it has no 'model'")
    try:
        return Tokenizer(definition, settings)
    except UserError:
        raise
    except Exception as error:  # the binding raises plain Exception for every malformed definition
        raise UserError(f"{where or 'the definition'} is no tokenizer definition: {error}") from error


def byte_tokenizer() -> Tokenizer:
    """One token a byte, its id the byte's value; id 256 begins and ends documents."""
    vocabulary = {char: byte for byte, char in enumerate(_byte_characters())}
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


def well_formed(text: str) -> str:
    """The text with halves of surrogate pairs, which no UTF-8 can hold, joined or replaced by U+FFFD."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def _byte_characters() -> list[str]:
    """The printable character byte-level BPE writes for each byte: itself where printable, else from U+0100 up."""
    plain = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = iter(range(256, 512))
    return [chr(byte) if byte in plain else chr(next(others)) for byte in range(256)]


def _canonical(value: Any) -> str:
    return json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
