"""Which files of a folder hold the weights, and which of them may be opened."""

from collections.abc import Iterable
from pathlib import Path

from maxstack.config import UserError
from maxstack.models.files.gguf.file import GGUF
from maxstack.models.files.index import INDEX, WHOLE
from maxstack.models.files.safetensors import Safetensors
from maxstack.models.files.source import TensorSource, some

PICKLES = frozenset({".bin", ".pt", ".pth", ".ckpt"})
_CONVERT = (
    "In an environment with PyTorch, `AutoModelForCausalLM.from_pretrained(OLD).save_pretrained(NEW, "
    "safe_serialization=True)` of transformers writes the same weights as safetensors; give NEW"
)


def open_weights(path: Path | str) -> TensorSource:
    """The tensors of a folder (safetensors, else its one GGUF file) or of a file. Raises UserError."""
    path = Path(path)
    if path.is_dir():
        return _open_folder(path)
    if not path.exists():
        raise UserError(f"{path}: no such file or folder")
    if path.suffix == ".gguf":
        return GGUF(path)
    if path.suffix == ".safetensors" or path.name.endswith(".safetensors.index.json"):
        return Safetensors(path)
    if path.suffix in PICKLES:
        raise _pickled(path)
    raise UserError(f"{path} is no kind of weights that can be read; those are .safetensors and .gguf files")


def _open_folder(folder: Path) -> TensorSource:
    files = sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))
    if any(file.name in (WHOLE, INDEX) for file in files):
        return Safetensors(folder)
    found = {
        suffix: [file for file in files if file.suffix == suffix] for suffix in (".gguf", ".safetensors")
    }
    if len(found[".gguf"]) == 1 and not found[".safetensors"]:
        return GGUF(found[".gguf"][0])
    others = found[".gguf"] + found[".safetensors"]
    if others:
        raise UserError(
            f"{folder} has neither {WHOLE} nor {INDEX}, but {_listed(others)}; name the file that is meant, "
            "or put the index beside its shards"
        )
    pickles = [file for file in files if file.suffix in PICKLES]
    if pickles:
        raise _pickled(pickles[0])
    raise UserError(
        f"{folder} holds no weights: neither {WHOLE}, {INDEX} nor a .gguf file"
        + (f", only {_listed(files)}" if files else "; it is empty")
    )


def _pickled(path: Path) -> UserError:
    return UserError(
        f"{path} holds PyTorch's pickled weights, which can run code when they are opened and are never read here. "
        f"{_CONVERT}"
    )


def _listed(files: Iterable[Path]) -> str:
    return some([file.name for file in files])
