"""Golden tensors of EAGLE-3: tiny random heads, and what the reference computes with them.

Writes `speculators/`: a target's embedding, and per head a checkpoint in bfloat16 and
`expected.safetensors`: what goes in, and the logits of three recurrent steps in float32, computed
by the package `speculators` from the files. Heads in the layout of speculators are saved by it;
those of EAGLE-3's authors and of SpecForge get their names here. To make them again, which gives
the same tensors:

    python3.11 -m venv reference
    reference/bin/pip install torch==2.13.0 speculators==0.9.0 transformers==5.19.0
    PYTHONPATH=tests reference/bin/python tests/drafts/golden/make_speculators.py

A torch for CPUs wants a torchvision for CPUs; without any, speculators does as well.
"""

import json
import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final, Literal

import torch
from safetensors.torch import load_file, save_file
from speculators import SpeculatorsConfig, VerifierConfig
from speculators.convert import convert_model
from speculators.models.eagle3 import (
    Eagle3DraftModel,
    Eagle3SpeculatorConfig,
)
from speculators.proposals import GreedyTokenProposalConfig
from speculators_reference import EMBEDDING, WEIGHTS, load_reference, reference_logits
from transformers import LlamaConfig, Qwen3Config

FOLDER: Final = Path(__file__).with_name("speculators")
TARGET: Final = "target"
STEPS: Final = 3
NUM_TOKENS: Final = 7
HIDDEN, VOCAB, DRAFT_VOCAB, TARGET_LAYERS = 32, 96, 48, 8
CONFIG: Final = "config.json"
LAYER: Final[dict[str, Any]] = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 10,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 256,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
}
LLAMA3: Final = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN: Final = {
    "rope_type": "yarn",
    "rope_theta": 500.0,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
}


@dataclass(frozen=True)
class Head:
    """`aux_layers` are the layers entered; None: not in the file, the authors' choice."""

    layout: Literal["speculators", "authors", "specforge"] = "speculators"
    flags: dict[str, bool] = field(default_factory=dict)
    layer: dict[str, Any] = field(default_factory=dict)
    model_type: Literal["llama", "qwen3"] = "llama"
    draft_vocab: int = DRAFT_VOCAB
    aux_layers: tuple[int, ...] | None = (1, 4, 8)


HEADS: Final = {
    "eagle3": Head(),
    "norm_before": Head(
        flags={"norm_before_residual": True, "norm_before_fc": True},
        layer={"attention_bias": True, "mlp_bias": True, "rope_parameters": LLAMA3},
    ),
    "eagle31": Head(flags={"norm_before_residual": True, "fc_norm": True, "norm_output": True}),
    "qwen3": Head(
        flags={"norm_output": True},
        layer={"num_hidden_layers": 2, "rope_parameters": YARN},
        model_type="qwen3",
        draft_vocab=VOCAB,
        aux_layers=(0, 6),
    ),
    "authors": Head("authors", aux_layers=None),
    "specforge31": Head("specforge", flags={"fc_norm": True, "norm_output": True}),
}


def main() -> None:
    shutil.rmtree(FOLDER, ignore_errors=True)
    FOLDER.mkdir()
    os.chdir(FOLDER)  # checkpoints name their target by a path from here
    generator = torch.Generator().manual_seed(0)
    write_target(generator)
    for name, head in HEADS.items():
        make_head(Path(name), head, generator)


def write_target(generator: torch.Generator) -> None:
    """What a head takes from its target: the embedding, and the shape to fit."""
    config = LlamaConfig(
        **LAYER | {"num_hidden_layers": TARGET_LAYERS, "tie_word_embeddings": True}
    )
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(TARGET)
    embedding = torch.randn(VOCAB, HIDDEN, generator=generator)
    norm = 1 + 0.2 * torch.randn(HIDDEN, generator=generator)
    tensors = {"model.embed_tokens.weight": embedding, "model.norm.weight": norm}
    save_file({n: t.bfloat16() for n, t in tensors.items()}, f"{TARGET}/{WEIGHTS}")


