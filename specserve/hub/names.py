"""What a model is called when it was given as a path or a hub id."""

import os
from pathlib import Path


def base_name(spec: str) -> str:
    """The last part of a path or hub id; of '.' and '..' the name of that directory."""
    return Path(os.path.abspath(spec)).name
