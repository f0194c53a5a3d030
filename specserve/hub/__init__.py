"""Finds, downloads and converts models (`resolve`), and reads GGUF files."""

from specserve.hub.errors import HubError
from specserve.hub.resolve import ALIASES, is_hub_id, local_directory, resolve

__all__ = ["ALIASES", "HubError", "is_hub_id", "local_directory", "resolve"]
