"""The index of a sharded safetensors checkpoint: which shard holds which tensor, and no file from elsewhere.

{"metadata": {"total_size": bytes}, "weight_map": {"tensor": "model-00001-of-00002.safetensors", …}}
"""

from pathlib import Path

from maxstack.config import UserError
from maxstack.models.files.opened import OpenedFile
from maxstack.models.files.source import shown
from maxstack.models.files.strict_json import MOST_BYTES, BadJSON, parse_object

WHOLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
SUFFIX = ".safetensors"


def read_index(path: Path) -> dict[str, str]:
    """The shard of each tensor, by file name. Raises UserError for anything but plain names of such files."""
    file = OpenedFile(path)
    try:
        # One more than is allowed: too long is then seen without reading all of it.
        fields = parse_object(file.text(0, MOST_BYTES + 1))
    except BadJSON as error:
        raise file.damaged(f"it is {error}") from error
    finally:
        file.close()
    shards = fields.get("weight_map")
    if not isinstance(shards, dict) or not shards:
        raise file.damaged('it has no "weight_map" that says where each tensor lies')
    for name, shard in shards.items():
        if not isinstance(shard, str):
            raise file.damaged(f"the file of tensor {shown(name)} is {shown(shard)}, not a name")
        if not _plain(shard):
            raise UserError(
                f"{path} puts tensor {shown(name)} into {shown(shard)}; a shard is a {SUFFIX} file beside the index, "
                "anything else is not opened. Correct the index, or fetch the model again"
            )
    return shards


def inside(folder: Path, name: str) -> Path:
    """The path of a file of the folder. Raises UserError when it is not there or is a link out of the folder.

    The download cache of huggingface_hub is made of links from `models--…/snapshots/<revision>/` to the `blobs` of
    the same repository or of the cache; these are let through.
    """
    path, home = folder / name, folder.resolve()
    target = path.resolve()
    if not target.is_file():
        raise UserError(
            f"{path} is missing; put it beside the other files of the model, or fetch the model again"
        )
    if not any(target.is_relative_to(place) for place in (home, *_blobs(home))):
        raise UserError(
            f"{path} is a link to {target}, which is outside of the model's folder and is not opened. "
            "Put the file itself into the folder"
        )
    return path


def _blobs(folder: Path) -> list[Path]:
    for snapshots in folder.parents:
        if snapshots.name == "snapshots" and snapshots.parent.name.startswith("models--"):
            return [snapshots.parent / "blobs", snapshots.parent.parent / "blobs"]
    return []


def _plain(name: str) -> bool:
    """Whether it is the name of a file in the same folder and nothing else."""
    return (
        name.isprintable() and name.endswith(SUFFIX) and not name.startswith(".") and not {*"/\\:"} & {*name}
    )
