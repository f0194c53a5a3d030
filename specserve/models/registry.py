"""From the architecture named in config.json to the model that runs it.

One line per architecture. Adding one that differs only in shape also takes a line in
`shape.FAMILIES`.
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
