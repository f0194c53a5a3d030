"""Opening the files of a directory that somebody else made.

Only regular files up to a size: a FIFO keeps its reader waiting, a device may never end. Owns how
values from such files are quoted in messages: on one line, and short.
"""

import errno
import os
import reprlib
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import Final

_KINDS: Final = {
    stat.S_IFDIR: "a directory",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}
_LISTED: Final = 6
_QUOTE: Final = reprlib.Repr()
_QUOTE.maxstring = _QUOTE.maxother = 80
_QUOTE.maxlevel = 3
_QUOTE.maxlist = _QUOTE.maxtuple = _QUOTE.maxdict = 8


class FileError(ValueError):
    """A file that is not opened; the message names it and says why."""


def check_file(path: Path) -> int:
    """The size of the regular file `path`, in bytes. Raises `FileError` for anything else."""
    try:
        status = path.stat()
    except OSError as error:
        if error.errno == errno.ENOENT and path.is_symlink():
            raise FileError(f"{path}: a link to a file that is not there") from None
        raise FileError(f"{path}: cannot be read ({error.strerror})") from None
    if not stat.S_ISREG(status.st_mode):
        kind = _KINDS.get(stat.S_IFMT(status.st_mode), "no file")
        raise FileError(f"{path}: it is {kind}, not a regular file; put the file itself there")
    return status.st_size


def read_file(path: Path, max_bytes: int) -> bytes:
    """The content of a regular file. Raises `FileError` for anything else, and if it is larger."""
    size = check_file(path)
    if size > max_bytes:
        raise FileError(f"{path}: {size} bytes are too many (limit {max_bytes})")
    try:
        return path.read_bytes()
    except OSError as error:
        raise FileError(f"{path}: cannot be read ({error.strerror})") from None


def is_there(path: Path) -> bool:
    """Whether there is anything of that name, be it a link that leads nowhere."""
    return os.path.lexists(path)


def quoted(value: object) -> str:
    """`value` as Python writes it, cut where it is long."""
    try:
        return _QUOTE.repr(value)
    except ValueError:  # Python writes out no integer of thousands of digits
        return "a number of thousands of digits"


def listed(names: Sequence[str]) -> str:
    """Some names, or the first of many."""
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(map(short, names[:_LISTED])) + more


def short(name: str) -> str:
    """A name on one line, cut where it is long."""
    return quoted(name)[1:-1]
