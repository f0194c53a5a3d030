"""Training steps, the moving average of the weights, and the check on held-out answers.

Knows no time and no progress on disk: the progress of the run is passed to each step as a fraction.
"""

import copy
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import ClassVar, Final, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch
from msgspec import Struct
from torch import Tensor, nn

from specserve.models.checkpoint import Checkpoint
from specserve.models.shape import ModelShape
from specserve_drafts.tune.head_loss import Wanted, head_loss
from specserve_drafts.tune.head_settings import HeadSettings
from specserve_drafts.tune.muon import MuonAdamW
from specserve_drafts.tune.teacher import Lesson, Teacher
from specserve_drafts.tune.texts import Text
from specserve_drafts.tune.vocabulary import head_rows

_STEP_WEIGHT: Final = 0.8  # ratio of the loss weights of consecutive chain steps (EAGLE-3)
_WARM_UP: Final = 0.04  # fraction of the run in which learning rates rise
_CLIP: Final = 1.0  # limit of the norm of all gradients together
_EMA: Final = 0.999  # decay of the moving average per step
_LOGIT_ROWS: Final = 512  # rows whose logits exist at once in a check
_OPTIMISER: Final = "optimiser."  # prefix of the names of its tensors in a saved state


class Stepped(NamedTuple):
    """Measurements of a training step, from before its update.

    They stay on the device: reading one waits for it, and until then the host can prepare the next
    step while a GPU computes this one.
    """

    num_tokens: int  # answer tokens trained on
    loss: Tensor  # scalar
    coverage: Tensor  # scalar, the target's mean probability mass on the draft vocabulary
    accepted: Tensor  # [depth], mean of sum_v min(p, q) per chain step, at temperature 1


class Checked(Struct, frozen=True):
    """The acceptance of drafted chains on greedy answers, with the averaged weights."""

    tau: float  # tokens per forward pass, the target's own token included
    conditional: tuple[float, ...]  # c_k: P(token k is right, given that those before it are)


class Chains(Protocol):
    """M chains over some texts, one text after the other, with all inputs of the heads."""

    @property
    def left(self) -> Tensor: ...  # [M] int64, answer tokens from the first predicted one on

    def step_rows(self, step: int) -> Tensor:
        """[M] int64: the answer token that each chain predicts at `step`, counted over all texts;
        past the end of a text its last one."""


class Method(Protocol):
    """The interface of a method, such as EAGLE or Medusa, that trains heads."""

    Settings: ClassVar[type[HeadSettings]]
    name: str  # of the command
    kind: str  # of heads, for the model card
    layout: str  # a sentence on the layout of the checkpoints

    def __init__(self, settings: HeadSettings) -> None: ...

    def aux_layers(self, target: ModelShape) -> tuple[int, ...]:
        """The layers whose input hidden states the heads read; num_layers: the output of the last
        one. Raises ValueError."""
        ...

    def begin(
        self,
        checkpoint: Checkpoint,  # the target's
        teacher: Teacher,
        last: Tensor,  # [n, hidden_size], some outputs of the target's last layer
        draft_vocab: int,
    ) -> nn.Module:
        """The initial heads, on the teacher's device. Called with `Chains`, they yield hidden
        states [M, hidden_size] for each chain step, inputs of the target's LM head."""
        ...

    def lay_out(self, texts: Sequence[Text], lesson: Lesson, teacher: Teacher) -> Chains:
        """The input of the heads for some texts."""
        ...

    def export(self, folder: Path, target: Path, trainer: "Trainer", counts: Tensor) -> None:
        """Write weights and config of `trainer.average` to `folder`, atomically per file.

        target: the target's directory. counts: [vocab_size] int64, occurrences of each token in all
        training texts.
        """
        ...

    def about(self, trainer: "Trainer", target: str, coverage: float) -> str:
        """Inputs and weights of the heads, in sentences.

        coverage: the target's probability mass on the draft vocabulary.
        """
        ...


HeldOut = tuple[Chains, Tensor]  # some held-out texts; their answers: [num_answer_tokens] int64


