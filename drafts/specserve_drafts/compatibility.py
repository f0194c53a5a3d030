"""Compatibility: for which target a draft was made, and which pretrained draft a target can use."""

import hashlib
from pathlib import Path
from typing import Final

import msgspec
from msgspec import Struct

from specserve.models.fields import ModelError, read_json
from specserve.models.shape import ModelShape
from specserve.speculation.drafter import DraftError
from specserve.text import Tokenizer

PRETRAINED: Final = Path(__file__).parent / "pretrained"


class Target(Struct, frozen=True):
    """The properties of a target that a draft must match.

    Weights may differ: a draft is still of use for a fine-tune of its target.
    """

    hidden_size: int
    num_layers: int
    vocab_size: int
    vocabulary: str  # SHA-256 of the JSON list of (id, token), ordered by id

    @classmethod
    def of(cls, directory: Path) -> "Target":
        """The properties of the model in `directory`. Raises ModelError."""
        shape = ModelShape.from_dir(directory)
        tokens = sorted(
            (index, token) for token, index in Tokenizer(directory).vocabulary().items()
        )
        digest = hashlib.sha256(msgspec.json.encode(tokens)).hexdigest()
        return cls(shape.hidden_size, shape.num_layers, shape.vocab_size, digest)


class DraftConfig(Struct, frozen=True):
    """config.json of a draft made by `specserve tune` that is not a neural network."""

    specserve_method: str
    target: Target


def read_config(directory: Path) -> DraftConfig:
    """Read config.json of such a draft. Raises DraftError, naming the file."""
    path = directory / "config.json"
    try:
        return msgspec.convert(read_json(path), DraftConfig)
    except (ModelError, msgspec.MsgspecError) as error:
        raise DraftError(f"draft: {path} cannot be read: {error}") from error


def check_compatible(directory: Path, target: Target) -> None:
    """Raises DraftError, naming the first difference, unless the draft in `directory` was made for
    a target with these properties."""
    made_for = read_config(directory).target
    for name in Target.__struct_fields__:
        if (made := getattr(made_for, name)) != (asked := getattr(target, name)):
            raise DraftError(
                f"draft: {directory} was made for a target with {name} {made}, and this one has "
                f"{asked}; use a draft of this target, or tune one: specserve tune --help"
            )


def pretrained_draft(method: str, target: Target) -> Path | None:
    """The directory of the pretrained draft of this method for a target; None: there is none."""
    for path in sorted(PRETRAINED.glob("*/config.json")):
        if "specserve_method" in read_json(path):
            config = read_config(path.parent)
            if config.specserve_method == method and config.target == target:
                return path.parent
    return None


def pretrained_head(target: Path) -> Path | None:
    """The directory of the pretrained EAGLE head for a target; None: there is none.

    Its layout records only the target's name, hidden size and vocabulary size. For a different
    model that has the same name and sizes the head drafts badly; the output is not affected.
    """
    for path in sorted(PRETRAINED.glob("*/config.json")):
        config = read_json(path)
        verifier = config.get("speculators_config", {}).get("verifier", {})
        if verifier.get("name_or_path") == target.name:
            shape, layer = ModelShape.from_dir(target), config["transformer_layer_config"]
            hidden_size = config.get("target_hidden_size") or layer["hidden_size"]
            if (shape.hidden_size, shape.vocab_size) == (hidden_size, layer["vocab_size"]):
                return path.parent
    return None
