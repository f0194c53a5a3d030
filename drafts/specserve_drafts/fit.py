"""Which target a draft was made for, and whether another model is one it fits."""

import hashlib
from pathlib import Path
from typing import Final

import msgspec
from msgspec import Struct

from specserve.drafting.base import DraftError
from specserve.models.fields import ModelError, read_json
from specserve.models.shape import ModelShape
from specserve.text import Tokenizer

ZOO: Final = Path(__file__).parent / "zoo"


class Target(Struct, frozen=True):
    """What must agree. Weights may differ: a tune of the same model is still worth drafting for."""

    hidden_size: int
    num_layers: int
    vocab_size: int
    vocabulary: str  # SHA-256 over the tokens by id

    @classmethod
    def of(cls, directory: Path) -> "Target":
        shape = ModelShape.from_dir(directory)
        tokens = sorted(
            (index, token) for token, index in Tokenizer(directory).vocabulary().items()
        )
        digest = hashlib.sha256(msgspec.json.encode(tokens)).hexdigest()
        return cls(shape.hidden_size, shape.num_layers, shape.vocab_size, digest)


class DraftConfig(Struct, frozen=True):
    """config.json of a draft of ours that is no model."""

    specserve_method: str
    target: Target


def read_config(directory: Path) -> DraftConfig:
    """Raises DraftError, naming the file."""
    path = directory / "config.json"
    try:
        return msgspec.convert(read_json(path), DraftConfig)
    except (ModelError, msgspec.MsgspecError) as error:
        raise DraftError(f"draft: {path} cannot be read: {error}") from error


def check_fit(directory: Path, target: Target) -> None:
    """Raises DraftError, naming the difference, unless the draft was made for such a target."""
    made_for = read_config(directory).target
    for name in Target.__struct_fields__:
        if (made := getattr(made_for, name)) != (asked := getattr(target, name)):
            raise DraftError(
                f"draft: {directory} was made for a target with {name} {made}, and this one has "
                f"{asked}; use a draft of this target, or tune one: specserve tune --help"
            )


def shipped(method: str, target: Target) -> Path | None:
    """The draft of this kind that ships for a target."""
    for path in sorted(ZOO.glob("*/config.json")):
        if "specserve_method" in read_json(path):
            config = read_config(path.parent)
            if config.specserve_method == method and config.target == target:
                return path.parent
    return None


def shipped_head(target: Path) -> Path | None:
    """The trained head that ships for a target. Its layout knows the target's name and sizes; of
    another model with both, the head is a poor draft and no error."""
    for path in sorted(ZOO.glob("*/config.json")):
        config = read_json(path)
        verifier = config.get("speculators_config", {}).get("verifier", {})
        if verifier.get("name_or_path") == target.name:
            shape, layer = ModelShape.from_dir(target), config["transformer_layer_config"]
            hidden_size = config.get("target_hidden_size") or layer["hidden_size"]
            if (shape.hidden_size, shape.vocab_size) == (hidden_size, layer["vocab_size"]):
                return path.parent
    return None
