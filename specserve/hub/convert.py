"""Converts the metadata of a GGUF file, but not the weights, to the files of a model directory."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import msgspec

from specserve.hub.gguf_config import read_config, read_sampling
from specserve.hub.gguf_file import GgufFile
from specserve.hub.gguf_tensors import source_tensors
from specserve.hub.gguf_tokenizer import end_tokens, read_tokenizer

CONVERTER_VERSION = 4  # increment when the output changes, so that cached conversions are redone
Progress = Callable[[str, float], None]  # (stage, fraction done from 0 to 1)


def convert_gguf(
    path: Path, output: Path, report: Progress, sampling: Mapping[str, float] | None = None
) -> None:
    """Write the JSON configs and tokenizer.json for the GGUF file `path` to directory `output`.

    `sampling` are recommended sampling parameters, for a file that recommends none. Raises
    `HubError`, before anything is written, if the file or the model is not usable.
    """
    report(f"reading {path.name}", 0.0)
    file = GgufFile(path)
    config = read_config(file)
    source_tensors(file, config)  # called only for its checks
    tokenizer, tokenizer_config = read_tokenizer(file)
    generation = {"bos_token_id": config["bos_token_id"], "eos_token_id": end_tokens(file)}
    generation |= read_sampling(file) or sampling or {}
    _write_json(output / "config.json", config)
    _write_json(output / "generation_config.json", generation)
    _write_json(output / "tokenizer_config.json", tokenizer_config)
    tokenizer.save(str(output / "tokenizer.json"))
    report(f"reading {path.name}", 1.0)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    present = {key: value for key, value in content.items() if value is not None}
    path.write_bytes(msgspec.json.format(msgspec.json.encode(present), indent=2))
