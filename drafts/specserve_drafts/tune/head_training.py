"""One optimiser step, the average of the weights, and a look at held-out answers.

Knows no files, no time and no method: how far a run is comes as a fraction with each step, and
heads are any module that makes rows for the target's own head of what it finds in `Chains`.
"""

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

import numpy as np
import numpy.typing as npt
import torch
from msgspec import Struct
from torch import Tensor, nn

from specserve_drafts.tune.head_loss import Wanted, head_loss
from specserve_drafts.tune.head_settings import HeadSettings
from specserve_drafts.tune.muon import MuonAdamW
from specserve_drafts.tune.teacher import Lesson, Teacher
from specserve_drafts.tune.texts import Text

_STEP_WEIGHT: Final = 0.8  # of each step of the chain against the one before (EAGLE-3)
_WARM_UP: Final = 0.04  # share of the run in which learning rates rise
_CLIP: Final = 1.0  # norm of all gradients together
_EMA: Final = 0.999
_LOGIT_ROWS: Final = 512


@dataclass(frozen=True, slots=True)
class Stepped:
    """What a step saw before it changed anything. Its figures wait for the device when they are
    read, not before: the next step can be prepared while a GPU is at work on this one."""

    num_tokens: int  # of answers
    _figures: Tensor  # [2 + depth] float32

    @property
    def loss(self) -> float:
        return float(self._figures[0])

    @property
    def coverage(self) -> float:
        """The target's mass on the draft vocabulary."""
        return float(self._figures[1])

    @property
    def accepted(self) -> tuple[float, ...]:
        """Per token of the chain: mean of sum min(p, q), at temperature 1."""
        return tuple(self._figures[2:].tolist())


class Checked(Struct, frozen=True):
    """Greedy answers drafted for by chains, with the averaged weights."""

    tau: float  # tokens per pass, the target's own included
    conditional: tuple[float, ...]  # c_k: token k right, given those before it were


class Chains(Protocol):
    """M chains over some texts, one text after the other, with all that a head reads of them."""

    @property
    def left(self) -> Tensor: ...  # [M] int64, answer tokens from a chain's first guess on

    def step_rows(self, step: int) -> Tensor:
        """[M] int64: the answer token that each chain guesses at `step`, of those of all texts;
        the last one of its text past the end."""


LayOut = Callable[[Sequence[Text], Lesson], Chains]


@dataclass(frozen=True, slots=True)
class HeldOut:
    """Some texts, and what the target gave for them."""

    chains: Chains
    answers: Tensor  # [num_answer_tokens] int64


