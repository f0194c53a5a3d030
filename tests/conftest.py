"""Tiny random models and engines over them: everything real but the size."""

from pathlib import Path
from typing import Any

import pytest
from eagle_heads import write_eagle
from medusa_heads import write_medusa
from tiny import EngineFactory, write_tiny_llama

from specserve.engine.engine import Engine
from specserve_evals.engines import open_engine


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("target"), seed=1)


@pytest.fixture(scope="session")
def tiny_draft(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another random model with the same vocabulary: a bad draft."""
    return write_tiny_llama(tmp_path_factory.mktemp("draft"), seed=2, num_layers=1)


@pytest.fixture(scope="session")
def tiny_heads(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Random EAGLE heads for the tiny target, in two layouts: bad drafts."""
    layouts = ("specforge", "eagle1")
    return [write_eagle(tmp_path_factory.mktemp(layout), layout).path for layout in layouts]


@pytest.fixture(scope="session")
def tiny_medusa(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random Medusa heads for the tiny target: a bad draft."""
    return write_medusa(tmp_path_factory.mktemp("medusa")).path


@pytest.fixture
def make_engine(tiny_model: Path) -> EngineFactory:
    def make(draft: str | list[str] = "none", *, target: Path | None = None, **more: Any) -> Engine:
        settings = {"dtype": "float32", "device": "cpu", "kv_memory": "4MiB", **more}
        return open_engine(target or tiny_model, draft, **settings)

    return make
