"""Tensors in files: safetensors (one file or shards with an index) and GGUF, read by rows and written as a whole.

Knows names, shapes and bytes, nothing of models. Every fault of a file is a `UserError` that names it, found before
memory is taken for what the file claims.

    with open_weights(path) as source:
        for name in source.names():
            rows = source.read(name, 0, 16)
"""

from maxstack.models.files.gguf import GGUF, Export, write_gguf
from maxstack.models.files.place import open_weights
from maxstack.models.files.safetensors import Safetensors
from maxstack.models.files.source import LazyTensor, TensorInfo, TensorSource
from maxstack.models.files.write_safetensors import write_safetensors

__all__ = [
    "GGUF",
    "Export",
    "LazyTensor",
    "Safetensors",
    "TensorInfo",
    "TensorSource",
    "open_weights",
    "write_gguf",
    "write_safetensors",
]
