"""Checks before a request starts that the engine can serve it to completion. No torch."""

from collections.abc import Sequence

from msgspec import Struct

from specserve.tree import MAX_NODES
from specserve.types import Request, RequestError


class Limits(Struct, frozen=True):
    """What an engine can serve. Lengths and sizes are in tokens."""

    vocab_size: int
    max_model_len: int
    max_position_embeddings: int  # the limit of the model itself
    num_kv_slots: int
    stop_strings: bool  # supported: whether there is a tokenizer
    drafters: tuple[str, ...]  # drafters[i] has drafter id i + 1; id 0 is the target

    def check(self, request: Request) -> None:
        """Raise RequestError, naming the field, if any part of the request cannot be served."""
        request.sampling.validate(self.vocab_size)
        if not request.prompt_ids:
            raise RequestError("prompt", "it is empty; give at least one token")
        self._check_room(len(request.prompt_ids), request.sampling.max_tokens)
        self._check_tokens("prompt", request.prompt_ids)
        if request.sampling.stop and not self.stop_strings:
            raise RequestError("stop", "stop strings need a tokenizer; use stop_token_ids")
        self._check_tokens("prediction", request.speculation.prediction)
        max_nodes = request.speculation.max_nodes
        if max_nodes is not None and not 1 <= max_nodes <= MAX_NODES:
            reason = f"{max_nodes} is out of range; expected 1 to {MAX_NODES}"
            raise RequestError("speculation.max_nodes", reason)
        for index, name in enumerate(request.speculation.drafters or ()):
            if name not in self.drafters:
                raise RequestError(
                    f"speculation.drafters[{index}]",
                    f"{name[:80]!r} does not run here; use one of {', '.join(self.drafters)}",
                )

    def check_prompt_len(self, num_prompt: int, *, generates: bool = True) -> None:
        """Raise RequestError if a prompt of this many tokens does not fit the context.

        `generates`: whether there must be room for one more token.
        """
        context = self.max_model_len
        if num_prompt + generates > context:
            more = self.max_position_embeddings > context
            hint = f" or raise max_model_len (the model allows {self.max_position_embeddings})"
            reason = f"{num_prompt} tokens leave no room in the context of {context}; shorten it"
            raise RequestError("prompt", reason + (hint if more else ""))

    def _check_tokens(self, field: str, tokens: Sequence[int]) -> None:
        for bad in (min(tokens, default=0), max(tokens, default=0)):
            if not 0 <= bad < self.vocab_size:
                expected = f"expected 0 to {self.vocab_size - 1}"
                raise RequestError(field, f"token id {bad} is not in the vocabulary; {expected}")

    def _check_room(self, num_prompt: int, max_tokens: int) -> None:
        context, slots = self.max_model_len, self.num_kv_slots
        self.check_prompt_len(num_prompt, generates=max_tokens > 0)
        size = f"{num_prompt} prompt tokens and {max_tokens} new ones exceed"
        if num_prompt + max_tokens > context:
            reason = f"the context of {context}; ask for at most {context - num_prompt}"
            raise RequestError("max_tokens", f"{size} {reason}")
        if num_prompt + max_tokens > slots:
            field = "prompt" if num_prompt >= slots else "max_tokens"
            reason = f"the KV pool of {slots} tokens; shorten the request or raise kv_memory"
            raise RequestError(field, f"{size} {reason}")
