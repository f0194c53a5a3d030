"""Maps the architecture named in config.json to the model class that runs it.

An architecture that differs from these only in shape needs a line here and one in `shape.FAMILIES`.
"""

from collections.abc import Callable, Mapping
from typing import Final

from specserve.models.llama import LlamaModel

BUILDERS: Final[Mapping[str, Callable[..., LlamaModel]]] = {
    "LlamaForCausalLM": LlamaModel,
    "MistralForCausalLM": LlamaModel,
    "Qwen2ForCausalLM": LlamaModel,
    "Qwen3ForCausalLM": LlamaModel,
}
