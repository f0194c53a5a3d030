"""The short name of a model that was given as a path or a hub id."""

import os
from pathlib import Path


def base_name(spec: str) -> str:
    """The last component of a path or hub id. '.' and '..' are resolved to real names first."""
    return Path(os.path.abspath(spec)).name
