"""A training run: alternates between generating answers and training steps, saves its state every
half minute, and exports the head whenever a check finds it to be the best so far. It ends early
enough that all of the command is done when its time is up.

All randomness is a function of the seed and of the run's progress, so a run that was killed repeats
the same steps after resuming.
"""

import argparse
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final, Literal

import msgspec
import numpy as np
import torch
from torch import Tensor

from specserve.config import TargetConfig
from specserve.hub import resolve
from specserve.llm import LLM
from specserve.models.checkpoint import read_checkpoint
from specserve.models.shape import ModelShape
from specserve_drafts.atomic_write import write_json
from specserve_drafts.tune.answers import SHARD_PROMPTS, Answers
from specserve_drafts.tune.card import check_curve
from specserve_drafts.tune.clock import SAVE_EVERY_S, Clock, Progress
from specserve_drafts.tune.command import open_llm
from specserve_drafts.tune.head_card import HeadPoint, draw_head_curve
from specserve_drafts.tune.head_settings import HeadSettings
from specserve_drafts.tune.head_state import State, load_tensors, save
from specserve_drafts.tune.head_training import Method, Stepped, Trainer
from specserve_drafts.tune.prompt_file import training_prompts
from specserve_drafts.tune.run_state import STATE, open_state
from specserve_drafts.tune.settings import lasting_settings
from specserve_drafts.tune.teacher import Teacher
from specserve_drafts.tune.texts import Text, batches, whole_texts
from specserve_drafts.tune.vocabulary import draft_vocabulary
from specserve_evals.progress import track

# Shares of the time that answers may take before the first training step.
_HELD_OUT_SHARE: Final = 0.1
_FIRST_SHARD_SHARE: Final = 0.25
DATA: Final = "data"  # subdirectory of the output directory with the answers


