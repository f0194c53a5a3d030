"""Tiny random models and engines over them: everything real but the size."""

from pathlib import Path
from typing import Any

import pytest
from eagle_heads import write_eagle
from medusa_heads import write_medusa
from tiny import EngineFactory, write_tiny_llama

from specserve.config import load_config
from specserve.engine.engine import Engine
from specserve.engine.parts import load_parts


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
    def make(
        draft: str | list[str] = "none",
        *,
        target: Path | None = None,
        kv_slots: int | None = None,
        **more: Any,
    ) -> Engine:
        if kv_slots is not None:
            parts = make(draft, target=target).parts
            wanted = [each.kv_spec(parts.model.dtype) for each in parts.drafters.values()]
            specs = [parts.model.kv_spec, *(spec for spec in wanted if spec is not None)]
            more["kv_memory"] = str(kv_slots * sum(spec.bytes_per_slot for spec in specs))
        drafts = [draft] if isinstance(draft, str) else draft
        settings = {"dtype": "float32", "device": "cpu", "kv_memory": "4MiB", **more}
        directory = target or tiny_model
        config = load_config({"target": str(directory), "draft": drafts, **settings})
        return Engine(load_parts(config, directory, None))

    return make
