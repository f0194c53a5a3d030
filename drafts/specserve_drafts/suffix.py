"""Suffix decoding: a tree of what followed the last tokens wherever they occurred before.

Looks in the request's own prompt and output and in what earlier requests of the same `cache_salt`
were answered; long matches count more, frequent continuations are tried first. (After Oliaro et
al. 2024, arXiv 2411.04975, who keep suffix trees with counts; here hash chains as in LZ77 find the
matches and the tree is counted from the texts.) Host only.
"""

from array import array
from collections.abc import Iterator
from collections.abc import Sequence as Seq
from heapq import heappop, heappush
from itertools import islice
from pathlib import Path
from typing import ClassVar, Final

import torch

from specserve.cache.storage import KVSpec
from specserve.drafting.base import DraftContext, DraftError, DraftOptions, Feedback
from specserve.sequence import Sequence, Status
from specserve.tree import DraftTree, build_tree

_INDEXED: Final = (4, 2)  # lengths of the n-grams matches are found by, besides min_match
_MAX_MATCHES: Final = 32  # counted per proposal, and looked at per n-gram and log
_ENOUGH: Final = 64  # tokens matched, over all matches, that tell what others would
_LONGER: Final = 4.0  # a match longer by a token weighs as much as this many
_DOUBT: Final = 1.0  # matched tokens that leave a continuation as likely right as wrong
_END: Final = -1  # closes a text in a log of several; no token, so nothing matches across it
_LOG_PRICE: Final = 64  # tokens that a log takes the room of, however short it is

_Match = tuple[float, int, Seq[int]]  # weight, matched tokens, what followed


class SuffixOptions(DraftOptions, frozen=True, forbid_unknown_fields=True):
    min_match: int = 1  # tokens that must match before anything is proposed
    max_match: int = 16  # longer matches count no more
    shared: bool = True  # learn from outputs of earlier requests with the same cache_salt
    capacity: int = 500_000  # tokens of such outputs kept, for all salts together
    min_probability: float = 0.02  # paths less likely than this are not proposed


class TokenLog:
    """Text that only grows, and where each of its n-grams occurred, latest first.

    A position is that after an n-gram; it is known as soon as something follows.
    """

    def __init__(self, sizes: Seq[int]) -> None:
        self._text = array("i", [_END])  # nothing matches across it, so no match starts before it
        # By n-gram length: hash -> latest position, and per position the one before it. Hashes
        # may collide; `common` tells.
        self._chains: dict[int, tuple[dict[int, int], array[int]]] = {
            size: ({}, array("i", [0] * size)) for size in sizes
        }

    def __len__(self) -> int:
        return len(self._text) - 1

    def extend(self, tokens: Seq[int]) -> None:
        self._text.extend(tokens)
        for size, (latest, earlier) in self._chains.items():
            recent = self._text[len(earlier) - size : -1].tolist()
            grams = zip(*(recent[start:] for start in range(size)), strict=False)
            for position, gram in enumerate(grams, start=len(earlier)):
                key = hash(gram)
                earlier.append(latest.get(key, 0))
                latest[key] = position

    def positions(self, ngram: Seq[int]) -> Iterator[int]:
        """Where `ngram` occurred; rarely one where it did not."""
        latest, earlier = self._chains[len(ngram)]
        position = latest.get(hash(tuple(ngram)), 0)
        while position:
            yield position
            position = earlier[position]

    def common(self, position: int, backwards: Seq[int]) -> int:
        """How many tokens before `position` are the first ones of `backwards`."""
        text, length = self._text, 0
        for token in backwards:
            length += 1
            if text[position - length] != token:
                return length - 1
        return length

    def follow(self, position: int, length: int) -> Seq[int]:
        """The text from `position`; where it ends it goes on with what has just been read."""
        text = self._text[position : position + length]
        while len(text) < length:
            text.extend(text[: length - len(text)])
        return text


class PastOutputs:
    """Outputs of requests that are over, a log per salt, in two generations.

    When the young one has taken half of `capacity`, the old one goes and the young one is the old
    one from then on: whatever the salts, the oldest goes first and nothing has to be unlinked.
    """

    def __init__(self, capacity: int, sizes: Seq[int]) -> None:
        self._room = capacity // 2
        self._sizes = sizes
        self._young: dict[str, TokenLog] = {}
        self._old: dict[str, TokenLog] = {}
        self._num_taken = 0  # tokens in the young generation, its logs' price included

    def add(self, salt: str, output: list[int]) -> None:
        text = [*output[-(self._room - _LOG_PRICE - 1) :], _END]
        if self._num_taken + _LOG_PRICE + len(text) > self._room:
            self._young, self._old, self._num_taken = {}, self._young, 0
        if salt not in self._young:
            self._young[salt] = TokenLog(self._sizes)
            self._num_taken += _LOG_PRICE
        self._young[salt].extend(text)
        self._num_taken += len(text)

    def logs(self, salt: str) -> list[TokenLog]:
        """The salt's logs, latest first."""
        return [logs[salt] for logs in (self._young, self._old) if salt in logs]