class Trainer:
    """Trains the heads of `method`. The rows of the target's LM head are not trained."""

    def __init__(
        self,
        settings: HeadSettings,
        method: Method,
        teacher: Teacher,
        checkpoint: Checkpoint,  # the target's
        last: Tensor,  # [n, hidden_size], see `Method.begin`
        token_ids: Tensor,  # [draft_vocab] int64
    ) -> None:
        self._settings, self._method, self._teacher = settings, method, teacher
        shape, self.device = teacher.model.shape, teacher.device
        self.head = method.begin(checkpoint, teacher, last, len(token_ids))
        self.average = copy.deepcopy(self.head).requires_grad_(False)
        self._heads = nn.ModuleDict({"head": self.head, "average": self.average})
        self.token_ids = token_ids.to(self.device)
        whole = len(token_ids) == shape.vocab_size
        self._drafted_ids = None if whole else self.token_ids
        # Of the target's LM head, for `token_ids`: [draft_vocab, hidden_size] float32.
        self.rows = head_rows(checkpoint, shape, token_ids).to(self.device)
        dtype = torch.float32 if settings.precision == "float32" else torch.bfloat16
        self._rows = self.rows.to(dtype)
        self._autocast = dtype != torch.float32
        self._parameters = dict(self.head.named_parameters())
        self._optimiser = MuonAdamW(self._parameters, weight_decay=settings.weight_decay)
        self.num_steps = 0

    def step(self, texts: Sequence[Text], progress: float) -> Stepped:
        """Train on one batch; `progress`, from 0 to 1, sets the learning rates and the loss."""
        settings = self._settings
        lesson = self._teacher.read(texts)
        wanted = Wanted.of(self._teacher.likely(lesson.last, self._drafted_ids))
        chains = self._method.lay_out(texts, lesson, self._teacher)
        hybrid = progress >= settings.kl_first
        loss, accepted = torch.zeros((), device=self.device), []
        with self._cast():
            for step, out in enumerate(self.head(chains)):
                valid = (chains.left > step).float()
                mean = valid / valid.sum().clamp_min(1)
                weights = mean * _STEP_WEIGHT**step
                rows = chains.step_rows(step)
                part, acceptance = head_loss(out, self._rows, wanted, rows, weights, hybrid)
                loss = loss + part
                accepted.append((acceptance * mean).sum())
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(self._parameters.values(), _CLIP)
        rate = schedule(progress)
        self._optimiser.step(matrix_lr=rate * settings.matrix_lr, other_lr=rate * settings.other_lr)
        self.head.zero_grad()
        self.num_steps += 1
        self._follow()
        accepted_rates = torch.stack(accepted)
        return Stepped(len(lesson.last), loss.detach(), wanted.mass.mean(), accepted_rates)

    def hold_out(self, texts: Sequence[Text]) -> list[HeldOut]:
        """Prepare held-out texts for `check`, in batches of the size of a training step."""
        parts: list[list[Text]] = [[]]
        for text in texts:
            if sum(other.num_answer for other in parts[-1]) >= self._settings.step_tokens:
                parts.append([])
            parts[-1].append(text)
        return [self._hold(part) for part in parts]

    @torch.no_grad()
    def check(self, held: Sequence[HeldOut]) -> Checked:
        """Measure the averaged weights on held-out answers."""
        hits, left = [], []
        for chains, answers in held:
            with self._cast():
                steps = [self._guesses(out) for out in self.average(chains)]
            right = [
                (guess == answers[chains.step_rows(k)]) & (chains.left > k)
                for k, guess in enumerate(steps)
            ]
            hits.append(torch.stack(right, 1).cpu().numpy())
            left.append(chains.left.cpu().numpy())
        return chain_acceptance(np.concatenate(hits), np.concatenate(left))

    def tensors(self) -> dict[str, Tensor]:
        """The complete state, for `load`, on the CPU."""
        tensors = self._heads.state_dict() | {"vocab.ids": self.token_ids}
        tensors |= {f"{_OPTIMISER}{n}": tensor for n, tensor in self._optimiser.tensors().items()}
        return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}

    def load(self, tensors: Mapping[str, Tensor], num_steps: int) -> None:
        """Restore the state that `tensors` returned after `num_steps` steps."""
        self._heads.load_state_dict({name: tensors[name] for name in self._heads.state_dict()})
        parts = {name.removeprefix(_OPTIMISER): tensor for name, tensor in tensors.items()}
        self._optimiser.load(parts)
        self.num_steps = num_steps

    def _cast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self._autocast)

    def _hold(self, texts: Sequence[Text]) -> HeldOut:
        answers = np.concatenate([text.tokens[text.num_prompt :] for text in texts])
        chains = self._method.lay_out(texts, self._teacher.read(texts), self._teacher)
        return chains, torch.from_numpy(answers.astype(np.int64)).to(self.device)

    def _guesses(self, out: Tensor) -> Tensor:
        """The most likely tokens: [n, hidden_size] -> [n] int64."""
        head = self._rows.T
        best = [(x.to(head.dtype) @ head).float().argmax(-1) for x in torch.split(out, _LOGIT_ROWS)]
        return self.token_ids[torch.cat(best)]

    @torch.no_grad()
    def _follow(self) -> None:
        """Update the moving average; its decay is lower in the first steps, so that the initial
        weights fade fast."""
        decay = min(_EMA, (1 + self.num_steps) / (10 + self.num_steps))
        for own, new in zip(self.average.parameters(), self.head.parameters(), strict=True):
            own.lerp_(new, 1 - decay)


def schedule(progress: float) -> float:
    """The factor of the learning rates at `progress` from 0 to 1: linear warm-up, then cosine decay
    to 0 (Loshchilov and Hutter 2017)."""
    if progress < _WARM_UP:
        return (progress + 0.1 * _WARM_UP) / (1.1 * _WARM_UP)
    done = min(1.0, (progress - _WARM_UP) / (1 - _WARM_UP))
    return 0.5 * (1 + math.cos(math.pi * done))


def chain_acceptance(hits: npt.NDArray[np.bool_], left: npt.NDArray[np.int64]) -> Checked:
    """The acceptance figures of M chains.

    hits: [M, depth], whether step k of chain m predicted the right token. left: [M], answer tokens
    from the chain's first to the text's end. For tau every text is walked as in serving: each
    forward pass emits the accepted tokens and one more.
    """
    alive = np.logical_and.accumulate(hits, 1)
    conditional = []
    for step in range(hits.shape[1]):
        tried = left > step
        if step:
            tried = tried & alive[:, step - 1]
        conditional.append(float(alive[tried, step].mean()) if tried.any() else 0.0)
    lengths = alive.sum(1)
    place = num_passes = 0
    while place < len(left):
        num_passes += 1
        place += min(int(lengths[place]) + 1, int(left[place]))
    return Checked(len(left) / max(num_passes, 1), tuple(conditional))
