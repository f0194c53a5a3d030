"""A tiny target that heads can learn within seconds, and prompts for it."""

from pathlib import Path

from safetensors.torch import load_file, save_file
from tiny_chat import write_tiny_chat

NUM_PROMPTS = 28


def write_predictable(model: Path, directory: Path) -> None:
    """The tiny model, its layers turned down: the next token hardly depends on but the last."""
    write_tiny_chat(model, directory)
    tensors = load_file(directory / "model.safetensors")
    for name in tensors:
        if "o_proj" in name or "down_proj" in name:
            tensors[name] *= 0.05
    save_file(tensors, directory / "model.safetensors")


def prompts() -> list[str]:
    return [f"w{n} w{n + 1} w{n + 2}" for n in range(NUM_PROMPTS)]
