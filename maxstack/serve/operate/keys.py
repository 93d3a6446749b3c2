"""Keys from files: one a line, blank lines and lines with # left out."""

import logging
import stat
from pathlib import Path

from maxstack.config import UserError

log = logging.getLogger(__name__)

SHORTEST, LONGEST, MOST = 16, 512, 1000
"""Characters of a key, and keys of a file."""
OTHERS = stat.S_IRWXO | stat.S_IWGRP


def keys_in(file: Path, flag: str) -> tuple[str, ...]:
    """The keys of a file that `flag` names. Raises UserError for one that cannot be read, or holds none."""
    try:
        with file.open(encoding="utf-8") as opened:
            mode = stat.S_IMODE(file.stat().st_mode)
            text = opened.read(LONGEST * MOST * 2)
    except OSError as error:
        raise UserError(f"{flag} {file} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{flag} {file} is not UTF-8 text: write one key a line") from error
    if mode & OTHERS:
        log.warning(
            "%s %s can be read by others (mode %03o); keep keys to yourself: chmod 600 %s", flag, file, mode, file
        )  # fmt: skip
    keys = [line.strip() for line in text.splitlines()]
    keys = [key for key in keys if key and not key.startswith("#")]
    if not keys:
        raise UserError(f"{flag} {file} holds no key: write one a line, as `openssl rand -hex 32` makes them")
    if len(keys) > MOST:
        raise UserError(f"{flag} {file} holds {len(keys)} keys; {MOST} are the most")
    for number, key in enumerate(keys, 1):
        check(key, number, f"{flag} {file}")
    return tuple(dict.fromkeys(keys))


def check(key: str, number: int, where: str) -> None:
    """Refuse a key that is too easy to guess, or that no header can carry. The message never holds the key."""
    if not SHORTEST <= len(key) <= LONGEST:
        raise UserError(
            f"{where}: key {number} has {len(key)} characters; {SHORTEST} to {LONGEST} are taken, and "
            f"`openssl rand -hex 32` makes a good one"
        )
    if not key.isascii() or not key.isprintable() or " " in key:
        raise UserError(
            f"{where}: key {number} holds something that no header carries: use letters and digits"
        )
