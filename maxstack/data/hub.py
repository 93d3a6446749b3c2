"""A tokenizer by name: its files from a repository on the Hugging Face Hub, "hf:owner/name".

Only the JSON files that are asked for are fetched; no code is. A copy in the Hub's cache is taken as it is, without
asking the Hub: a run goes on with the tokenizer it began with, and works offline.
"""

import logging
from collections.abc import Sequence
from pathlib import Path

from maxstack.config import RunError, UserError

log = logging.getLogger(__name__)

PREFIX = "hf:"


def hub_folder(name: str, files: Sequence[str]) -> Path:
    """The folder in the Hub's cache with `files` of a repository, the first of them surely there; fetched if need be.

    Raises UserError when the name is no repository's or the repository lacks the first file, RunError when the Hub
    does not give it.
    """
    # Imported here: few tokenizers come by name, and it takes a third of a second.
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import HFValidationError, HTTPError, LocalEntryNotFoundError

    repository, patterns = name.removeprefix(PREFIX), list(files)
    try:
        folder = Path(snapshot_download(repository, allow_patterns=patterns, local_files_only=True))
    except HFValidationError as error:
        raise UserError(f"{name!r} names no repository: give {PREFIX}owner/name") from error
    except LocalEntryNotFoundError:
        folder = None
    try:
        # Some files may have been cached by another program. Offline, this gives what there is.
        if folder is None or not all((folder / file).is_file() for file in files):
            folder = Path(snapshot_download(repository, allow_patterns=patterns))
    except (OSError, HTTPError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise RunError(
            f"the tokenizer of {repository} is not in the cache {constants.HF_HUB_CACHE} and cannot be fetched: "
            f"{reason} (a private one needs `hf auth login`). Where the Hub can be reached, run "
            f"`hf download {repository} {' '.join(files)}` and copy the cache here, "
            f"or set HF_HUB_CACHE to it; or give a folder with {files[0]}"
        ) from error
    if not (folder / files[0]).is_file():
        raise UserError(
            f"{repository} has no {files[0]} (looked in {folder}): save the tokenizer as one with transformers, "
            "AutoTokenizer.from_pretrained(…).save_pretrained(FOLDER), and give the folder"
        )
    log.info("tokenizer of %s from %s", repository, folder)
    return folder
