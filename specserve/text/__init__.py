"""Conversion between text and token ids: tokenizer, chat template, streaming, stop strings."""

from specserve.text.model_files import TextError
from specserve.text.stream import IncrementalDecoder, StopChecker
from specserve.text.tokenizer import Tokenizer, same_vocabulary

__all__ = ["IncrementalDecoder", "StopChecker", "TextError", "Tokenizer", "same_vocabulary"]
