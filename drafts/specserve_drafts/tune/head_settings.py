"""The settings of a training run of heads. The defaults are for a CPU; see drafts/experiments."""

from typing import ClassVar, Literal

from specserve_drafts.tune.settings import RunSettings


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
    RANGES: ClassVar[dict[str, tuple[float, float]]] = RunSettings.RANGES | {
        "max_tokens": (2, 2**20),
        "draft_vocab": (2, 2**24),
        "max_len": (8, 2**20),
        "step_tokens": (1, 2**20),
        "share": (0.0, 0.95),
        "repeats": (1, 1000),
        "matrix_lr": (0.0, 1.0),
        "other_lr": (0.0, 1.0),
        "weight_decay": (0.0, 1.0),
        "kl_first": (0.0, 1.0),
        "check_every": (1, 10**6),
    }
    FREE: ClassVar[frozenset[str]] = RunSettings.FREE | {"check_every"}

    draft_vocab: int = 8192
    max_len: int = 512
    step_tokens: int = 1024
    share: float = 0.35
    repeats: int = 2
    matrix_lr: float = 6e-3
    other_lr: float = 1e-3
    weight_decay: float = 0.01
    kl_first: float = 0.3
    check_every: int = 25
    precision: Literal["float32", "bfloat16"] = "float32"
    learn: Literal["answers", "texts"] = "answers"
