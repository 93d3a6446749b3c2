"""What a restore found: which arrays matched by name and shape, and which did not."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from maxstack.checkpoint.names import SEPARATOR
from maxstack.checkpoint.record import ArraySpec

_LISTED = 12


@dataclass(frozen=True, kw_only=True)
class Account:
    """The result of comparing a checkpoint with what was asked for; `print(account)` shows it."""

    folder: Path
    step: int
    verified: str
    """"hash" or "size" as compared with the manifest, "no" if not asked for, "unverified" without a manifest."""
    matched: tuple[str, ...] = ()
    converted: tuple[str, ...] = ()
    """Matched names whose dtype was changed on reading, with both dtypes."""
    missing: tuple[str, ...] = ()
    """Asked for, not in the checkpoint."""
    unexpected: tuple[str, ...] = ()
    """In the checkpoint, in a group that was asked for, but not itself asked for."""
    mismatched: tuple[str, ...] = ()
    """Of another shape (or dtype, where it must be equal), with both."""
    ignored: tuple[str, ...] = ()
    """Groups of the checkpoint that were not asked for, with their number of arrays."""

    @property
    def complete(self) -> bool:
        """Whether everything asked for was there, and nothing more in the groups asked for."""
        return not (self.missing or self.unexpected or self.mismatched)

    def __str__(self) -> str:
        check = {"unverified": "unverified: it has no manifest", "no": "not checked"}
        lines = [
            f"checkpoint {self.step} in {self.folder} ({check.get(self.verified, f'{self.verified} checked')})"
        ]
        lines.append(f"  matched {len(self.matched)}")
        lines += _lines("converted", self.converted)
        lines += _lines("missing in the checkpoint", self.missing)
        lines += _lines("not used from the checkpoint", self.unexpected)
        lines += _lines("of another shape or type", self.mismatched)
        lines += _lines("groups not asked for", self.ignored)
        return "\n".join(lines)


def compare(
    stored: Mapping[str, ArraySpec],
    wanted: Mapping[str, ArraySpec],
    sources: Mapping[str, str],
    *,
    cast: bool,
) -> dict[str, tuple[str, ...]]:
    """The fields of an Account. `sources` gives the stored name for each wanted one; `cast` lets dtypes differ."""
    matched, converted, missing, mismatched = [], [], [], []
    for name, spec in wanted.items():
        source = sources[name]
        found = stored.get(source)
        shown = name if source == name else f"{name} (from {source})"
        if found is None:
            missing.append(shown)
        elif found.shape != spec.shape or (found.dtype != spec.dtype and not cast):
            mismatched.append(f"{shown}: {found} in the checkpoint, {spec} asked for")
        else:
            matched.append(name)
            if found.dtype != spec.dtype:
                converted.append(f"{shown}: {found.dtype} to {spec.dtype}")
    groups = {_group(source) for source in sources.values()}
    rest = [name for name in stored if name not in set(sources.values())]
    outside = [_group(name) for name in rest if _group(name) not in groups]
    return {
        "matched": tuple(matched),
        "converted": tuple(converted),
        "missing": tuple(missing),
        "mismatched": tuple(mismatched),
        "unexpected": tuple(name for name in rest if _group(name) in groups),
        "ignored": tuple(f"{group} ({outside.count(group)})" for group in _unique(outside)),
    }


def _group(name: str) -> str:
    return name.split(SEPARATOR)[0]


def _unique(names: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(names))


def _lines(title: str, names: Sequence[str]) -> list[str]:
    if not names:
        return []
    more = [f"    … and {len(names) - _LISTED} more"] if len(names) > _LISTED else []
    return [f"  {title} {len(names)}", *(f"    {name}" for name in names[:_LISTED]), *more]