class Run:
    """One run, new or resumed. Raises ValueError."""

    def __init__(
        self,
        args: argparse.Namespace,
        settings: HeadSettings,
        target: TargetConfig,
        method: Method,
        clock: Clock,
        progress: Progress,
    ) -> None:
        self.settings, self._out, self._method = settings, args.out, method
        self._clock, self._progress = clock, progress
        check_curve()
        prompts = training_prompts(args.prompts, args.exclude, settings.seed)
        self.num_excluded, self._num_prompts = prompts.num_excluded, len(prompts.learned)
        lasting = lasting_settings(args, settings, target)
        self.state = open_state(State, args.out, lasting, resume=args.resume)
        clock.resume(self.state.seconds)
        self._num_generated = 0
        # The longest time that one took, to know what there is time for.
        self._check_s = self._save_s = self._shard_s = 0.0
        self.llm = open_target(settings, target)
        self._target, platform = resolve(target.target), self.llm.engine.platform
        shape, quantization = self.llm.engine.shape, self.llm.config.target.quantization
        layers = method.aux_layers(shape)
        self._teacher = Teacher(self._target, platform, quantization, layers, settings.max_len)
        if not args.resume:
            write_json(args.out / STATE, self.state)
        folder = args.out / DATA
        self._answers = Answers(
            self.llm, prompts.learned, settings, folder, self._teacher, lasting, self._tick
        )
        self.held_out = prompts.held_out
        with self._timed("answering"):
            held_out = self._answers.held_out(prompts.held_out, self._clock.within(_HELD_OUT_SHARE))
            self._counts = torch.zeros(shape.vocab_size, dtype=torch.int64)
            for index in range(len(self.state.passes)):
                self._count_tokens(self._answers.shard(index))
            if not self.state.passes:
                self._add_shard(self._clock.within(_FIRST_SHARD_SHARE))
                while self._answers.has(len(self.state.passes)):  # answered by an earlier run
                    self._add_shard()
        if not held_out:
            raise ValueError(f"max_len: {settings.max_len} has no room for the prompts' answers")
        self.show("preparing the heads")
        self.trainer = self._trainer()
        self._held = self.trainer.hold_out(held_out)
        self._recent: list[Stepped] = []
        self._parts: list[list[Text]] = []  # batches of the shard that is trained on

    @property
    def num_prompts(self) -> int:
        """Different prompts answered so far."""
        return min(len(self.state.passes) * SHARD_PROMPTS, self._num_prompts)

    def learn(self) -> None:
        """Train until the limit of time or tokens, then check and save."""
        if not self.state.curve:
            self._check()  # of the untrained heads
        self._save()
        saved = time.monotonic()
        while self.progress < 1:
            if self._wants_answers() and (room := self._room()) > self._shard_s:
                with self._timed("answering"):
                    self._add_shard(time.monotonic() + room)
            else:
                with self._timed("training"):
                    self._train(self.progress)
                if self.state.num_steps % self.settings.check_every == 0:
                    self._check()
            if time.monotonic() - saved >= SAVE_EVERY_S:
                self._save()
                saved = time.monotonic()
            self.show(self._label())
        if self.state.curve[-1].num_steps < self.state.num_steps:
            self._check()
        self._save()

    def show(self, label: str) -> None:
        self._progress(self.state.num_tokens, label)

    @property
    def progress(self) -> float:
        """The fraction of the training that is done. If the time is limited: of the time that there
        will have been for training, not for answers."""
        if self.settings.tokens:
            return self.state.num_tokens / self.settings.tokens
        left = self._left() * (1 - self.settings.share)
        return self.state.training / (self.state.training + left) if left else 1.0

    def _left(self) -> float:
        """Seconds until the last check has to begin."""
        closing = self._check_s + self._save_s
        return max(0.0, self._clock.end_of_learning - closing - time.monotonic())

    def _room(self) -> float:
        """Seconds that the next answers may take, so that there is time to train on them."""
        return self._left() if self.settings.tokens else self.settings.share * self._left()

    def _tick(self, num_tokens: int) -> None:
        self._num_generated += num_tokens
        self.show(f"answering, {self._num_generated} tokens")

    def _wants_answers(self) -> bool:
        """Whether to answer another shard next, rather than train."""
        settings, state = self.settings, self.state
        learned = state.shard < 0 and min(state.passes) >= settings.repeats
        if settings.tokens:
            return learned
        share = settings.share * (state.answering + state.training)
        return settings.share > 0 and (learned or state.answering < share)

    def _add_shard(self, until: float = math.inf) -> None:
        """Answer the next shard, or read it from disk, and count its tokens."""
        index, started = len(self.state.passes), time.monotonic()
        texts = self._answers.shard(index, until)
        self._shard_s = max(self._shard_s, time.monotonic() - started)
        if not texts:
            raise ValueError(
                f"prompts: none of {SHARD_PROMPTS} was answered within max_len "
                f"{self.settings.max_len} and the target's context; give shorter ones"
            )
        self._count_tokens(texts)
        num_answered = self.state.num_answered + sum(text.num_answer for text in texts)
        self._update(passes=(*self.state.passes, 0), num_answered=num_answered)

    def _count_tokens(self, texts: Sequence[Text]) -> None:
        tokens = np.concatenate([text.tokens for text in texts]).astype(np.int64)
        self._counts += torch.bincount(torch.from_numpy(tokens), minlength=len(self._counts))

    def _train(self, progress: float) -> None:
        if self.state.shard < 0:  # choose at random among those with the fewest passes
            passes = self.state.passes
            least = [index for index, count in enumerate(passes) if count == min(passes)]
            rng = np.random.default_rng((self.settings.seed, sum(passes)))
            shard = least[rng.integers(len(least))]
            counted = (*passes[:shard], passes[shard] + 1, *passes[shard + 1 :])
            self._update(shard=shard, cursor=0, passes=counted)
        state = self.state
        if not self._parts:
            self._parts = self._batches(state.shard, state.passes[state.shard])
        result = self.trainer.step(self._parts[state.cursor], progress)
        self._recent.append(result)
        if last := state.cursor + 1 == len(self._parts):
            self._parts = []
        self._update(
            num_steps=self.trainer.num_steps,
            num_tokens=state.num_tokens + result.num_tokens,
            shard=-1 if last else state.shard,
            cursor=0 if last else state.cursor + 1,
        )

    def _batches(self, shard: int, number: int) -> list[list[Text]]:
        """The batches of pass `number` over a shard."""
        texts = self._answers.shard(shard)
        if self.settings.learn == "texts":
            texts = whole_texts(texts)
        return batches(texts, self.settings.step_tokens, (self.settings.seed, shard, number))

    def _check(self) -> None:
        """Measure the averaged weights on the held-out answers; export them if they are the best
        so far. Raises ValueError if a loss since the last check was not finite."""
        recent, state = self._recent, self.state
        loss, coverage, accepted = None, None, ()
        if recent:
            loss = float(np.mean([float(step.loss) for step in recent]))
            coverage = float(np.mean([float(step.coverage) for step in recent]))
            accepted = tuple(np.mean([step.accepted.tolist() for step in recent], 0).tolist())
        if loss is not None and not math.isfinite(loss):
            raise ValueError(
                f"matrix_lr: at {self.settings.matrix_lr} (other_lr {self.settings.other_lr}) the "
                f"loss is no number by step {state.num_steps}; {self._out} has the best head so "
                "far, begin another with lower ones"
            )
        started = time.monotonic()
        with self._timed("checking"):
            checked = self.trainer.check(self._held)
        point = HeadPoint(
            num_steps=state.num_steps,
            num_tokens=state.num_tokens,
            num_answered=state.num_answered,
            seconds=round(self._clock.seconds),
            loss=loss,
            accepted=accepted,
            coverage=coverage,
            tau=checked.tau,
            conditional=checked.conditional,
        )
        if not state.curve or checked.tau > max(point.tau for point in state.curve):
            self._method.export(self._out, self._target, self.trainer, self._counts)
        self._recent = []
        self._update(curve=(*state.curve, point))
        draw_head_curve(self._out, self.state.curve)
        self._check_s = max(self._check_s, time.monotonic() - started)

    def _save(self) -> None:
        started = time.monotonic()
        self._update(seconds=self._clock.seconds)
        self.state = save(self._out, self.state, self.trainer.tensors())
        self._save_s = max(self._save_s, time.monotonic() - started)

    def _trainer(self) -> Trainer:
        texts, saved = self._answers.shard(0), load_tensors(self._out, self.state)
        token_ids = saved["vocab.ids"] if saved else self._vocabulary(texts)
        checkpoint, last = read_checkpoint(self._target), self._teacher.read(texts[:8]).last
        trainer = Trainer(self.settings, self._method, self._teacher, checkpoint, last, token_ids)
        if saved:
            trainer.load(saved, self.state.num_steps)
        return trainer

    def _vocabulary(self, texts: list[Text]) -> Tensor:
        counts = self._answers.prompt_counts(self.llm.engine.shape.vocab_size)
        return draft_vocabulary(texts, counts, self._teacher, self.settings.draft_vocab)

    def _label(self) -> str:
        point = self.state.curve[-1]
        label = f"step {self.state.num_steps}, held-out tau {point.tau:.2f}"
        return f"{label}, c_1 {point.conditional[0]:.2f}"

    @contextmanager
    def _timed(self, what: Literal["answering", "training", "checking"]) -> Iterator[None]:
        """Add the time of the context to that field of the state."""
        started = time.perf_counter()
        yield
        seconds = getattr(self.state, what) + time.perf_counter() - started
        self._update(**{what: seconds})

    def _update(self, **changes: Any) -> None:
        self.state = msgspec.structs.replace(self.state, **changes)


