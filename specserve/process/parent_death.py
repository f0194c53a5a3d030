"""Makes the operating system kill a child process when its parent ends (Linux only)."""

import ctypes
import signal
import sys
from typing import Final

_PR_SET_PDEATHSIG: Final = 1


def set_parent_death_signal() -> None:
    """Have SIGKILL sent to this process when the thread that started it ends. Linux only.

    A watching thread would not suffice: native code that holds the interpreter lock lets no other
    Python thread run. If the parent has ended already, this has no effect; the caller then finds
    the socket to the parent closed.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
