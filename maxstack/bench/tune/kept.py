"""What was found: in the user's table, and in words."""

from collections.abc import Sequence
from pathlib import Path

import jax

from maxstack.bench.tune.search import Found, different, words
from maxstack.config import UserError, write_atomically
from maxstack.kernels import tiles


def keep(found: Sequence[Found], file: Path | None) -> str:
    """Write what is better to the user's table; keys whose default is the best lose their line. A line that is there
    already is left alone by a search that was ended early. Says what was done.

    Raises UserError where there is no table to write, or a file that is none.
    """
    if file is None:
        raise UserError(
            f"{tiles.SWITCH} is empty, so there is no table to fill; name a file with it, or unset it"
        )
    try:
        lines = tiles.read(file)
    except FileNotFoundError:
        lines = {}
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: {error}; move it away, or name another with {tiles.SWITCH}") from error
    for each in found:
        key = each.request.key
        if not each.untried:
            lines.pop(key, None)
        if each.best is not None and key not in lines:
            source = f"{each.ratio:.2f} times as fast as the default, jax {jax.__version__}"
            lines[key] = {"sizes": each.best, "source": source}
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(file, tiles.written(lines).encode())
    tiles.forget()
    better = sum(each.best is not None for each in found)
    return f"{better} of {len(found)} are faster than the default; {file} has {len(lines)} lines"


def sentence(found: Found) -> str:
    """What came out for one request."""
    count = f"{found.tried} timed, {len(found.dropped)} dropped, {found.seconds:.0f} s"
    if found.best is not None:
        sizes = words(different(found.best, found.request.current))
        result = f"{sizes} is {found.ratio:.2f} times as fast as the default, kept"
    elif found.untried:
        result = "nothing to keep"
    else:
        result = f"the default stays ({words(found.request.current)})"
    untried = f"; not tried: {', '.join(found.untried)}" if found.untried else ""
    return f"{found.request.key}: {result} ({count}){untried}"


def table(found: Sequence[Found]) -> str:
    """Markdown."""
    lines = [
        "| for | default | best | default / best | tried | dropped | not tried |",
        "|---|---|---|---|---|---|---|",
    ]
    for each in found:
        best = "the default" if each.best is None else words(each.best)
        if each.untried and each.best is None:
            best = "not known"
        lines.append(
            f"| {each.request.key} | {words(each.request.current)} | {best} | {each.ratio:.2f} | {each.tried} "
            f"| {len(each.dropped)} | {len(each.untried)} |"
        )
    return "\n".join(lines)
