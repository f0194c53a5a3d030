"""The system ends a child process of ours with its parent, whatever the child is doing."""

import ctypes
import signal
import sys
from typing import Final

_PR_SET_PDEATHSIG: Final = 1


def kill_with_parent() -> None:
    """From now on, SIGKILL when the thread that started this process ends. On Linux alone.

    Native code that holds the interpreter lets no thread of Python run, so no thread of ours could
    do it. A parent that is gone already is not noticed here: its end of the socket is closed then.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
