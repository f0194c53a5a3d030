"""The sampler, used by the target and by the drafters.

A row is one token to draw: its logits, the request's parameters, its absolute position and the
tokens before it. The drawn token depends on these alone, never on other rows, which makes
speculation lossless. Order: logit_bias, min_tokens mask, penalties, temperature, top-k, top-p,
min-p, then argmax(logits + Gumbel noise keyed by (seed, position, token)).
"""

from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass

import torch
from torch import Tensor

from specserve.read_only import read_only_params
from specserve.types import Request, SamplingParams, TokenLogprobs
from specserve_kernels.ops import Kernels

_FIRST_TOPK = 1024  # top tokens in which the nucleus is searched first, before all tokens


class SamplingState:
    """The sampler's state of one request: constant tensors and, for penalties, token counts."""

    def __init__(
        self, request: Request, eos_ids: Sequence[int], vocab_size: int, device: torch.device
    ) -> None:
        params = read_only_params(request.sampling)
        assert params.seed is not None, "a seed is drawn before the engine sees the request"
        self.params: SamplingParams = params
        self.seed: int = params.seed
        self.num_prompt = len(request.prompt_ids)
        self._bias: tuple[Tensor, Tensor] | None = None
        if params.logit_bias:
            self._bias = (
                torch.tensor(list(params.logit_bias), device=device),
                torch.tensor(list(params.logit_bias.values()), device=device, dtype=torch.float32),
            )
        ends = set(params.stop_token_ids) | (set() if params.ignore_eos else set(eos_ids))
        self._ends = torch.tensor(sorted(ends), dtype=torch.long, device=device)
        self._counts: Tensor | None = None
        self._num_counted = self.num_prompt
        if params.penalised:
            self._prompt_mask = torch.zeros(vocab_size, dtype=torch.bool, device=device)
            self._prompt_mask[torch.tensor(request.prompt_ids, device=device)] = True
            self._counts = torch.zeros(vocab_size, dtype=torch.int32, device=device)

        self.has_logit_adjustments = bool(
            params.logit_bias or params.min_tokens or params.penalised
        )
        # Whether `Sampler.process` changes its logits.
        self.needs_processing = self.has_logit_adjustments or _scales_or_filters(params)
        # Whether the drawn token is the argmax of the model's logits.
        self.plain_greedy = params.greedy and not self.needs_processing

    def copy(self) -> "SamplingState":
        """An independent copy, for drafters: changes to it do not affect the original."""
        other = copy(self)
        if self._counts is not None:
            other._prompt_mask, other._counts = self._prompt_mask.clone(), self._counts.clone()
        return other

    def advance(self, tokens: Sequence[int]) -> None:
        """Count the tokens emitted since the last call. `tokens`: prompt and output so far."""
        if self._counts is not None and len(tokens) > self._num_counted:
            self._counts = self._counted(tokens[self._num_counted :])
        self._num_counted = len(tokens)

    def _counted(self, tokens: Sequence[int]) -> Tensor:
        """The counts with `tokens` added, [vocab_size] int32; the state does not change."""
        assert self._counts is not None
        ids = torch.tensor(tokens, dtype=torch.long, device=self._counts.device)
        return self._counts.index_add(0, ids, torch.ones_like(ids, dtype=torch.int32))

    def mask(self, logits: Tensor, position: int) -> None:
        """Apply logit_bias and min_tokens to one row, in place. logits: [vocab_size] float32.

        `position` is the absolute position of the token to draw.
        """
        if self._bias is not None:
            ids, values = self._bias
            logits[ids] += values
        if position - self.num_prompt < self.params.min_tokens:
            logits[self._ends] = -torch.inf

    def penalties(self, path: Sequence[int]) -> tuple[Tensor, Tensor]:
        """The prompt mask [vocab_size] bool; counts of output and `path` [vocab_size] int32."""
        assert self._counts is not None
        return self._prompt_mask, self._counted(path) if path else self._counts


def _scales_or_filters(params: SamplingParams) -> bool:
    """Whether the temperature or a filter changes the logits. Every filter must be named here."""
    filtered = params.top_k > 0 or params.top_p < 1.0 or params.min_p > 0.0
    return not params.greedy and (params.temperature != 1.0 or filtered)


@dataclass(frozen=True, slots=True)
class Row:
    """One token to draw."""

    state: SamplingState
    position: int  # absolute position of the token to draw
    path: tuple[int, ...] = ()  # tree tokens before it, not yet counted in the state


