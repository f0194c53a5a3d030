"""Which tokens end an answer: all that any of a model's files says, in one place."""

from specserve.models.fields import ModelError
from specserve.models.shape import ModelShape
from specserve.text import Tokenizer


def end_tokens(shape: ModelShape, tokenizer: Tokenizer | None) -> tuple[int, ...]:
    """The ids in config.json and generation_config.json, and what the tokenizer's files name.

    A fine-tune often changes one of them and forgets the others. Raises `ModelError` for a token
    that the model has no logit for.
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
