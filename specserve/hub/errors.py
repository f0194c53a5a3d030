"""The exception type of this package."""


class HubError(ValueError):
    """A model that cannot be found, fetched or converted; the message says why and what to do."""
