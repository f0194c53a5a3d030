"""The composition root and the step. Be paranoid about adding lines to `step`.

Whatever goes wrong with one request ends that request; the others in the batch go on untouched.
"""

import logging
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path

import torch

from specserve.batch import ModelOutput
from specserve.cache.manager import KVCacheManager
from specserve.cache.storage import KVSpec, KVStorage
from specserve.config import ConfigError, EngineConfig
from specserve.drafting.base import DraftContext, Drafter, Feedback
from specserve.drafting.compose import ComposedDrafter
from specserve.drafting.registry import create_drafter
from specserve.engine.device import choose_platform
from specserve.engine.memory import count_blocks
from specserve.engine.metrics import EngineStats, StepTimes
from specserve.models.loader import load_model
from specserve.models.shape import ModelShape
from specserve.runner.runner import Runner
from specserve.sampling import Sampler
from specserve.schedule.policy import FixedPolicy
from specserve.schedule.scheduler import Scheduler
from specserve.step import Ending, StepPlan, Verdict
from specserve.text import Tokenizer
from specserve.tree import DraftTree
from specserve.types import Abort, Request, RequestError, StepOutput
from specserve.verify.verifier import Verifier

logger = logging.getLogger(__name__)


class Engine:
    """Runs requests to their end, one `step` at a time.

    `target` is a model directory, `resolve` finds the directory of a draft checkpoint. Raises
    ConfigError, DraftError or ModelError if the parts do not fit together.
    """

    def __init__(
        self,
        config: EngineConfig,
        target: Path,
        tokenizer: Tokenizer | None,
        resolve: Callable[[str], Path] = Path,
    ) -> None:
        self.config = config
        self.platform = platform = choose_platform(config.target)
        if config.target.threads is not None:
            torch.set_num_threads(config.target.threads)
        drafters = {
            spec: create_drafter(spec, config.draft.options, target, resolve)
            for spec in config.draft.draft
        }
        model = load_model(
            target,
            kernels=platform.kernels,
            dtype=platform.dtype,
            device=platform.device,
            exact=platform.exact,
        )
        self.shape = model.shape
        self.max_model_len = _context(config.target.max_model_len, model.shape)
        draft_specs = {name: drafter.kv_spec(platform.dtype) for name, drafter in drafters.items()}
        specs = [model.kv_spec, *(spec for spec in draft_specs.values() if spec is not None)]
        num_blocks = count_blocks(
            config.cache,
            sum(spec.bytes_per_slot for spec in specs),
            self.max_model_len,
            config.schedule.max_num_seqs,
            platform.device,
        )
        self.kv = KVCacheManager(
            num_blocks, config.cache.block_size, prefix_caching=config.cache.prefix_caching
        )
        self._storages: list[KVStorage] = []
        self.runner = Runner(
            model, self._storage(model.kv_spec), config.cache.block_size, platform.device
        )
        sampler = Sampler(platform.kernels, platform.device)
        self.verifier = Verifier(
            sampler, self.shape.eos_token_ids, self.shape.vocab_size, tokenizer
        )
        self._bind(drafters, draft_specs, sampler)
        self.drafter = ComposedDrafter(drafters, self.shape.vocab_size)
        self.scheduler = Scheduler(
            self.kv, FixedPolicy(config.draft.max_nodes), config.schedule, self.drafter.forget
        )
        self._tokenizer = tokenizer
        self._inbox: deque[Request | Abort] = deque()
        self._ids: set[str] = set()  # submitted and not finished
        self._times = StepTimes()

    def submit(self, request: Request) -> None:
        """Queue a request for the next step. Raises RequestError if it can never be served."""
        self.check(request)
        if request.id in self._ids:
            raise RequestError("id", f"{request.id!r} is already running; use a fresh one")
        self._ids.add(request.id)
        self._inbox.append(request)

    def abort(self, request_id: str) -> None:
        """End a request at the next step; unknown ids are ignored, it may just have finished."""
        self._inbox.append(Abort(request_id))

    @property
    def has_work(self) -> bool:
        return bool(self._inbox) or self.scheduler.has_work

    @torch.inference_mode()
    def step(self) -> list[StepOutput]:
        outputs = self._drain_inbox()
        plan = self.scheduler.plan()
        if plan.entries:
            trees = self._propose(plan)
            plan, out = self._forward(plan, trees, outputs)
            verdicts = self._verify(plan, trees, out)
            self._commit_kv(plan, verdicts)
            self.drafter.observe(Feedback(plan.entries, trees, verdicts, out))
            outputs += self.scheduler.commit(plan, trees, verdicts)
        for output in outputs:
            if output.finish is not None:
                self.verifier.forget(output.id)
                self._ids.discard(output.id)
        if not self.scheduler.has_work:
            self.check_integrity()
        return outputs

    def check(self, request: Request) -> None:
        """Raise RequestError unless this engine can serve the request to its end."""
        request.sampling.validate(self.shape.vocab_size)
        prompt, max_tokens = request.prompt_ids, request.sampling.max_tokens
        if not prompt:
            raise RequestError("prompt", "it is empty; give at least one token")
        bad = [token for token in prompt if not 0 <= token < self.shape.vocab_size]
        if bad:
            raise RequestError(
                "prompt",
                f"token id {bad[0]} is not in the vocabulary; "
                f"expected 0 to {self.shape.vocab_size - 1}",
            )
        if len(prompt) >= self.max_model_len:
            raise RequestError(
                "prompt",
                f"{len(prompt)} tokens leave no room in the context of {self.max_model_len}; "
                "shorten it" + self._room_hint(),
            )
        if len(prompt) + max_tokens > self.max_model_len:
            raise RequestError(
                "max_tokens",
                f"{len(prompt)} prompt tokens and {max_tokens} new ones exceed the context of "
                f"{self.max_model_len}; ask for at most {self.max_model_len - len(prompt)}",
            )
        if len(prompt) + max_tokens > self.kv.num_slots:
            field = "prompt" if len(prompt) >= self.kv.num_slots else "max_tokens"
            raise RequestError(
                field,
                f"{len(prompt)} prompt tokens and {max_tokens} new ones exceed the KV pool of "
                f"{self.kv.num_slots} tokens; shorten the request or raise kv_memory",
            )
        if request.sampling.stop and self._tokenizer is None:
            raise RequestError("stop", "stop strings need a tokenizer; use stop_token_ids")

    def stats(self) -> EngineStats:
        running = self.scheduler.running
        held: dict[int, int] = {}  # block -> valid slots
        size = self.kv.block_size
        for seq in running:
            for index, block_id in enumerate(seq.table.block_ids):
                held[block_id] = min(size, max(0, seq.num_committed - index * size))
        return EngineStats(
            num_steps=self._times.num_steps,
            num_running=len(running),
            num_waiting=len(self.scheduler.waiting),
            num_preemptions=self.scheduler.num_preemptions,
            kv_slots_total=self.kv.num_slots,
            kv_slots_allocated=len(held) * size,
            kv_slots_used=sum(held.values()),
            kv_blocks_idle=self.kv.pool.num_idle,
            draft_seconds=self._times.draft,
            forward_seconds=self._times.forward,
            verify_seconds=self._times.verify,
        )

    def check_integrity(self) -> None:
        """Assert that block tables, pool and prefix cache agree."""
        self.kv.check_integrity(seq.table for seq in self.scheduler.running)

    def _drain_inbox(self) -> list[StepOutput]:
        outputs: list[StepOutput] = []
        while self._inbox:
            message = self._inbox.popleft()
            if isinstance(message, Request):
                self.scheduler.add(message)
            elif message.id in self.scheduler:
                outputs.append(self.scheduler.finish(message.id, Ending("abort"), message.reason))
        return outputs + self.scheduler.expire(time.monotonic())

    def _propose(self, plan: StepPlan) -> dict[str, DraftTree]:
        started = time.perf_counter()
        entries = plan.decoding
        trees = self.drafter.propose(
            [entry.seq for entry in entries], [entry.num_nodes for entry in entries]
        )
        self._times.draft += time.perf_counter() - started
        return {entry.seq.id: tree for entry, tree in zip(entries, trees, strict=True)}

    def _forward(
        self, plan: StepPlan, trees: dict[str, DraftTree], outputs: list[StepOutput]
    ) -> tuple[StepPlan, ModelOutput]:
        """One pass; if it fails, one pass per request, and those that fail again are ended."""
        started = time.perf_counter()
        try:
            out = self.runner.forward(plan.entries, trees)
        except Exception:
            logger.exception("a pass over %d requests failed; isolating", len(plan.entries))
            survivors, logits = [], [torch.empty(0, self.shape.vocab_size)]
            for entry in plan.entries:
                try:
                    logits.append(self.runner.forward([entry], trees).logits)
                    survivors.append(entry)
                except Exception as error:
                    reason = f"the model failed on this request: {type(error).__name__}: {error}"
                    outputs.append(self.scheduler.finish(entry.seq.id, Ending("error"), reason))
            plan, out = StepPlan(tuple(survivors)), ModelOutput(torch.cat(logits))
        self._times.forward += time.perf_counter() - started
        self._times.num_steps += 1
        return plan, out

    def _verify(
        self, plan: StepPlan, trees: dict[str, DraftTree], out: ModelOutput
    ) -> dict[str, Verdict]:
        started = time.perf_counter()
        entries = plan.decoding
        verdicts = self.verifier(entries, [trees[entry.seq.id] for entry in entries], out.logits)
        self._times.verify += time.perf_counter() - started
        return {entry.seq.id: verdict for entry, verdict in zip(entries, verdicts, strict=True)}

    def _commit_kv(self, plan: StepPlan, verdicts: dict[str, Verdict]) -> None:
        """Move the accepted paths together, in the target's storage, and roll the rest back."""
        sources, destinations = [], []
        for entry in plan.entries:
            verdict = verdicts.get(entry.seq.id)
            if verdict is None:
                self.kv.commit(entry.seq.table, entry.num_chain, ())
                continue
            src, dst = self.kv.commit(entry.seq.table, entry.num_chain, verdict.path)
            sources.extend(src.tolist())
            destinations.extend(dst.tolist())
        if sources:
            device = self.platform.device
            self.platform.kernels.kv_commit(
                self._storages[0].data,
                torch.tensor(sources, device=device),
                torch.tensor(destinations, device=device),
            )

    def _storage(self, spec: KVSpec) -> KVStorage:
        self._storages.append(KVStorage(spec, self.kv.num_slots, self.platform.device))
        return self._storages[-1]

    def _bind(
        self,
        drafters: dict[str, Drafter],
        specs: dict[str, KVSpec | None],
        sampler: Sampler,
    ) -> None:
        for source, (name, drafter) in enumerate(drafters.items(), start=1):
            spec = specs[name]
            drafter.bind(
                DraftContext(
                    device=self.platform.device,
                    dtype=self.platform.dtype,
                    kernels=self.platform.kernels,
                    exact=self.platform.exact,
                    vocab_size=self.shape.vocab_size,
                    block_size=self.config.cache.block_size,
                    sampler=sampler,
                    sampling_state=self.verifier.state,
                    storage=None if spec is None else self._storage(spec),
                    source=source,
                )
            )

    def _room_hint(self) -> str:
        own = self.shape.max_position_embeddings
        return (
            f" or raise max_model_len (the model allows {own})" if own > self.max_model_len else ""
        )


def _context(max_model_len: int | None, shape: ModelShape) -> int:
    if max_model_len is None:
        return shape.max_position_embeddings
    if max_model_len > shape.max_position_embeddings:
        raise ConfigError(
            f"max_model_len: {max_model_len} is more than the model was built for; "
            f"use at most {shape.max_position_embeddings}"
        )
    return max_model_len
