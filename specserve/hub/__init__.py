"""Where models come from. `resolve` is all that the rest of the runtime calls."""

from specserve.hub.errors import HubError
from specserve.hub.resolve import ALIASES, resolve

__all__ = ["ALIASES", "HubError", "resolve"]
