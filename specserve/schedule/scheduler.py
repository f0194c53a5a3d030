"""The scheduler: queues, admission, chunked prefill, preemption. Host only, without tensors.

When rows or KV blocks are short, trees shrink to their root first, then no sequence is admitted,
then one is preempted (`Tenants.last_in_line`). A preempted sequence keeps its tokens; its KV is
recomputed, with identical bits. `tenants` divides the resources between tenants.
"""

import bisect
from collections.abc import Callable, Mapping
from typing import Final

from specserve.cache.manager import Denied, KVCacheManager
from specserve.cache.prefix import prefix_hashes
from specserve.cache.table import BlockTable
from specserve.config import ScheduleConfig
from specserve.schedule.tenants import Tenants
from specserve.sequence import SequenceState, SpecCounts, Status
from specserve.speculation.controller import SpeculationController
from specserve.speculation.cost_model import CostModel
from specserve.step import Entry, FinishInfo, Scores, StepPlan, VerifyResult
from specserve.tree import DraftTree
from specserve.types import PromptLogprobs, Request, StepOutput

_NO_TREE: Final = VerifyResult((), (), (), 0)  # of an entry whose prompt goes on


class Scheduler:
    """Owns all sequences, waiting and running.

    `on_leave(seq_id)` is called when a sequence is finished or preempted, and so loses its KV.
    `costs`: measured costs of a forward pass, or None if they were not measured.
    """

    def __init__(
        self,
        kv: KVCacheManager,
        controller: SpeculationController,
        config: ScheduleConfig,
        on_leave: Callable[[str], None],
        costs: CostModel | None = None,
    ) -> None:
        self.running: list[SequenceState] = []  # by descending priority, then arrival
        self.waiting: list[SequenceState] = []  # in the same order
        self.num_preemptions = 0
        self.num_prompt_tokens = 0  # of all requests admitted, each counted once
        self.num_cached_tokens = 0  # of those, taken from the prefix cache
        self.counts = SpecCounts()  # over all requests
        self.tenants = Tenants(config.max_num_batched_tokens, costs)
        self._kv = kv
        self._controller = controller
        self._config = config
        self._on_leave = on_leave
        self._seqs: dict[str, SequenceState] = {}
        self._order: dict[str, tuple[int, int]] = {}  # id -> (-priority, arrival)
        self._num_arrived = 0

    @property
    def has_work(self) -> bool:
        return bool(self._seqs)

    def __contains__(self, seq_id: str) -> bool:
        return seq_id in self._seqs

    def sequence(self, seq_id: str) -> SequenceState:
        return self._seqs[seq_id]

    def add(self, request: Request) -> None:
        table = BlockTable(self._kv.block_size)
        seq = SequenceState(request, list(request.prompt_ids), table)
        self._seqs[seq.id] = seq
        self._order[seq.id] = (-request.priority, self._num_arrived)
        self._num_arrived += 1
        self.tenants.arrive(request.tenant)
        self._enqueue(self.waiting, seq)

    def finish(self, seq_id: str, info: FinishInfo, error: str | None = None) -> StepOutput:
        """Remove a request, waiting or running, release its blocks and return its last output."""
        seq = self._seqs.pop(seq_id)
        if seq.status is Status.RUNNING:
            self.running.remove(seq)
            self.tenants.stop(seq)
        else:
            self.waiting.remove(seq)
        self.tenants.leave(seq.request.tenant)
        del self._order[seq_id]
        seq.status = Status.FINISHED
        self._kv.release(seq.table)
        self._on_leave(seq_id)
        return StepOutput(
            id=seq_id,
            finish=info.reason,
            stop_reason=info.stop_reason,
            error=error,
            num_cached_tokens=seq.num_cached,
            stats=seq.counts.freeze(),
        )

    def fail(self, errors: Mapping[str, str]) -> list[StepOutput]:
        """End requests with an error, and return their last outputs. `errors`: by sequence id."""
        return [self.finish(seq_id, FinishInfo("error"), error) for seq_id, error in errors.items()]

    def expire(self, now: float) -> list[StepOutput]:
        """Abort the requests whose deadline is before `now` (`time.monotonic()` seconds)."""
        late = [
            seq.id
            for seq in self._seqs.values()
            if seq.request.deadline is not None and seq.request.deadline < now
        ]
        return [
            self.finish(seq_id, FinishInfo("abort"), "deadline: the request ran out of time")
            for seq_id in late
        ]

    def plan(self) -> StepPlan:
        """Plan the next forward pass and reserve every KV slot that it will write."""
        self._reserve_roots()
        if self.tenants.several:
            self._rebalance_tenants()
        limit = self.tenants.begin_pass()
        decoding = [seq for seq in self.running if seq.num_pending == 1]
        if self.tenants.several:
            self.tenants.give_way(decoding, self._wanted([*self.running, *self.waiting]))
            decoding = self.tenants.decoding(decoding, self._wanted(self.running))
        chunks = self._plan_chunks(decoding, limit)
        spare_rows = max(0, limit - len(decoding) - sum(chunks.values()))
        with_tree = decoding + [seq for seq, rows in chunks.items() if rows == seq.num_pending]
        budgets = self._controller.budgets(with_tree, spare_rows)
        entries = []
        for seq, nodes in zip(with_tree, budgets, strict=True):
            if nodes > 1 and not self._kv.reserve_tree(seq.table, seq.num_pending + nodes - 1):
                nodes = 1
            entries.append(Entry(seq, seq.num_pending - 1, nodes))
        entries += [Entry(seq, rows, 0) for seq, rows in chunks.items() if rows < seq.num_pending]
        return StepPlan(tuple(entries))

    def commit_kv(self, plan: StepPlan, results: dict[str, VerifyResult]) -> list[tuple[int, int]]:
        """Keep the KV of prefill chunks and accepted paths, and release the other slots.

        Returns the moves that make accepted paths consecutive, as (source, destination) slots.
        """
        moves: list[tuple[int, int]] = []
        for entry in plan.entries:
            result = results.get(entry.seq.id)
            path = () if result is None else result.path
            moves += self._kv.commit(entry.seq.table, entry.num_prefill, path)
        return moves

    def commit(
        self,
        plan: StepPlan,
        trees: dict[str, DraftTree],
        results: dict[str, VerifyResult],
        scores: Scores,
    ) -> list[StepOutput]:
        """Append the emitted tokens, publish full blocks and finish completed requests.

        `trees` is by sequence id. Returns one output per entry with a tree or with scores.
        """
        outputs = []
        for entry in plan.entries:
            seq, result, scored = entry.seq, results.get(entry.seq.id), scores.get(entry.seq.id, ())
            if isinstance(scored, str):
                outputs += self.fail({seq.id: scored})
                continue
            seq.num_scored += len(scored)
            self.tenants.charge(seq.request.tenant, len(scored))
            if result is not None and seq.request.sampling.max_tokens:
                seq.tokens.extend(result.emitted)
                self.tenants.charge(seq.request.tenant, len(result.emitted))
                tree = trees[seq.id]
                depth = max(tree.depths)
                for counts in (seq.counts, self.counts):
                    counts.record(len(tree) - 1, depth, result.num_accepted, len(result.emitted))
            self._kv.publish(seq.table, seq.tokens, seq.request.cache_salt)
            if result is not None or scored:
                outputs.append(self._output(seq, result or _NO_TREE, scored))
        return outputs

    def _output(
        self, seq: SequenceState, result: VerifyResult, scored: PromptLogprobs
    ) -> StepOutput:
        info = FinishInfo("error") if result.error is not None else result.finish
        last = None if info is None else self.finish(seq.id, info, result.error)
        return StepOutput(
            id=seq.id,
            ids=result.emitted,
            drafter_ids=result.drafter_ids,
            logprobs=result.logprobs,
            prompt_logprobs=scored,
            finish=None if last is None else last.finish,
            stop_reason=None if last is None else last.stop_reason,
            error=result.error,
            num_cached_tokens=seq.num_cached,
            stats=None if last is None else last.stats,
        )

    def _reserve_roots(self) -> None:
        """Reserve a slot for the root of every decoding sequence, preempting others if needed."""
        for seq in list(self.running):
            while seq.status is Status.RUNNING and seq.num_pending == 1:
                if self._kv.reserve(seq.table, 1):
                    break
                self._preempt(self.tenants.last_in_line(self._order))

    def _rebalance_tenants(self) -> None:
        """Admit sequences of tenants that run fewer than others, in place of `victim_for`."""
        for tenant in self.tenants.service_order():
            for seq in _sequences_of(tenant, self.waiting):
                denied: Denied | None = Denied.NO_ROOM
                while denied is Denied.NO_ROOM and (victim := self.tenants.victim_for(tenant)):
                    denied = self._admit(seq)
                    if denied is Denied.NO_ROOM:
                        if not self._is_full and not self._is_within_share(seq):
                            break
                        self._preempt(victim)
                if denied is Denied.NO_ROOM:
                    break

    def _plan_chunks(self, decoding: list[SequenceState], limit: int) -> dict[SequenceState, int]:
        """Prompt tokens to compute per sequence: first of running sequences, then of new ones.

        Fills the pass up to `limit` rows and admits the new ones. With several tenants the rows
        are dealt out in rounds of equal parts, to those that still want rows and are allowed them.
        """
        chunks: dict[SequenceState, int] = {}
        rows = limit - len(decoding)
        if not self.tenants.several:
            self._fill(self.running, self.waiting, rows, chunks)
            return chunks
        wanting = self._wanted([*self.running, *self.waiting])
        allowed = self.tenants.allowances(len(decoding), wanting)
        given = dict.fromkeys(wanting, 0)
        blocked = False
        while wanting and rows > 0:
            share = -(-rows // len(wanting))
            for tenant in list(wanting):
                most = min(share, rows, allowed[tenant] - given[tenant])
                running = _sequences_of(tenant, self.running)
                waiting = [] if blocked else _sequences_of(tenant, self.waiting)
                taken, blocks = self._fill(running, waiting, most, chunks)
                blocked = blocked or blocks
                rows -= taken
                given[tenant] += taken
                if taken < share:
                    del wanting[tenant]
        for tenant, num_rows in given.items():
            self.tenants.spend(tenant, num_rows)
        return chunks

    def _wanted(self, seqs: list[SequenceState]) -> dict[str, int]:
        """Uncomputed prompt tokens of `seqs` per tenant, in the tenants' order of service."""
        wanted = dict.fromkeys(self.tenants.service_order(), 0)
        for seq in seqs:
            if seq.num_pending > 1 or seq.status is Status.WAITING:
                wanted[seq.request.tenant] += seq.num_pending
        return {tenant: tokens for tenant, tokens in wanted.items() if tokens}

    def _fill(
        self,
        running: list[SequenceState],
        waiting: list[SequenceState],
        rows: int,
        chunks: dict[SequenceState, int],
    ) -> tuple[int, bool]:
        """Give up to `rows` more rows to prompts: first to running sequences, then to new ones.

        Admits the new ones and adds the rows to `chunks`. Returns the number of rows given, and
        whether a waiting sequence now blocks the admission of all others (`_blocks_admission`).
        """
        left = rows
        for seq in [seq for seq in running if seq.num_pending > 1]:
            if left > 0:
                more = min(seq.num_pending - chunks.get(seq, 0), left)
                chunks[seq] = chunks.get(seq, 0) + more
                left -= more
        for seq in list(waiting):
            if left <= 0 or self._is_full:
                break
            denied = self._admit(seq)
            if denied is Denied.NO_ROOM:
                return rows - left, self._blocks_admission(seq)
            if denied is None:
                chunks[seq] = min(seq.num_pending, left)
                left -= chunks[seq]
        return rows - left, False

    @property
    def _is_full(self) -> bool:
        return len(self.running) >= self._config.max_num_seqs

    def _is_within_share(self, seq: SequenceState) -> bool:
        num_blocks = -(-seq.num_tokens // self._kv.block_size)
        return self.tenants.is_within_share(
            seq.request.tenant, num_blocks, self._kv.pool.num_blocks
        )

    def _blocks_admission(self, seq: SequenceState) -> bool:
        """Whether no other sequence is admitted until there is room for this one."""
        return self._is_within_share(seq) or self.tenants.is_next(seq.request.tenant)

    def _admit(self, seq: SequenceState) -> Denied | None:
        if self._is_full:
            return Denied.NO_ROOM
        if not seq.prefix_hashes:
            seq.prefix_hashes = prefix_hashes(
                seq.tokens, self._kv.block_size, seq.request.cache_salt
            )
        # One spare block per running sequence, so that the next step does not have to preempt.
        admitted = self._kv.admit(
            len(seq.tokens),
            seq.prefix_hashes,
            tenant=seq.request.tenant,
            spare_blocks=len(self.running),
            max_cached=seq.num_cacheable,
        )
        if isinstance(admitted, Denied):
            return admitted
        seq.table = admitted
        seq.num_when_admitted = seq.num_tokens
        seq.status = Status.RUNNING
        if not seq.num_preemptions:
            seq.num_cached = seq.num_committed
            self.num_prompt_tokens += seq.num_prompt
            self.num_cached_tokens += seq.num_cached
        self.waiting.remove(seq)
        self._enqueue(self.running, seq)
        self.tenants.start(seq, self.running)
        return None

    def _preempt(self, seq: SequenceState) -> None:
        self.running.remove(seq)
        self.tenants.stop(seq)
        self._kv.release(seq.table)
        seq.status = Status.WAITING
        seq.prefix_hashes = []  # they have to cover the emitted tokens too
        seq.num_preemptions += 1
        self.num_preemptions += 1
        self._on_leave(seq.id)
        self._enqueue(self.waiting, seq)

    def _enqueue(self, queue: list[SequenceState], seq: SequenceState) -> None:
        bisect.insort(queue, seq, key=lambda queued: self._order[queued.id])


def _sequences_of(tenant: str, queue: list[SequenceState]) -> list[SequenceState]:
    return [seq for seq in queue if seq.request.tenant == tenant]