class Trainer:
    """`head`, called with `Chains`, yields rows [M, hidden_size] per step. `rows` is the target's
    head for `token_ids`, and stays as it is."""

    def __init__(
        self,
        settings: HeadSettings,
        head: nn.Module,
        lay_out: LayOut,
        teacher: Teacher,
        token_ids: Tensor,  # [draft_vocab] int64
        rows: Tensor,  # [draft_vocab, hidden_size] float32
    ) -> None:
        self._settings, self._teacher, self._lay_out = settings, teacher, lay_out
        self.device = teacher.device
        self.head = head
        self.average = copy.deepcopy(head).requires_grad_(False)
        self.token_ids = token_ids.to(self.device)
        whole = len(token_ids) == teacher.model.shape.vocab_size
        self._drafted_ids = None if whole else self.token_ids
        self.rows = rows.to(self.device)
        dtype = torch.float32 if settings.precision == "float32" else torch.bfloat16
        self._rows = self.rows.to(dtype)
        self._autocast = dtype != torch.float32
        self._parameters = dict(self.head.named_parameters())
        self._optimiser = MuonAdamW(self._parameters, weight_decay=settings.weight_decay)
        self.num_steps = 0

    def step(self, texts: Sequence[Text], progress: float) -> Stepped:
        """Learn from texts; `progress` from 0 to 1 sets the learning rates and the loss."""
        settings = self._settings
        lesson = self._teacher.read(texts)
        wanted = Wanted.of(self._teacher.likely(lesson.last, self._drafted_ids))
        chains = self._lay_out(texts, lesson)
        hybrid = progress >= settings.kl_first
        loss, accepted = torch.zeros((), device=self.device), []
        with self._cast():
            for step, out in enumerate(self.head(chains)):
                valid = (chains.left > step).float()
                mean = valid / valid.sum().clamp_min(1)
                weights = mean * _STEP_WEIGHT**step
                rows = chains.step_rows(step)
                part, shares = head_loss(out, self._rows, wanted, rows, weights, hybrid)
                loss = loss + part
                accepted.append((shares * mean).sum())
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(self._parameters.values(), _CLIP)
        rate = schedule(progress)
        self._optimiser.step(matrix_lr=rate * settings.matrix_lr, other_lr=rate * settings.other_lr)
        self.head.zero_grad()
        self.num_steps += 1
        self._follow()
        figures = torch.stack((loss.detach(), wanted.mass.mean(), *accepted))
        return Stepped(len(lesson.last), figures)

    def hold_out(self, texts: Sequence[Text]) -> list[HeldOut]:
        """Read once; a step's worth at a time."""
        held, part = [], list[Text]()
        for index, text in enumerate(texts):
            part.append(text)
            if sum(t.num_answer for t in part) >= self._settings.step_tokens or (
                index + 1 == len(texts)
            ):
                held.append(self._hold(part))
                part = []
        return held

    @torch.no_grad()
    def check(self, held: Sequence[HeldOut]) -> Checked:
        hits, left = [], []
        for part in held:
            with self._cast():
                steps = [self._guesses(out) for out in self.average(part.chains)]
            right = [
                (guess == part.answers[part.chains.step_rows(k)]) & (part.chains.left > k)
                for k, guess in enumerate(steps)
            ]
            hits.append(torch.stack(right, 1).cpu().numpy())
            left.append(part.chains.left.cpu().numpy())
        return chain_acceptance(np.concatenate(hits), np.concatenate(left))

    def tensors(self) -> dict[str, Tensor]:
        """All that going on takes."""
        parts = {
            "head": self.head.state_dict(),
            "average": self.average.state_dict(),
            "optimiser": self._optimiser.tensors(),
            "vocab": {"ids": self.token_ids},
        }
        return {
            f"{kind}.{name}": tensor.detach().cpu().contiguous()
            for kind, tensors in parts.items()
            for name, tensor in tensors.items()
        }

    def load(self, tensors: Mapping[str, Tensor], num_steps: int) -> None:
        def of(kind: str) -> dict[str, Tensor]:
            prefix = f"{kind}."
            return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}

        self.head.load_state_dict(of("head"))
        self.average.load_state_dict(of("average"))
        self._optimiser.load(of("optimiser"))
        self.num_steps = num_steps

    def _cast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self._autocast)

    def _hold(self, texts: Sequence[Text]) -> HeldOut:
        answers = np.concatenate([text.tokens[text.num_prompt :] for text in texts])
        return HeldOut(
            self._lay_out(texts, self._teacher.read(texts)),
            torch.from_numpy(answers.astype(np.int64)).to(self.device),
        )

    def _guesses(self, out: Tensor) -> Tensor:
        """[n, hidden_size] -> [n] int64, the best tokens."""
        head = self._rows.T
        best = [(x.to(head.dtype) @ head).float().argmax(-1) for x in torch.split(out, _LOGIT_ROWS)]
        return self.token_ids[torch.cat(best)]

    @torch.no_grad()
    def _follow(self) -> None:
        """The average forgets its beginning fast while the run is young."""
        decay = min(_EMA, (1 + self.num_steps) / (10 + self.num_steps))
        for own, new in zip(self.average.parameters(), self.head.parameters(), strict=True):
            own.lerp_(new, 1 - decay)


def schedule(progress: float) -> float:
    """Up in a line, down in a cosine (Loshchilov and Hutter 2017)."""
    if progress < _WARM_UP:
        return (progress + 0.1 * _WARM_UP) / (1.1 * _WARM_UP)
    done = min(1.0, (progress - _WARM_UP) / (1 - _WARM_UP))
    return 0.5 * (1 + math.cos(math.pi * done))


def chain_acceptance(hits: npt.NDArray[np.bool_], left: npt.NDArray[np.int64]) -> Checked:
    """`hits`: [M, depth], step k of chain m drafted the right token; `left`: [M], answer tokens
    from there on. Every text is walked as serving would: what was accepted, and one more."""
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
