"""GGUF, llama.cpp's format: typed metadata and tensors, plain or in blocks of few bits.

https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from maxstack.models.files.gguf.file import GGUF
from maxstack.models.files.gguf.kinds import KINDS, Kind
from maxstack.models.files.gguf.write import Export, write_gguf

__all__ = ["GGUF", "KINDS", "Export", "Kind", "write_gguf"]
