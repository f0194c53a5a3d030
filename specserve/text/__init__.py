"""Text to token ids and back: tokenizer, chat template, streaming, stop strings."""

from specserve.text.stream import IncrementalDecoder, StopChecker
from specserve.text.tokenizer import TextError, Tokenizer, same_vocabulary

__all__ = ["IncrementalDecoder", "StopChecker", "TextError", "Tokenizer", "same_vocabulary"]
