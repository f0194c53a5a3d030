"""What each setting of the engine means, for flags and `help()`; lists of fields in docstrings."""

import inspect
import re
import textwrap
from collections.abc import Callable, Mapping
from typing import Any, Final, TypeVar, get_args, get_type_hints

F = TypeVar("F", bound=Callable[..., Any])
_INDENT: Final = " " * 4

ENGINE_HELP: Final = {
    "dtype": "of KV and float weights, which keep theirs on a CPU with compiled kernels unless it "
    "is wider; auto: fast on this device (with those kernels: bfloat16 KV)",
    "quantization": "of the weights; auto: GGUF files as they are (int8 for formats without "
    "kernels), other files not quantised",
    "device": "auto, cpu, cuda or cuda:N",
    "max_model_len": "tokens of prompt and output together; not given: the model's own limit",
    "exactness": "exact: a result never depends on the rest of the batch; fast: it may, where "
    "two tokens are about equally likely; auto: exact on a CPU, fast on a GPU",
    "threads": "CPU threads; not given: torch's choice for this machine",
    "generation_config": "where the defaults of temperature, top_k, top_p, min_p and "
    "repetition_penalty come from; auto: the model's generation_config.json; none: no file; or a "
    "directory with such a file",
    "block_size": "tokens per KV block",
    "kv_memory": "KV memory, such as 2GiB; not given: a quarter of the free memory (most of it on "
    "a GPU), at most what max_num_seqs full contexts need",
    "prefix_caching": "share the KV of equal prompt beginnings",
    "draft": "a drafter (none, ngram, suffix, recycle, eagle), a draft's directory, or auto: "
    "recycle and, if the target has one, a pretrained eagle head. The trees of several, separated "
    "by commas, are merged",
    "max_nodes": "tree nodes per sequence and forward pass, root included",
    "cost_aware": "leave out drafters and nodes that cost more time than they save",
    "options": "options of drafters, such as max_match=3 of ngram",
    "max_num_seqs": "sequences that run together",
    "max_num_batched_tokens": "tokens per forward pass: tree nodes and prompt tokens together",
}


def lists_fields(
    fields: type, texts: Mapping[str, str], defaults: Mapping[str, Any] | None = None
) -> Callable[[F], F]:
    """A decorator that appends the fields of the TypedDict `fields` to a docstring, for `help()`.

    `texts` has a line of help per field, and `defaults`, if given, its default. Otherwise None
    stands for the default and is left out of the types. Raises KeyError for a missing field.
    """
    lines = []
    for name, hint in get_type_hints(fields).items():
        shown = _type_name(hint)
        if defaults is None:
            shown = shown.removesuffix(" | None")
        else:
            shown = f"{shown} = {defaults[name]!r}"
        lines += [
            f"{name}: {shown}",
            textwrap.fill(texts[name], 88, initial_indent=_INDENT, subsequent_indent=_INDENT),
        ]

    def append(function: F) -> F:
        if function.__doc__ is not None:  # docstrings are there
            function.__doc__ = "\n\n".join([inspect.cleandoc(function.__doc__), "\n".join(lines)])
        return function

    return append


def _type_name(hint: Any) -> str:
    """The type of a field as it is written in code, without modules."""
    name = hint.__name__ if isinstance(hint, type) and not get_args(hint) else str(hint)
    return re.sub(r"\b(?:[a-z_]\w*\.)+(?=\w)", "", name)
