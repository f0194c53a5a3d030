"""The engine: takes requests and runs them to their end, one `step` at a time.

A failure of one request ends that request; the others in the batch continue unaffected.
"""

from collections.abc import Callable, Sequence

import torch

from specserve.batch import ModelOutput
from specserve.engine.inbox import Inbox
from specserve.engine.metrics import EngineInfo, EngineStats
from specserve.engine.parts import EngineParts
from specserve.engine.snapshot import describe, take_snapshot
from specserve.engine.step_times import StepTimes, timed
from specserve.schedule.scheduler import Scheduler
from specserve.sequence import SequenceView
from specserve.speculation.compose import ComposedDrafter
from specserve.speculation.controller import SpeculationController
from specserve.speculation.drafter import Feedback
from specserve.step import Results, Scores, StepPlan
from specserve.tree import Trees
from specserve.types import Request, StepOutput


class Engine:
    """Owns the requests, and the KV cache as far as it is in use. Not thread-safe."""

    def __init__(self, parts: EngineParts) -> None:
        """Only one engine at a time may use `parts`."""
        config, costs = parts.config, parts.cost_model if parts.cost_model.is_measured else None
        self.parts, self.limits = parts, parts.limits
        self.platform, self.shape = parts.platform, parts.model.shape
        self.runner, self.verifier, self.scorer = parts.runner, parts.verifier, parts.scorer
        self.kv = parts.new_kv_manager()
        self.controller = SpeculationController(config.draft.max_nodes, costs)
        self.drafter = ComposedDrafter(parts.drafters, self.shape.vocab_size, self.controller)
        self.scheduler = Scheduler(
            self.kv, self.controller, config.schedule, self.drafter.forget, costs
        )
        self.times = StepTimes()
        self._inbox = Inbox(parts.limits)
        self._observer: Callable[[Feedback], None] | None = None

    def submit(self, request: Request) -> None:
        """Queue a request for the next step. Raises RequestError if it can never be served."""
        self._inbox.submit(request)

    def abort(self, request_id: str) -> None:
        """End a request at the next step. Unknown ids are ignored: it may just have finished."""
        self._inbox.abort(request_id)

    @property
    def has_work(self) -> bool:
        return len(self._inbox) > 0 or self.scheduler.has_work

    @torch.inference_mode()
    def step(self) -> list[StepOutput]:
        """Run one forward pass over all scheduled sequences; returns what they emitted."""
        outputs = self._inbox.deliver(self.scheduler)
        plan = self.scheduler.plan()
        if plan.entries:
            trees = self._propose(plan)
            plan, out, scores, failed = self._forward(plan, trees)
            results = self._verify(plan, trees, out)
            self._commit_kv(plan, results)
            self._observe(plan, trees, results, out)
            outputs += failed + self._commit_tokens(plan, trees, results, scores)
        self._forget_finished(outputs)
        return outputs

    def observe(self, layers: Sequence[int], observer: Callable[[Feedback], None]) -> None:
        """Call `observer` after every forward pass with the feedback that drafters get.

        With `layers` it has the hidden states of these layers; then no drafter may want others.
        """
        assert not (layers and self.parts.aux_layers), "the drafters want layers of their own"
        if layers:
            self.runner.aux_layers = tuple(layers)
        self._observer = observer

    def info(self) -> EngineInfo:
        return describe(self.parts)

    def stats(self) -> EngineStats:
        return take_snapshot(self.scheduler, self.kv, self.drafter, self.times)

    def check_integrity(self) -> None:
        """Assert that block tables, pool and prefix cache agree."""
        self.kv.check_integrity(seq.table for seq in self.scheduler.running)

    @timed("draft")
    def _propose(self, plan: StepPlan) -> Trees:
        entries = plan.decoding
        for entry in entries:
            self.verifier.state(entry.seq)  # drafters may ask for it
        trees = self.drafter.propose(
            [SequenceView(entry.seq) for entry in entries], [entry.num_nodes for entry in entries]
        )
        proposed = {entry.seq.id: tree for entry, tree in zip(entries, trees, strict=True)}
        return self.controller.select_nodes(plan, proposed)

    @timed("forward")
    def _forward(
        self, plan: StepPlan, trees: Trees
    ) -> tuple[StepPlan, ModelOutput, Scores, list[StepOutput]]:
        """Returns the plan without the requests on which the model failed, and these' outputs."""
        if self.parts.aux_layers:  # copying hidden states takes time, even if no drafter needs them
            seqs = [SequenceView(entry.seq) for entry in plan.entries]
            wanted = self.drafter.wants_aux_hidden_states(seqs)
            self.runner.aux_layers = self.parts.aux_layers if wanted else ()
        self.runner.storage.allocates_ahead = self.scheduler.tenants.shared
        entries, out, errors = self.runner.forward_isolated(plan.entries, trees)
        return StepPlan(entries), out, self.scorer(entries, out), self.scheduler.fail(errors)

    @timed("sample")
    def _verify(self, plan: StepPlan, trees: Trees, out: ModelOutput) -> Results:
        results = self.verifier(plan.decoding, [trees[each.seq.id] for each in plan.decoding], out)
        self.scheduler.tenants.record_draws(self.verifier.draws, self.scorer.seconds)
        return {each.seq.id: result for each, result in zip(plan.decoding, results, strict=True)}

    @timed("commit")
    def _commit_kv(self, plan: StepPlan, results: Results) -> None:
        self.runner.move_kv(self.scheduler.commit_kv(plan, results))

    @timed("draft")
    def _observe(self, plan: StepPlan, trees: Trees, results: Results, out: ModelOutput) -> None:
        """Tell controller and drafters what became of the trees. The engine is done with `out`."""
        propose_seconds = self.times.latest["draft"]  # this method will replace it
        self.controller.record_step(plan, trees, results, self.times.seconds, propose_seconds)
        feedback = Feedback.of_step(plan, trees, results, out, self.runner.aux_layers)
        self.drafter.observe(feedback)
        if self._observer is not None:
            self._observer(feedback)

    @timed("commit")
    def _commit_tokens(
        self, plan: StepPlan, trees: Trees, results: Results, scores: Scores
    ) -> list[StepOutput]:
        self.times.num_steps += 1
        return self.scheduler.commit(plan, trees, results, scores)

    def _forget_finished(self, outputs: Sequence[StepOutput]) -> None:
        for seq_id in self._inbox.forget(outputs):
            self.verifier.forget(seq_id)
            self.controller.forget(seq_id)
        if not self.scheduler.has_work:
            self.check_integrity()
