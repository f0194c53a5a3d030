"""transformers in bfloat16; prompts run one after the other."""

from importlib import import_module
from typing import Any

from specserve_benchmarks.peer_children.child import Generate, Prompts, serve


def load(settings: dict[str, Any]) -> tuple[Generate, str]:
    torch, transformers = import_module("torch"), import_module("transformers")
    torch.set_num_threads(settings["threads"])
    model = transformers.AutoModelForCausalLM.from_pretrained(
        settings["dense"], dtype=torch.bfloat16, local_files_only=True
    ).eval()
    options = {"prompt_lookup_num_tokens": 4} if settings["lookup"] else {}

    def answer(ids: list[int], max_tokens: int) -> list[int]:
        inputs = torch.tensor([ids])
        output = model.generate(
            inputs,
            attention_mask=torch.ones_like(inputs),
            max_new_tokens=max_tokens,
            min_new_tokens=max_tokens,
            do_sample=False,
            pad_token_id=0,
            **options,
        )
        return [int(token) for token in output[0, len(ids) :]]

    def generate(prompts: Prompts, max_tokens: int) -> Prompts:
        with torch.inference_mode():
            return [answer(ids, max_tokens) for ids in prompts]

    return generate, str(transformers.__version__)


if __name__ == "__main__":
    serve(load)
