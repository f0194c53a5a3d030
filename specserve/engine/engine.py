"""The composition root and the step. Be paranoid about adding lines to `step`.

Whatever goes wrong with one request ends that request; the others in the batch go on untouched.
"""

import logging
import time
from collections import deque
from collections.abc import Callable
from copy import copy
from pathlib import Path
from types import MappingProxyType

import torch

from specserve.batch import ModelOutput, joined
from specserve.cache.manager import KVCacheManager
from specserve.cache.storage import KVSpec, KVStorage
from specserve.config import ConfigError, EngineConfig
from specserve.engine.device import choose_platform
from specserve.engine.end_tokens import end_tokens
from specserve.engine.limits import Limits
from specserve.engine.measure import measure_costs
from specserve.engine.memory import count_blocks
from specserve.engine.metrics import EngineInfo, EngineStats, StepTimes
from specserve.engine.snapshot import take_snapshot
from specserve.models.fields import ModelError
from specserve.models.loader import load_model
from specserve.models.model import Model
from specserve.models.shape import ModelShape
from specserve.runner.runner import Runner
from specserve.runner.warmup import STEPS_PER_ROUND, warmup_rounds
from specserve.sampling import Sampler, SamplingState
from specserve.schedule.scheduler import Scheduler
from specserve.sequence import SequenceView
from specserve.speculation.compose import ComposedDrafter
from specserve.speculation.controller import Pricing
from specserve.speculation.cost_model import PassCosts
from specserve.speculation.drafter import DraftContext, Feedback
from specserve.speculation.drafter_gate import Worth
from specserve.speculation.failures import loading
from specserve.speculation.registry import create_drafters
from specserve.step import EntryView, FinishInfo, StepPlan, VerifyResult
from specserve.text import Tokenizer
from specserve.tree import MAX_NODES, DraftTree
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
        on_stage: Callable[[str], None] = lambda stage: None,
    ) -> None:
        self.config = config
        self.platform = platform = choose_platform(config.target)
        if config.target.threads is not None:
            torch.set_num_threads(config.target.threads)
        on_stage("preparing the drafters")
        self._drafters = create_drafters(config.draft.draft, config.draft.options, target, resolve)
        on_stage("loading the weights")
        model = load_model(
            target,
            kernels=platform.kernels,
            dtype=platform.dtype,
            device=platform.device,
            exact=platform.exact,
            quantization=config.target.quantization,
            quantized_kv_dtype=platform.quantized_kv_dtype,
        )
        self.shape, self.dtype, self._row_multiple = model.shape, model.dtype, model.row_multiple
        ends = end_tokens(model.shape, tokenizer)
        self.max_model_len = _context(config.target.max_model_len, model.shape)
        draft_specs: dict[str, KVSpec | None] = {}
        for name, drafter in self._drafters.items():
            with loading(name):
                draft_specs[name] = drafter.kv_spec(model.dtype)
        kv_specs = [model.kv_spec, *(spec for spec in draft_specs.values() if spec is not None)]
        num_blocks = count_blocks(
            config.cache,
            sum(spec.bytes_per_slot for spec in kv_specs),
            self.max_model_len,
            config.schedule.max_num_seqs,
            platform.device,
        )
        wanted = {layer for drafter in self._drafters.values() for layer in drafter.aux_layers}
        self._aux_layers = tuple(sorted(wanted))
        self._costs: PassCosts | None = None  # not measured
        self._watcher: Callable[[Feedback], None] | None = None
        self._start_over(num_blocks)
        on_stage(f"making room for {self.kv.num_slots} tokens")
        self._storages: list[KVStorage] = []
        self.runner = Runner(
            model,
            self._storage(model.kv_spec),
            config.cache.block_size,
            platform.device,
            max(1, *(drafter.needs_topk for drafter in self._drafters.values())),
            aux_layers=self._aux_layers,
        )
        sampler = Sampler(platform.kernels, platform.device)
        self.verifier = Verifier(sampler, ends, self.shape.vocab_size, tokenizer)
        on_stage("loading the drafters")
        self._bind(draft_specs, model)
        self.limits = Limits(
            vocab_size=self.shape.vocab_size,
            max_model_len=self.max_model_len,
            max_position_embeddings=self.shape.max_position_embeddings,
            num_kv_slots=self.kv.num_slots,
            stop_strings=tokenizer is not None,
            drafters=self.drafter.names,
        )
        self._inbox: deque[Request | Abort] = deque()
        self._ids: set[str] = set()  # submitted and not finished

    def warm_up(self, on_stage: Callable[[str], None] = lambda stage: None) -> float:
        """Run every kind of pass once, on an engine that has done nothing yet; nothing of it stays.

        Returns the seconds of the slowest step, one that builds kernels aside. Raises ModelError if
        the model cannot run the largest passes.
        """
        schedule = self.config.schedule
        rounds = list(
            warmup_rounds(
                row_multiple=self._row_multiple,
                max_rows=schedule.max_num_batched_tokens,
                max_seqs=schedule.max_num_seqs,
                max_nodes=self.config.draft.max_nodes,
                max_tokens=min(self.max_model_len, self.kv.num_slots),
            )
        )
        slowest = 0.0
        for index, requests in enumerate(rounds, start=1):
            on_stage(f"warming up ({index} of {len(rounds)})")
            for request in requests:
                self.submit(request)
            outputs, seconds = [], []
            for _ in range(STEPS_PER_ROUND):
                started = time.perf_counter()
                outputs += self.step()
                seconds.append(time.perf_counter() - started)
            # Kernels are built in the first round.
            slowest = max(seconds) if index <= 2 else max(slowest, *seconds)
            for request in requests:
                self.abort(request.id)
            outputs += self.step()
            errors = [output.error for output in outputs if output.finish == "error"]
            if errors:
                raise ModelError(
                    f"warm-up: {errors[0]}; if memory is short, lower kv_memory or "
                    f"max_num_batched_tokens ({schedule.max_num_batched_tokens})"
                )
        self.measure_costs(on_stage)
        return slowest

    def measure_costs(self, on_stage: Callable[[str], None] = lambda stage: None) -> None:
        """Time passes of one tree of 1, 2, 4 ... nodes, on an engine that has nothing to do.

        From then on, drafted nodes that are not worth their rows are left out of a pass.
        """
        if self._drafters and self._priced:
            on_stage("measuring what a pass costs")
            room = min(self.max_model_len, self.kv.num_slots) - MAX_NODES
            if room > 0:
                self._costs = measure_costs(self.scheduler, self.kv, self.runner, room)
        self._start_over(self.kv.pool.num_blocks)

    def watch(self, aux_layers: tuple[int, ...], observe: Callable[[Feedback], None]) -> None:
        """From now on `observe` hears of every pass what drafters hear. With its own `aux_layers`
        only where drafters want none."""
        assert not (aux_layers and self._aux_layers), "the drafters have `aux_layers` of their own"
        if aux_layers:
            self.runner.aux_layers = aux_layers
        self._watcher = observe

    def submit(self, request: Request) -> None:
        """Queue a request for the next step. Raises RequestError if it can never be served."""
        self.limits.check(request)
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
            times, started = self._times, time.perf_counter()
            with times.draft:
                trees = self._propose(plan)
            with times.forward:
                plan, out = self._forward(plan, trees, outputs)
            self._pricing.learn_pass(plan, trees, times.forward.last)
            with times.sample:
                results = self._verify(plan, trees, out)
            with times.commit:
                self._commit_kv(plan, results)
            with times.draft:
                self._pricing.policy.settle(trees, results, times.draft.last)
                self._observe(plan, trees, results, out)
            with times.commit:
                outputs += self.scheduler.commit(plan, trees, results)
            times.num_steps += 1
            self._pricing.learn_host(time.perf_counter() - started - times.forward.last)
        for output in outputs:
            if output.finish is not None:
                self.verifier.forget(output.id)
                self._pricing.policy.forget(output.id)
                self._ids.discard(output.id)
        if not self.scheduler.has_work:
            self.check_integrity()
        return outputs

    def info(self) -> EngineInfo:
        return EngineInfo(
            limits=self.limits,
            block_size=self.kv.block_size,
            max_num_seqs=self.config.schedule.max_num_seqs,
            max_nodes=self.config.draft.max_nodes,
            device=str(self.platform.device),
            dtype=str(self.dtype).removeprefix("torch."),
            exact=self.platform.exact,
        )

    def stats(self) -> EngineStats:
        return take_snapshot(self.scheduler, self.kv, self.drafter, self._times)

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
                finish = FinishInfo("abort")
                outputs.append(self.scheduler.finish(message.id, finish, message.reason))
        return outputs + self.scheduler.expire(time.monotonic())

    def _propose(self, plan: StepPlan) -> dict[str, DraftTree]:
        entries = plan.decoding
        trees = self.drafter.propose(
            [SequenceView(entry.seq) for entry in entries], [entry.num_nodes for entry in entries]
        )
        proposed = {entry.seq.id: tree for entry, tree in zip(entries, trees, strict=True)}
        return self._pricing.worthwhile(plan, proposed)

    def _forward(
        self, plan: StepPlan, trees: dict[str, DraftTree], outputs: list[StepOutput]
    ) -> tuple[StepPlan, ModelOutput]:
        """One pass; if it fails, one pass per request, and those that fail again are ended."""
        if self._aux_layers:  # copying them takes time, even if nobody follows
            seqs = [SequenceView(entry.seq) for entry in plan.entries]
            wanted = self.drafter.wants_aux_hidden_states(seqs)
            self.runner.aux_layers = self._aux_layers if wanted else ()
        try:
            out = self.runner.forward(plan.entries, trees)
        except Exception:
            logger.exception("a pass over %d requests failed; isolating", len(plan.entries))
            survivors = []
            outs = [ModelOutput(torch.empty(0, self.shape.vocab_size, device=self.platform.device))]
            for entry in plan.entries:
                try:
                    outs.append(self.runner.forward([entry], trees))
                    survivors.append(entry)
                except Exception as error:
                    reason = f"the model failed on this request: {type(error).__name__}: {error}"
                    outputs.append(self.scheduler.finish(entry.seq.id, FinishInfo("error"), reason))
            plan, out = StepPlan(tuple(survivors)), joined(outs)
        return plan, out

    def _verify(
        self, plan: StepPlan, trees: dict[str, DraftTree], out: ModelOutput
    ) -> dict[str, VerifyResult]:
        entries = plan.decoding
        results = self.verifier(entries, [trees[entry.seq.id] for entry in entries], out)
        return {entry.seq.id: result for entry, result in zip(entries, results, strict=True)}

    def _observe(
        self,
        plan: StepPlan,
        trees: dict[str, DraftTree],
        results: dict[str, VerifyResult],
        out: ModelOutput,
    ) -> None:
        """Nobody looks at `out` afterwards, and of the rest drafters cannot change anything."""
        feedback = Feedback(
            tuple(EntryView(SequenceView(e.seq), e.num_prefill, e.num_nodes) for e in plan.entries),
            MappingProxyType(trees),
            MappingProxyType(results),
            out,
        )
        self.drafter.observe(feedback)
        if self._watcher is not None:
            self._watcher(feedback)

    def _commit_kv(self, plan: StepPlan, results: dict[str, VerifyResult]) -> None:
        """Move the accepted paths together, in the target's storage, and roll the rest back."""
        moves: list[tuple[int, int]] = []
        for entry in plan.entries:
            result = results.get(entry.seq.id)
            path = () if result is None else result.path
            moves += self.kv.commit(entry.seq.table, entry.num_prefill, path)
        if moves:
            source, destination = torch.tensor(moves, device=self.platform.device).T.contiguous()
            self.platform.kernels.kv_commit(self._storages[0].data, source, destination)

    def _storage(self, spec: KVSpec) -> KVStorage:
        self._storages.append(KVStorage(spec, self.kv.num_slots, self.platform.device))
        return self._storages[-1]

    def _start_over(self, num_blocks: int) -> None:
        """Nothing queued, cached or counted."""
        config = self.config
        self.kv = KVCacheManager(
            num_blocks, config.cache.block_size, prefix_caching=config.cache.prefix_caching
        )
        worth = None if self._costs is None else Worth()
        self.drafter = ComposedDrafter(self._drafters, self.shape.vocab_size, worth)
        self._pricing = Pricing(config.draft.max_nodes, self._costs)
        self.scheduler = Scheduler(
            self.kv, self._pricing.policy, config.schedule, self.drafter.forget, self._costs
        )
        self._times = StepTimes()

    @property
    def _priced(self) -> bool:
        return self.config.draft.pricing == "measured"

    def _sampling_state(self, seq: SequenceView) -> SamplingState:
        return self.verifier.state(self.scheduler.sequence(seq.id)).copy()

    def _bind(self, specs: dict[str, KVSpec | None], model: Model) -> None:
        for drafter_id, (name, drafter) in enumerate(self._drafters.items(), start=1):
            spec, kernels = specs[name], copy(self.platform.kernels)
            context = DraftContext(
                device=self.platform.device,
                dtype=self.dtype,
                kernels=kernels,
                exact=self.platform.exact,
                quantization=self.config.target.quantization,
                vocab_size=self.shape.vocab_size,
                block_size=self.config.cache.block_size,
                sampler=Sampler(kernels, self.platform.device),
                sampling_state=self._sampling_state,
                storage=None if spec is None else self._storage(spec),
                drafter_id=drafter_id,
                aux_layers=self._aux_layers,
                priced=self._priced,
                step_seconds=lambda: self._pricing.step_seconds(),
                quantized_embedding=model.quantized_embedding,
                embed=model.embed,
                final_norm=model.final_norm,
                unembed=model.unembed,
            )
            with loading(name):
                drafter.bind(context)


def _context(max_model_len: int | None, shape: ModelShape) -> int:
    if max_model_len is None:
        return shape.max_position_embeddings
    if max_model_len > shape.max_position_embeddings:
        raise ConfigError(
            f"max_model_len: {max_model_len} is more than the model was built for; "
            f"use at most {shape.max_position_embeddings}"
        )
    return max_model_len
