"""Text to token ids and back: tokenizer.json, SentencePiece's tokenizer.model, GGUF metadata; byte BPE trained here.

Every source becomes the text of a tokenizer.json, so that what follows is one thing: the `tokenizers` library.
"""

from maxstack.data.tokenizer.files import CONFIG_FILE, SENTENCEPIECE_FILE, SPECIALS_FILE, TOKENIZER_FILE
from maxstack.data.tokenizer.gguf_read import tokenizer_from_gguf
from maxstack.data.tokenizer.gguf_write import gguf_tokenizer
from maxstack.data.tokenizer.opening import BYTES, load_tokenizer, tokenizer_from_json
from maxstack.data.tokenizer.settings import stop_ids
from maxstack.data.tokenizer.stream import StreamDecoder
from maxstack.data.tokenizer.tokenizer import END_OF_TEXT, Tokenizer, well_formed
from maxstack.data.tokenizer.training import byte_tokenizer, train_bpe

__all__ = [
    "BYTES",
    "CONFIG_FILE",
    "END_OF_TEXT",
    "SENTENCEPIECE_FILE",
    "SPECIALS_FILE",
    "TOKENIZER_FILE",
    "StreamDecoder",
    "Tokenizer",
    "byte_tokenizer",
    "gguf_tokenizer",
    "load_tokenizer",
    "stop_ids",
    "tokenizer_from_gguf",
    "tokenizer_from_json",
    "train_bpe",
    "well_formed",
]
