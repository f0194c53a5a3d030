"""Does a head that `specserve tune eagle` exported load in `speculators`, and compute the same?

In the venv that make_speculators.py describes, which needs `pip install msgspec gguf` for this:

    PYTHONPATH=.:kernels:drafts:tests reference/bin/python tests/drafts/golden/check_export.py \
        HEAD --target TARGET

HEAD is the head's directory; TARGET is what it was trained for, as specserve takes it. Nothing is
fetched but the target. Exits with 1 if names or logits differ.
"""

import argparse
import json
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final

import torch
import torch.nn.functional as F
from eagle_chains import bound_drafter, chain_logits
from safetensors.torch import load_file, save_file
from speculators_reference import EMBEDDING, HEAD, WEIGHTS, load_reference, reference_logits
from torch import Tensor

from specserve.hub import resolve
from specserve.models.checkpoint import read_checkpoint

STEPS: Final = 3
NUM_TOKENS: Final = 32
TOLERANCE: Final = 1e-4
CONFIG: Final = "config.json"
# Of the target, which speculators reads there; the first two only where the file has none.
BORROWED: Final = {EMBEDDING, HEAD, "verifier_norm.weight", "verifier_lm_head.weight"}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("head", type=Path)
    parser.add_argument("--target", required=True)
    args = parser.parse_args()
    target = resolve(args.target)
    with TemporaryDirectory() as scratch:
        embedding, head = write_plain(target, Path(scratch))
        model = load_reference(args.head, Path(scratch))
    saved, loaded = load_file(args.head / WEIGHTS), model.state_dict()
    missing, unexpected = set(loaded) - set(saved) - BORROWED, set(saved) - set(loaded)
    changed = [
        name
        for name in set(saved) & set(loaded)
        if not torch.equal(loaded[name], saved[name].to(loaded[name].dtype))
    ]
    print(f"missing: {sorted(missing)}, unexpected: {sorted(unexpected)}, changed: {changed}")
    for name in (EMBEDDING, HEAD):
        print(f"{name}: {'in the file' if name in saved else 'of the target'}")

    def embed(ids: Tensor) -> Tensor:
        return F.embedding(ids, embedding)

    def unembed(rows: Tensor) -> Tensor:
        return F.linear(rows, head)

    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(len(embedding), (NUM_TOKENS,), generator=generator)
    states = torch.randn(NUM_TOKENS, model.fc.in_features, generator=generator)
    theirs = reference_logits(model, ids, states, STEPS)
    drafter = bound_drafter(args.head, target, embed, unembed)
    ours = chain_logits(drafter, ids, states, STEPS)
    worst = 0.0
    for step, (mine, other) in enumerate(zip(ours, theirs, strict=True)):
        assert torch.isfinite(other).all()
        difference = (mine - other).abs().max().item()
        print(f"step {step}: {tuple(other.shape)} logits, at most {difference:.1e} apart")
        worst = max(worst, difference)
    return int(bool(missing or unexpected or changed) or worst > TOLERANCE)


def write_plain(target: Path, folder: Path) -> tuple[Tensor, Tensor]:
    """What speculators reads of a target, as files that it reads; embedding and head."""
    config = json.loads((target / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(config))
    checkpoint = read_checkpoint(target)
    names = ["model.embed_tokens.weight", "model.norm.weight"]
    names += [] if config.get("tie_word_embeddings", False) else ["lm_head.weight"]
    tensors = {name: checkpoint.floats(name).float().contiguous() for name in names}
    save_file(tensors, folder / WEIGHTS)
    return tensors[names[0]], tensors.get("lm_head.weight", tensors[names[0]])


if __name__ == "__main__":
    sys.exit(main())
