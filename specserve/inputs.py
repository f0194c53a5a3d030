"""Reads the arguments of `LLM` and `AsyncLLM` that are one value or one per prompt."""

from collections.abc import Mapping, Sequence
from typing import TypeVar, cast

from specserve.types import Message, Prompt

T = TypeVar("T")
Conversation = str | Sequence[Message]  # text stands for one user message
# One or several. A union of two sequence types would be more exact, but mypy cannot infer the type
# of a list of different prompts from it.
Prompts = str | Sequence[int | Message | Prompt]
Conversations = str | Sequence[Message | Conversation]


def as_batch(prompts: Prompts) -> list[Prompt]:
    """Wrap a single prompt into a list; a list of prompts is copied."""
    if isinstance(prompts, str) or any(isinstance(item, int | Mapping) for item in prompts):
        return [cast(Prompt, prompts)]
    return list(cast(Sequence[Prompt], prompts))


def as_chats(chats: Conversations) -> list[Prompt]:
    """The messages of one conversation or of several, each as a list of messages."""
    if isinstance(chats, str) or any(isinstance(item, Mapping) for item in chats):
        chats = [cast(Conversation, chats)]
    return [
        [{"role": "user", "content": chat}] if isinstance(chat, str) else chat
        for chat in cast(Sequence[Conversation], chats)
    ]


def per_prompt(name: str, value: T | Sequence[T], count: int) -> list[T]:
    """One value per prompt. Raises ValueError for a list that has not `count` values."""
    if not isinstance(value, list | tuple):
        return [cast(T, value)] * count
    if len(value) != count:
        raise ValueError(f"{name}: {len(value)} given for {count} prompts; give one per prompt")
    return list(value)
