"""Reading a checkpoint: whole, in part, or by name without knowing what it holds."""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from maxstack.checkpoint import arrays, folder, manifest
from maxstack.checkpoint.account import Account, compare
from maxstack.checkpoint.errors import STORAGE_ERRORS, CheckpointError, NewerLayout, first_line
from maxstack.checkpoint.names import SEPARATOR, flatten, unflatten
from maxstack.checkpoint.record import Record, read_record, refuse_newer


def read_meta(path: Path | str, step: int | None = None) -> dict[str, Any]:
    """The meta of a checkpoint, given its folder, the folder of checkpoints or the run's folder. Reads no array."""
    return read_record(folder.locate(Path(path), step)).meta


def describe(path: Path | str, step: int | None = None) -> Record:
    """Everything but the arrays' contents: step, time, versions, metrics, meta, names with shapes and dtypes."""
    return read_record(folder.locate(Path(path), step))


def read_arrays(
    path: Path | str, step: int | None = None, groups: Collection[str] | None = None, verify_by: str = "hash"
) -> dict[str, Any]:
    """Arrays as numpy in the nested dict that was saved; `groups` names the parts wanted, such as ("params",).

    Random keys come as their uint32 data. Raises CheckpointError as `restore_partial` does.
    """
    place = folder.locate(Path(path), step)
    verified = check(place, verify_by)
    described = read_record(place)
    names = [name for name in described.arrays if groups is None or name.split(SEPARATOR)[0] in groups]
    if not names:
        raise CheckpointError(
            f"{place} has none of the groups {sorted(groups or ())}; it has {_groups(described)}"
        )
    return unflatten(_read(place, dict.fromkeys(names), described, verified))


def restore_partial(
    path: Path | str,
    target: Mapping[str, Any],
    *,
    step: int | None = None,
    sources: Mapping[str, str] | None = None,
    strict: bool = False,
    verify_by: str = "hash",
) -> tuple[dict[str, Any], Account]:
    """The arrays of the target that the checkpoint has under the same name with the same shape, and an account.

    What is missing or of another shape is left out of the result: the caller initialises it (a new head). Dtypes
    are converted to the target's. `sources` reads a part from elsewhere: {"params": "ema"} takes each
    "params/NAME" from "ema/NAME". `strict` raises CheckpointError unless all matched. Other causes: none there,
    damaged, of a newer layout.
    """
    place = folder.locate(Path(path), step)
    verified = check(place, verify_by)
    state, account = read_state(
        place, read_record(place), flatten(target), verified, sources=sources or {}, cast=True
    )
    if strict and not account.complete:
        raise refuse(account)
    return unflatten(state), account


def read_state(
    place: Path,
    described: Record,
    wanted: Mapping[str, Any] | None,
    verified: str,
    sources: Mapping[str, str] | None = None,
    cast: bool = False,
) -> tuple[dict[str, Any], Account]:
    """Read what matches into a flat state. Nothing is read if dtypes must be equal (`cast` is off) and one differs."""
    if wanted is None:
        wanted = dict.fromkeys(described.arrays)
        specs = described.arrays
    else:
        specs = {name: arrays.spec_of(leaf) for name, leaf in wanted.items()}
    stored_name = {name: _source(name, sources or {}) for name in wanted}
    fields = compare(described.arrays, specs, stored_name, cast=cast)
    account = Account(folder=place, step=described.step, verified=verified, **fields)
    if not cast and not account.complete:
        return {}, account
    chosen = {stored_name[name]: wanted[name] for name in account.matched}
    found = _read(place, chosen, described, verified) if chosen else {}
    return {name: found[stored_name[name]] for name in account.matched}, account


def verify(place: Path, how: str) -> str:
    """Compare the files with the manifest: "hash", "size", "no" as asked for, "unverified" without a manifest.

    Raises CheckpointError naming the damaged files, NewerLayout for what only a later version reads.
    """
    refuse_newer(place)
    found = manifest.problems(place, how)
    if found is None:
        read_record(place)
        return "unverified"
    if found:
        more = f" and {len(found) - 3} more files" if len(found) > 3 else ""
        raise CheckpointError(f"checkpoint {place} is damaged: {'; '.join(found[:3])}{more}")
    return "no" if how == "none" else how


def check(place: Path, how: str = "hash") -> str:
    """`verify`, whose error also names the newest checkpoint beside the refused one that can be read."""
    try:
        return verify(place, how)
    except CheckpointError as error:
        if not place.name.isdecimal():
            raise
        raise offering(error, place, how) from error


def offering(error: CheckpointError, place: Path, how: str) -> CheckpointError:
    """The error for the checkpoint of a step, with the newest other one that can be read and how to take it."""
    step, directory = int(place.name), place.parent
    good = intact_besides(directory, step, how)
    if good is None:
        offer = "no other checkpoint is intact"
    else:
        offer = f"step {good} is intact: restore that one (--step {good})"
        if isinstance(error, NewerLayout):  # a resumed run takes the newest that is not damaged
            offer += f", or move the later ones out of {directory} to resume from it"
    return type(error)(f"{error}; {offer}; nothing was deleted", step=step, good_step=good)


def intact_besides(directory: Path, refused: int, how: str) -> int | None:
    """The newest step in a folder of checkpoints, other than the refused one, that is intact and can be read."""
    for step in folder.newest_first(folder.complete_steps(directory)):
        if step != refused:
            try:
                verify(folder.step_folder(directory, step), how)
            except CheckpointError:
                continue
            return step
    return None


def refuse(account: Account) -> CheckpointError:
    """The error for a checkpoint that is not what was asked for."""
    return CheckpointError(
        f"the checkpoint does not fit what was asked for:\n{account}\n"
        "restore with the configuration it was saved with, or take the weights that match with restore_partial",
        step=account.step,
    )


def _read(place: Path, wanted: Mapping[str, Any], described: Record, verified: str) -> dict[str, Any]:
    try:
        return arrays.read(place, wanted, described)
    except STORAGE_ERRORS as error:
        hint = "" if verified == "hash" else "; its files were not compared with their hashes"
        raise CheckpointError(f"checkpoint {place} cannot be read{hint}: {first_line(error)}") from error


def _source(name: str, sources: Mapping[str, str]) -> str:
    group, _, rest = name.partition(SEPARATOR)
    return f"{sources[group]}{SEPARATOR}{rest}" if group in sources else name


def _groups(described: Record) -> list[str]:
    return sorted({name.split(SEPARATOR)[0] for name in described.arrays})