class SuffixDrafter:
    Options: ClassVar[type[DraftOptions]] = SuffixOptions
    needs_taps: tuple[int, ...] = ()
    needs_topk = 0

    def __init__(self, options: DraftOptions, path: Path | None, target: Path) -> None:
        assert isinstance(options, SuffixOptions)
        _check(options)
        self._options = options
        between = [size for size in _INDEXED if options.min_match < size <= options.max_match]
        self._sizes = (*between, options.min_match)
        self._own: dict[str, TokenLog] = {}  # by sequence id: prompt and output
        self._running: dict[str, Sequence] = {}  # by sequence id, to learn from in the end
        self._past = PastOutputs(options.capacity, self._sizes)

    def kv_spec(self, dtype: torch.dtype) -> KVSpec | None:
        return None

    def bind(self, context: DraftContext) -> None:
        self._source = context.source

    def propose(self, seqs: Seq[Sequence], budgets: Seq[int]) -> list[DraftTree]:
        return [self._propose(seq, budget) for seq, budget in zip(seqs, budgets, strict=True)]

    def observe(self, feedback: Feedback) -> None:
        if self._options.shared:
            self._running.update((entry.seq.id, entry.seq) for entry in feedback.entries)

    def forget(self, seq_id: str) -> None:
        self._own.pop(seq_id, None)
        seq = self._running.pop(seq_id, None)
        # One that was preempted comes back, and is learned from when it is really over.
        if seq is not None and seq.status is Status.FINISHED and seq.num_output:
            self._past.add(seq.request.cache_salt, seq.tokens[seq.num_prompt :])

    def _propose(self, seq: Sequence, budget: int) -> DraftTree:
        own = self._own.get(seq.id)
        if own is None:
            own = self._own[seq.id] = TokenLog(self._sizes)
        own.extend(seq.tokens[len(own) :])
        logs = [own, *self._past.logs(seq.request.cache_salt)]
        matches = self._matches(logs, seq.tokens[-self._options.max_match :], budget - 1)
        floor = self._options.min_probability
        return _grow(seq.tokens[-1], matches, budget, floor, self._source)

    def _matches(self, logs: list[TokenLog], recent: list[int], length: int) -> list[_Match]:
        """Matches and the `length` tokens that followed, those by long n-grams first."""
        found: list[_Match] = []
        backwards, known, seen = recent[::-1], len(recent) + 1, 0
        for size in self._sizes:
            if size > len(recent):
                continue
            for log in logs:
                for position in islice(log.positions(recent[-size:]), _MAX_MATCHES):
                    matched = log.common(position, backwards)
                    if size <= matched < known:  # the others were found by longer n-grams
                        found.append((_LONGER**matched, matched, log.follow(position, length)))
                        seen += matched
                        if seen >= _ENOUGH or len(found) == _MAX_MATCHES:
                            return found
            known = size
        return found


def _grow(
    root: int, matches: list[_Match], budget: int, min_probability: float, source: int
) -> DraftTree:
    """The most likely paths through what followed the matches, best first."""
    tokens, parents, scores = [root], [-1], [1.0]
    # Open nodes: score (negative: a heap pops the least), age, parent, depth, token, its matches.
    heap: list[tuple[float, int, int, int, int, list[_Match]]] = []
    num_seen, depth = 0, 0
    while len(tokens) < budget:
        node = len(tokens) - 1
        for token, (share, followers) in _branches(matches, depth).items():
            score = scores[node] * share
            if score >= min_probability:
                num_seen += 1
                heappush(heap, (-score, num_seen, node, depth + 1, token, followers))
        if not heap:
            break
        negative, _, parent, depth, token, matches = heappop(heap)
        tokens.append(token)
        parents.append(parent)
        scores.append(-negative)
    return build_tree(tokens, parents, scores, source)


def _branches(matches: list[_Match], depth: int) -> dict[int, tuple[float, list[_Match]]]:
    """By token that the matches have at `depth`: how likely it is, and the matches that have it.

    The share of their weights, discounted for the little that may have been seen; whoever comes
    to this depth has matched `depth` tokens more.
    """
    followers: dict[int, list[_Match]] = {}
    for match in matches:
        followers.setdefault(match[2][depth], []).append(match)
    followers.pop(_END, None)
    sums = {}
    total = 0.0
    for token, having in followers.items():
        weight, seen = 0.0, depth * len(having)
        for match in having:
            weight += match[0]
            seen += match[1]
        total += weight
        sums[token] = weight * seen / (seen + _DOUBT)
    return {token: (sums[token] / total, having) for token, having in followers.items()}


def _check(options: SuffixOptions) -> None:
    ranges: dict[str, tuple[float, float]] = {
        "max_match": (1, 64),
        "min_match": (1, options.max_match),
        "capacity": (1_000, 100_000_000),
        "min_probability": (0, 1),
    }
    for name, (low, high) in ranges.items():
        value = getattr(options, name)
        if not low <= value <= high:
            raise DraftError(f"draft.options.suffix.{name}: {value}; use {low} to {high}")