def make_head(path: Path, head: Head, generator: torch.Generator) -> None:
    model = random_head(head, generator)
    own = head.layout == "speculators"
    with TemporaryDirectory() as scratch:
        saved = path if own else Path(scratch) / "head"
        model.save_pretrained(saved)
        for file in saved.glob("*.py"):  # source of speculators, beside what it saves
            file.unlink()
        states = torch.randn(NUM_TOKENS, model.fc.in_features, generator=generator) * 2
        ids = torch.randint(VOCAB, (NUM_TOKENS,), generator=generator)
        reference = load_reference(saved)
        logits = reference_logits(reference, ids, states, STEPS)
        if not own:
            rename(saved, path, head)
        if head.layout == "authors":  # whose layout speculators reads too
            converted = Path(scratch) / "converted"
            convert_model(str(path), TARGET, "eagle3", str(converted))
            again = reference_logits(load_reference(converted), ids, states, STEPS)
            assert all(map(torch.equal, logits, again))
    layers = torch.tensor(reference.target_layer_ids)
    expected = {"layers": layers, "input_ids": ids, "aux_hidden_states": states}
    expected |= {f"logits.{step}": rows for step, rows in enumerate(logits)}
    save_file(expected, path / "expected.safetensors")


def random_head(head: Head, generator: torch.Generator) -> Any:
    """In bfloat16. Norms and biases count, and logits are some units apart."""
    config_class = LlamaConfig if head.model_type == "llama" else Qwen3Config
    speculation = SpeculatorsConfig(
        algorithm="eagle3",
        proposal_methods=[GreedyTokenProposalConfig(speculative_tokens=STEPS)],
        default_proposal_method="greedy",
        verifier=VerifierConfig(name_or_path=TARGET, architectures=["LlamaForCausalLM"]),
    )
    config = Eagle3SpeculatorConfig(
        transformer_layer_config=config_class(**LAYER | head.layer),
        draft_vocab_size=head.draft_vocab,
        eagle_aux_hidden_state_layer_ids=None if head.aux_layers is None else list(head.aux_layers),
        speculators_config=speculation,
        **head.flags,
    )
    model = Eagle3DraftModel(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if name.endswith("bias"):
                noise *= 0.2
            elif noise.ndim == 1:
                noise = 1 + 0.2 * noise
            elif "embed_tokens" not in name:
                noise *= (3 if "lm_head" in name else 1) * noise.shape[-1] ** -0.5
            parameter.copy_(noise)
    if head.draft_vocab < VOCAB:
        ids = torch.randperm(VOCAB, generator=generator)[: head.draft_vocab].sort().values
        t2d = torch.zeros(VOCAB, dtype=torch.bool).index_fill(0, ids, True)
        model.load_vocab_mappings(t2d, ids - torch.arange(head.draft_vocab))
    if head.layout != "speculators":  # the embedding is the target's
        embedding = load_file(f"{TARGET}/{WEIGHTS}")["model.embed_tokens.weight"]
        model.embed_tokens.load_state_dict({"weight": embedding})
    return model.bfloat16()


def rename(saved: Path, path: Path, head: Head) -> None:
    """The same head as EAGLE-3's authors and SpecForge publish them."""
    path.mkdir()
    tensors = {n: t for n, t in load_file(saved / WEIGHTS).items() if n != EMBEDDING}
    renamed = {name.replace("layers.0.", "midlayer."): tensor for name, tensor in tensors.items()}
    save_file(renamed, path / WEIGHTS)
    ours = json.loads((saved / CONFIG).read_text())["transformer_layer_config"]
    config = {name: ours[name] for name in LAYER if name != "rope_parameters"} | {
        "model_type": "llama",
        "hidden_act": "silu",
        "rope_theta": ours["rope_parameters"]["rope_theta"],
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "draft_vocab_size": head.draft_vocab,
    }
    if head.layout == "authors":
        config["architectures"] = ["LlamaForCausalLM"]
    else:
        config |= {"architectures": ["LlamaForCausalLMEagle3"], **head.flags}
    if head.aux_layers is not None:  # the layers left, there
        ids = [layer - 1 for layer in head.aux_layers]
        config["eagle_config"] = {"eagle_aux_hidden_state_layer_ids": ids}
    (path / CONFIG).write_text(json.dumps(config, indent=2) + "\n")


if __name__ == "__main__":
    main()
