"""Servers under test: the real command in its own process, with a tiny random chat model."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from live import LiveServer, start_server
from refusal import vital_signs
from tiny_chat import write_byte_chat


@pytest.fixture(scope="session")
def chat_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_byte_chat(tmp_path_factory.mktemp("chat") / "tiny-chat")


@pytest.fixture(scope="session")
def live_server(chat_model: Path) -> Iterator[LiveServer]:
    """Shared by tests that leave no trace in the server."""
    with start_server(chat_model) as server:
        yield server
        assert "Traceback" not in server.log.read_text()


@pytest.fixture
def survivor(live_server: LiveServer) -> Iterator[LiveServer]:
    """The shared server; its vital signs must be the same after the test as before."""
    before = vital_signs(live_server)
    yield live_server
    assert vital_signs(live_server) == before
