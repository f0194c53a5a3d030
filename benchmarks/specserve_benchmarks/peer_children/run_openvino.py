"""OpenVINO GenAI, which reads the GGUF file directly; prompts run one after the other."""

from importlib import import_module
from typing import Any

from specserve_benchmarks.peer_children.child import Generate, Prompts, serve


def load(settings: dict[str, Any]) -> tuple[Generate, str]:
    numpy, openvino = import_module("numpy"), import_module("openvino")
    genai = import_module("openvino_genai")
    options: dict[str, Any] = {"INFERENCE_NUM_THREADS": settings["threads"]}
    if settings["lookup"]:
        options["prompt_lookup"] = True
    pipeline = genai.LLMPipeline(settings["gguf"], "CPU", **options)

    def answer(ids: list[int], max_tokens: int) -> list[int]:
        config = genai.GenerationConfig()
        config.max_new_tokens = max_tokens
        config.ignore_eos = True
        config.do_sample = False
        if settings["lookup"]:
            config.num_assistant_tokens = 4
            config.max_ngram_size = 4
        inputs = openvino.Tensor(numpy.array([ids], dtype=numpy.int64))
        return [int(token) for token in pipeline.generate(inputs, config).tokens[0]]

    def generate(prompts: Prompts, max_tokens: int) -> Prompts:
        return [answer(ids, max_tokens) for ids in prompts]

    return generate, str(genai.__version__)


if __name__ == "__main__":
    serve(load)
