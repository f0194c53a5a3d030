"""Finds, downloads and converts models, and reads GGUF files.

`resolve` maps the model name a user gives to a local model directory. `specserve.models` imports
the GGUF readers directly.
"""

from specserve.hub.errors import HubError
from specserve.hub.resolve import ALIASES, is_hub_id, resolve

__all__ = ["ALIASES", "HubError", "is_hub_id", "resolve"]
