"""The end tokens of a model: the union of what its files name."""

from specserve.models.fields import ModelError
from specserve.models.shape import ModelShape
from specserve.text import Tokenizer


def end_tokens(shape: ModelShape, tokenizer: Tokenizer | None) -> tuple[int, ...]:
    """The ids in config.json and generation_config.json and those that the tokenizer's files name.

    The union, because the files of a fine-tuned model often disagree. Raises `ModelError` if an end
    token of the tokenizer is outside the model's vocabulary.
    """
    if tokenizer is None:
        return shape.eos_token_ids
    for token in tokenizer.eos_ids:
        if token >= shape.vocab_size:
            raise ModelError(
                f"{tokenizer.directory}/tokenizer_config.json: the end token has id {token}, and "
                f"vocab_size is {shape.vocab_size} in config.json; use the tokenizer that belongs "
                f"to the weights"
            )
    return tuple(dict.fromkeys((*shape.eos_token_ids, *tokenizer.eos_ids)))