def answer(args: argparse.Namespace, settings: HeadSettings, target: TargetConfig) -> int:
    """Answer the first `args.answer` prompts, or this process's part of them, without training.

    Returns the number of prompts. Raises ValueError.
    """
    prompts = training_prompts(args.prompts, args.exclude, settings.seed)
    lasting = lasting_settings(args, settings, target)
    llm = open_target(settings, target)
    part, num_parts = args.part or (1, 1)
    mine = range(part - 1, -(-args.answer // SHARD_PROMPTS), num_parts)
    with track(len(mine) * SHARD_PROMPTS) as advance:
        num_tokens = 0

        def tick(more: int) -> None:
            nonlocal num_tokens
            num_tokens += more
            advance(0, f"answering, {num_tokens} tokens")

        answers = Answers(llm, prompts.learned, settings, args.out / DATA, None, lasting, tick)
        if part == 1:
            answers.held_out(prompts.held_out)
        missing = [index for index in mine if not answers.has(index)]
        advance((len(mine) - len(missing)) * SHARD_PROMPTS, "answering")
        for _ in answers.answer(missing):
            advance(SHARD_PROMPTS, f"answering, {num_tokens} tokens")
    return len(mine) * SHARD_PROMPTS


def open_target(settings: HeadSettings, target: TargetConfig) -> LLM:
    """An engine that runs `settings.batch` sequences together, each as long as training needs."""
    if target.max_model_len is None:
        shape = ModelShape.from_dir(resolve(target.target))
        needed = min(shape.max_position_embeddings, settings.max_len + settings.max_tokens)
        target = msgspec.structs.replace(target, max_model_len=needed)
    return open_llm(target, settings.batch, draft="none")
