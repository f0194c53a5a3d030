"""A tiny target that heads can learn within seconds, and prompts for it."""

import shlex
from pathlib import Path

from safetensors.torch import load_file, save_file
from tiny_chat import write_tiny_chat

from specserve.cli.parser import build_parser, engine_config
from specserve_drafts.tune.gain import Gain

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


def assert_served(out: str, folder: Path, gain: Gain) -> None:
    """Assert that the last line of a command says what was gained and how to serve it."""
    found, _, command = out.splitlines()[-1].partition("; ")
    assert found == f"{folder / 'out'}: {gain}"
    assert gain.num_prompts > 0
    assert gain.tokens_per_pass >= 1.0
    assert min(gain.tokens_per_s, gain.plain_tokens_per_s) > 0
    words = shlex.split(command)
    assert words[0] == "specserve"
    config = engine_config(build_parser().parse_args(words[1:]))
    assert config.draft.draft == (str(folder / "out"),)
    assert (config.target.target, config.target.dtype) == (str(folder / "tiny"), "float32")
    assert config.target.max_model_len == 128
