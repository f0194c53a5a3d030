"""The one error of the hub."""


class HubError(ValueError):
    """A model that cannot be found, fetched or converted; the message says why and what to do."""
