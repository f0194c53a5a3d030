"""Safe access to the files of an untrusted directory, such as a downloaded model.

Only regular files up to a given size are opened: reading a FIFO may block, reading a device may
never end. Also formats values from such files for messages: short, and on one line.
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
_LISTED: Final = 6  # names that a message shows
_QUOTE: Final = reprlib.Repr()  # limits are characters, levels of nesting and items
_QUOTE.maxstring = _QUOTE.maxother = 80
_QUOTE.maxlevel = 3
_QUOTE.maxlist = _QUOTE.maxtuple = _QUOTE.maxdict = 8


class FileError(ValueError):
    """A file that cannot be used; the message names it and the reason."""


def check_file(path: Path) -> int:
    """The size of the regular file `path`, in bytes. Raises `FileError` if it is not one."""
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
    """The content of a regular file of at most `max_bytes` bytes. Raises `FileError`."""
    size = check_file(path)
    if size > max_bytes:
        raise FileError(f"{path}: {size} bytes are too many (limit {max_bytes})")
    try:
        return path.read_bytes()
    except OSError as error:
        raise FileError(f"{path}: cannot be read ({error.strerror})") from None


def is_there(path: Path) -> bool:
    """Whether `path` exists, as a file of any kind or as a dangling link."""
    return os.path.lexists(path)


def quoted(value: object) -> str:
    """The `repr` of `value`, shortened if it is long."""
    try:
        return _QUOTE.repr(value)
    except ValueError:  # `repr` refuses integers of thousands of digits
        return "a number of thousands of digits"


def listed(names: Sequence[str]) -> str:
    """The names separated by commas, at most the first `_LISTED`, and how many more there are."""
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(map(short, names[:_LISTED])) + more


def short(name: str) -> str:
    """`name` with control characters escaped, shortened if it is long."""
    return quoted(name)[1:-1]
