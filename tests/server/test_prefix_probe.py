"""One API key cannot learn from `cached_tokens` how long the prompts of another key are."""

from pathlib import Path
from typing import Any, Final

import pytest
from live import LiveServer, start_server

KEYS: Final = {"alice": "a" * 16, "bob": "b" * 16}
NUM_PRIMED: Final = 12  # prompts of more than 6 blocks each: together more than the 64 of the cache


def num_cached(server: LiveServer, name: str, prompt: str, **more: Any) -> int:
    body = {"prompt": prompt, "max_tokens": 1, "temperature": 0, **more}
    headers = {"Authorization": f"Bearer {KEYS[name]}"}
    reply = server.ask("/v1/completions", body, headers=headers)
    assert reply.status == 200, reply.body
    count: int = reply.json()["usage"]["prompt_tokens_details"]["cached_tokens"]
    return count


@pytest.mark.parametrize("flags", [("--draft", "none"), ("--draft", "ngram", "--no-cost-aware")])
def test_prompts_of_another_key_do_not_show(chat_model: Path, flags: tuple[str, ...]) -> None:
    """Bob fills the cache, alice sends prompts of some lengths, bob asks for his own once more."""
    keys = " ".join(f"{name}:inference:{key}" for name, key in KEYS.items())
    seen = []
    sent: list[list[int]] = [[20], [150], [450], [300, 300, 300], [450] * 8]
    with start_server(chat_model, "--kv-memory", "256K", *flags, SPECSERVE_API_KEYS=keys) as server:
        for turn, lengths in enumerate(sent):
            primed = [f"{turn}/{index} " + "the same words " * 7 for index in range(NUM_PRIMED)]
            for prompt in primed:
                num_cached(server, "bob", prompt)
            for index, length in enumerate(lengths):
                num_cached(server, "alice", f"{turn}/{index} ".ljust(length, "."), max_tokens=9)
            # The latest first, because asking for a prompt that is not cached evicts others.
            seen.append([num_cached(server, "bob", prompt) for prompt in reversed(primed)])
    assert max(seen[0]) > 64, "bob's own prompts were not cached"
    assert seen == [seen[0]] * len(sent)
