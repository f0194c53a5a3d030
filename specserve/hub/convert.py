"""A GGUF file's metadata turned into the JSON files of a model directory.

The weights stay in the GGUF file, which is served as it is. Everything that can be refused is
refused before the first file is written.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from specserve.hub.gguf_config import read_config
from specserve.hub.gguf_file import GgufFile
from specserve.hub.gguf_tensors import source_tensors
from specserve.hub.gguf_tokenizer import end_tokens, read_tokenizer

CONVERTER_VERSION = 3  # raise it when the output changes: cached conversions are made again
Progress = Callable[[str, float], None]  # what is being done, and how much of it: 0 to 1


def convert_gguf(path: Path, output: Path, report: Progress) -> None:
    """Write the configs and the tokenizer of `path` to `output`. Raises `HubError`."""
    report(f"reading {path.name}", 0.0)
    file = GgufFile(path)
    config = read_config(file)
    source_tensors(file, config)  # refuses what the checkpoint reader would refuse later
    tokenizer, tokenizer_config = read_tokenizer(file)
    generation = {"bos_token_id": config["bos_token_id"], "eos_token_id": end_tokens(file)}
    _write_json(output / "config.json", config)
    _write_json(output / "generation_config.json", generation)
    _write_json(output / "tokenizer_config.json", tokenizer_config)
    tokenizer.save(str(output / "tokenizer.json"))
    report(f"reading {path.name}", 1.0)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    present = {key: value for key, value in content.items() if value is not None}
    path.write_bytes(msgspec.json.format(msgspec.json.encode(present), indent=2))
