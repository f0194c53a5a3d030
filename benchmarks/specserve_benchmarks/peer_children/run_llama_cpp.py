"""llama.cpp through llama-cpp-python; prompts run one after the other."""

from importlib import import_module
from itertools import islice
from typing import Any

from specserve_benchmarks.peer_children.child import Generate, Prompts, serve


def load(settings: dict[str, Any]) -> tuple[Generate, str]:
    package = import_module("llama_cpp")
    options: dict[str, Any] = {}
    if settings["lookup"]:
        speculative = import_module("llama_cpp.llama_speculative")
        options["draft_model"] = speculative.LlamaPromptLookupDecoding(num_pred_tokens=4)
    llm = package.Llama(
        settings["gguf"],
        n_ctx=settings["context"],
        n_threads=settings["threads"],
        n_threads_batch=settings["threads"],
        verbose=False,
        **options,
    )

    def answer(ids: list[int], max_tokens: int) -> list[int]:
        llm.reset()  # so that no KV of the previous prompt is reused
        tokens = llm.generate(ids, temp=0.0, top_k=1, repeat_penalty=1.0)
        return [int(token) for token in islice(tokens, max_tokens)]

    def generate(prompts: Prompts, max_tokens: int) -> Prompts:
        return [answer(ids, max_tokens) for ids in prompts]

    return generate, str(package.__version__)


if __name__ == "__main__":
    serve(load)
