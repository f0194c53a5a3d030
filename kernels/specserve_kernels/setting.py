"""The environment variable that overrides the choice of kernels; no other module reads it."""

import os
from typing import Final

VARIABLE: Final = "SPECSERVE_KERNELS"


def kernels_setting() -> str | None:
    """The value of SPECSERVE_KERNELS; None if it is unset or empty."""
    return os.environ.get(VARIABLE) or None
