"""specserve with one choice of drafters; the prompts of a request run together."""

from typing import Any

from specserve import __version__
from specserve.llm import LLM
from specserve.types import SamplingParams
from specserve_benchmarks.peer_children.child import Generate, Prompts, serve


def load(settings: dict[str, Any]) -> tuple[Generate, str]:
    llm = LLM(
        settings["target"],
        draft=settings["draft"],
        max_model_len=settings["context"],
        max_num_seqs=settings["batch"],
        prefix_caching=False,
        **settings["engine"],
    )

    def generate(prompts: Prompts, max_tokens: int) -> Prompts:
        params = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)
        generations = llm.generate(prompts, params)
        for generation in generations:
            if generation.error is not None:
                raise RuntimeError(generation.error)
        return [list(generation.token_ids) for generation in generations]

    return generate, __version__


if __name__ == "__main__":
    serve(load)
