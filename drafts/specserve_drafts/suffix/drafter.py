"""The `suffix` drafter: a tree of the continuations of earlier occurrences of the last tokens.

It searches the request's own prompt and output, and the outputs of earlier requests with the same
`cache_salt`. Longer matches have more weight, and frequent continuations are proposed first. After
Oliaro et al. 2024, arXiv 2411.04975, who keep suffix trees with counts; here hash chains as in LZ77
find the matches, and counts are taken from the texts at each proposal. All work is on the host.
"""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, ClassVar, Final

from msgspec import Meta

from specserve.sequence import SequenceView, Status
from specserve.speculation.drafter import DraftOptions, Feedback, NoModelDrafter, Probability
from specserve.tree import DraftTree
from specserve_kernels.host import HOST, HostCode
from specserve_kernels.host.interface import END
from specserve_kernels.host.reference import SuffixSearch, TokenLog

_MAX_MATCHES: Final = 32  # matches used per proposal; also positions checked per n-gram and log
_MAX_MATCHED: Final = 64  # the search stops once its matches have this many matched tokens in all
_WEIGHT_BASE: Final = 4.0  # factor in the weight of a match for each matched token
_PSEUDO_COUNT: Final = 1.0  # m matched tokens scale a probability by m / (m + _PSEUDO_COUNT)
_INDEXED_SIZES: Final = (4, 2)  # n-gram lengths that are indexed besides min_match
_LOG_OVERHEAD: Final = 64  # tokens counted against `capacity` for each log, besides its text

MatchSize = Annotated[int, Meta(ge=1, le=64)]


class SuffixOptions(DraftOptions, frozen=True, forbid_unknown_fields=True):
    min_match: MatchSize = 1  # tokens that must match before anything is proposed
    max_match: MatchSize = 16  # matches are compared up to this many tokens
    shared: bool = True  # search outputs of earlier requests with the same cache_salt too
    # Tokens of such outputs kept, over all salts.
    capacity: Annotated[int, Meta(ge=1_000, le=100_000_000)] = 500_000
    min_probability: Probability = 0.02  # nodes of a lower path probability are not proposed

    def __post_init__(self) -> None:
        if self.min_match > self.max_match:
            raise ValueError(
                f"min_match: {self.min_match}; expected 1 to max_match ({self.max_match})"
            )


class PastOutputs:
    """Outputs of finished requests: one log per salt, in two generations.

    When the young generation holds half of `capacity` tokens, the old one is dropped and the young
    one takes its place. So the oldest outputs are evicted first, across all salts, and no single
    entry ever has to be removed from a log.
    """

    def __init__(self, capacity: int, new_log: Callable[[], TokenLog]) -> None:
        self._generation_size = capacity // 2
        self._new_log = new_log
        self._young: dict[str, TokenLog] = {}
        self._old: dict[str, TokenLog] = {}
        self._num_tokens = 0  # tokens in the young generation, _LOG_OVERHEAD per log included

    def add(self, salt: str, output: list[int]) -> None:
        """Append the output of a finished request to its salt's log."""
        text = [*output[-(self._generation_size - _LOG_OVERHEAD - 1) :], END]
        if self._num_tokens + _LOG_OVERHEAD + len(text) > self._generation_size:
            self._young, self._old, self._num_tokens = {}, self._young, 0
        if salt not in self._young:
            self._young[salt] = self._new_log()
            self._num_tokens += _LOG_OVERHEAD
        self._young[salt].extend(text)
        self._num_tokens += len(text)

    def logs(self, salt: str) -> list[TokenLog]:
        """The salt's logs, young generation first."""
        return [logs[salt] for logs in (self._young, self._old) if salt in logs]


class SuffixDrafter(NoModelDrafter):
    Options: ClassVar[type[DraftOptions]] = SuffixOptions

    def __init__(self, options: DraftOptions, path: Path | None, target: Path) -> None:
        assert isinstance(options, SuffixOptions)
        self._options = options
        sizes = [size for size in _INDEXED_SIZES if options.min_match < size <= options.max_match]
        sizes.append(options.min_match)
        self._search = new_search(sizes, options.min_probability)
        self._new_log = partial(HOST.TokenLog, sizes)
        self._request_logs: dict[str, TokenLog] = {}  # prompt and output, by sequence id
        self._running: dict[str, SequenceView] = {}  # by sequence id; `forget` takes their outputs
        self._past = PastOutputs(options.capacity, self._new_log)

    def observe(self, feedback: Feedback) -> None:
        if self._options.shared:
            self._running.update((seq.id, seq) for seq in feedback.seqs)

    def forget(self, seq_id: str) -> None:
        self._request_logs.pop(seq_id, None)
        seq = self._running.pop(seq_id, None)
        # A preempted sequence is resumed later; its output is added when it has finished.
        if seq is not None and seq.status is Status.FINISHED and seq.num_output:
            self._past.add(seq.cache_salt, seq.tokens[seq.num_prompt :])

    def propose_tree(self, seq: SequenceView, budget: int) -> DraftTree:
        own = self._request_logs.get(seq.id)
        if own is None:
            own = self._request_logs[seq.id] = self._new_log()
        own.extend(seq.tokens[len(own) :])
        logs = [own, *self._past.logs(seq.cache_salt)]
        recent = seq.tokens[-self._options.max_match :]
        return DraftTree(*self._search.tree(logs, recent, budget))


def new_search(sizes: Sequence[int], min_probability: float, host: HostCode = HOST) -> SuffixSearch:
    """A search for occurrences of a text's last tokens.

    sizes: lengths of the n-grams by which matches are found, descending; the last one is the
    shortest match. Nodes of a path probability below `min_probability` are not proposed.
    """
    return host.SuffixSearch(
        sizes,
        max_matches=_MAX_MATCHES,
        max_matched=_MAX_MATCHED,
        weight_base=_WEIGHT_BASE,
        pseudo_count=_PSEUDO_COUNT,
        min_probability=min_probability,
    )
