"""Conversion between text and token ids: tokenizer, chat template, streaming, stop strings."""

from specserve.text.incremental_decoder import IncrementalDecoder
from specserve.text.model_files import TokenizerError
from specserve.text.stop_checker import StopChecker
from specserve.text.tokenizer import Tokenizer, same_vocabulary

__all__ = ["IncrementalDecoder", "StopChecker", "Tokenizer", "TokenizerError", "same_vocabulary"]
