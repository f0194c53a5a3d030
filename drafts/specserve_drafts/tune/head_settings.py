"""The settings of a training run of heads. The defaults are for a CPU; see drafts/experiments."""

from typing import Annotated, ClassVar, Literal

from msgspec import Meta

from specserve.speculation.drafter import Probability
from specserve_drafts.tune.settings import Count, RunSettings


class HeadSettings(RunSettings, frozen=True, forbid_unknown_fields=True):
    HELP: ClassVar[dict[str, str]] = RunSettings.HELP | {
        "draft_vocab": "tokens that the head can propose: those most often likely to the target",
        "max_len": "most tokens of a prompt with its answer; the rest is not trained on",
        "step_tokens": "answer tokens per optimizer step",
        "share": "with --minutes: least fraction of the time that the target answers prompts; "
        "0: train on the answers in DIR/data only",
        "repeats": "times that each answer is trained on before the target answers more prompts",
        "matrix_lr": "learning rate of matrices (Muon)",
        "other_lr": "learning rate of vectors (AdamW)",
        "weight_decay": "weight decay of matrices",
        "kl_first": "fraction of the run with KL divergence as the loss; then total variation is "
        "mixed in",
        "check_every": "optimizer steps between two evaluations on the held-out answers",
        "precision": "data type of the matrix products in training",
        "learn": "answers: train on the tokens of answers only; texts: on those of prompts too",
    }
    FREE: ClassVar[frozenset[str]] = RunSettings.FREE | {"check_every"}

    max_tokens: Annotated[int, Meta(ge=2, le=2**20)] = 256
    draft_vocab: Annotated[int, Meta(ge=2, le=2**24)] = 8192
    max_len: Annotated[int, Meta(ge=8, le=2**20)] = 512
    step_tokens: Count = 1024
    share: Annotated[float, Meta(ge=0, le=0.95)] = 0.35
    repeats: Annotated[int, Meta(ge=1, le=1000)] = 2
    matrix_lr: Probability = 6e-3
    other_lr: Probability = 1e-3
    weight_decay: Probability = 0.01
    kl_first: Probability = 0.3
    check_every: Annotated[int, Meta(ge=1, le=10**6)] = 25
    precision: Literal["float32", "bfloat16"] = "float32"
    learn: Literal["answers", "texts"] = "answers"