class Sampler:
    """Draws tokens. Stateless: every method is a function of logits and rows."""

    def __init__(self, kernels: Kernels, device: torch.device) -> None:
        self._kernels = kernels
        self.device = device

    def process(self, logits: Tensor, rows: Sequence[Row]) -> Tensor:
        """Apply all steps before the noise. logits: [num_rows, vocab_size] float32, not modified.

        Returns a tensor of the same shape and dtype, -inf for tokens that must not be drawn; it is
        `logits` itself if no row needs a change.
        """
        if not any(row.state.needs_processing for row in rows):
            return logits
        logits = logits.clone()
        for index, row in enumerate(rows):
            row.state.mask(logits[index], row.position)
        self._penalise(logits, rows)
        temperatures = [row.state.params.temperature or 1.0 for row in rows]
        if any(t != 1.0 for t in temperatures):
            logits /= torch.tensor(temperatures, device=self.device)[:, None]
        self._filter(logits, rows)
        return logits

    def draw(self, processed: Tensor, rows: Sequence[Row]) -> Tensor:
        """Draw a token per row: argmax of `processed`, plus noise if temperature > 0.

        processed: [num_rows, vocab_size] float32, results of `process`. Returns [num_rows] int64.
        """
        if all(row.state.params.greedy for row in rows):
            return processed.argmax(dim=-1)
        return self._kernels.gumbel_argmax(processed, *self._keys(rows))

    def perturb(self, processed: Tensor, rows: Sequence[Row]) -> Tensor:
        """Return processed + the noise of `draw`, [num_rows, vocab_size] float32, for drafters."""
        if all(row.state.params.greedy for row in rows):
            return processed
        seeds, positions, sampled = self._keys(rows)
        ids = torch.arange(processed.shape[1], device=self.device).expand(len(rows), -1)
        noise = self._kernels.gumbel_noise(seeds, positions, ids)
        return processed + noise * sampled[:, None]

    def _keys(self, rows: Sequence[Row]) -> tuple[Tensor, Tensor, Tensor]:
        """The inputs of the noise, each [num_rows]: seed, position, and whether noise is added."""
        seeds = torch.tensor([row.state.seed for row in rows], device=self.device)
        positions = torch.tensor([row.position for row in rows], device=self.device)
        sampled = [not row.state.params.greedy for row in rows]
        return seeds, positions, torch.tensor(sampled, device=self.device)

    def _penalise(self, logits: Tensor, rows: Sequence[Row]) -> None:
        chosen = [index for index, row in enumerate(rows) if row.state.params.penalised]
        if not chosen:
            return
        masks, counts = zip(*(rows[i].state.penalties(rows[i].path) for i in chosen), strict=True)
        params = [rows[i].state.params for i in chosen]
        strengths = [
            [p.repetition_penalty for p in params],
            [p.frequency_penalty for p in params],
            [p.presence_penalty for p in params],
        ]
        logits[chosen] = self._kernels.apply_penalties(
            logits[chosen],
            torch.stack(masks),
            torch.stack(counts),
            *torch.tensor(strengths, dtype=torch.float32, device=self.device),
        )

    def _filter(self, logits: Tensor, rows: Sequence[Row]) -> None:
        """Apply top-k, top-p and min-p to sampled rows, in place; greedy rows need no filter."""
        for index, row in enumerate(rows):
            params = row.state.params
            if params.greedy:
                continue
            threshold = filter_threshold(logits[index], params.top_k, params.top_p, params.min_p)
            if threshold is not None:
                logits[index].masked_fill_(logits[index] < threshold, -torch.inf)


def filter_threshold(logits: Tensor, top_k: int, top_p: float, min_p: float) -> Tensor | None:
    """The lowest logit that passes top-k, then top-p among those, then min-p; None: no filter.

    logits: [vocab_size] float32, scaled by the temperature. A threshold and not a set of indices,
    so that tokens of equal logit are treated alike and the order of a sort does not matter. It must
    not exceed the largest logit, even by rounding, so that a token remains.
    """
    best = logits.max()
    thresholds: list[Tensor] = []
    if min_p > 0.0:  # p / p_max >= min_p: the normalisation cancels out
        thresholds.append(best + torch.log(torch.tensor(min_p, device=logits.device)))
    if top_k > 0 or top_p < 1.0:
        thresholds.append(_nucleus(logits, top_k, top_p))
    return torch.stack(thresholds).max() if thresholds else None


def _nucleus(logits: Tensor, top_k: int, top_p: float) -> Tensor:
    """The smallest logit in the smallest set of top tokens whose probability mass reaches top_p.

    Nucleus sampling (Holtzman et al. 2020, section 3.1) over the top_k tokens, renormalised.
    `top_k` 0: all tokens.
    """
    vocab_size = logits.shape[0]
    limit = min(top_k or vocab_size, vocab_size)
    if top_p >= 1.0:
        return logits.topk(limit).values[-1]
    count = min(limit, _FIRST_TOPK)
    while True:
        ranked = logits.topk(count).values
        total = ranked.logsumexp(0) if count == limit < vocab_size else logits.logsumexp(0)
        if top_k and count < limit:
            total = logits.topk(limit).values.logsumexp(0)
        mass = (ranked - total).exp().cumsum(0)
        inside = int((mass < top_p).sum())  # tokens before the one that reaches top_p
        if inside < count or count == limit:
            return ranked[min(inside, count - 1)]
        count = limit


def token_logprobs(logits: Tensor, token_ids: Sequence[int], num_top: int) -> list[TokenLogprobs]:
    """Per row, the logprobs of one token and of the `num_top` best; a row depends on itself alone.

    logits: [num_rows, vocab_size] float32, unprocessed. `token_ids` has a token per row.
    """
    logprobs = logits.log_softmax(-1)
    ids = torch.tensor(token_ids, device=logits.device)
    chosen = logprobs.gather(1, ids[:, None])[:, 0].tolist()
    values, best = (part.tolist() for part in logprobs.topk(num_top))
    return [
        TokenLogprobs(token, logprob, tuple(zip(*top, strict=True)))
        for token, logprob, *top in zip(token_ids, chosen, best, values, strict=True)
    ]
