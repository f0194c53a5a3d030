"""Builds tokenizer.json and tokenizer_config.json from GGUF metadata.

Supports byte-level BPE only. A pre-tokenizer that is not in the table of known ones is rejected,
because a wrong one gives plausible but wrong tokens.
"""

from typing import Any, Final

from gguf import TokenType
from msgspec import Struct
from tokenizers import AddedToken, Regex, Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.normalizers import NFC
from tokenizers.pre_tokenizers import ByteLevel, Digits, PreTokenizer, Sequence, Split
from tokenizers.processors import TemplateProcessing

from specserve.files import quoted
from specserve.hub.gguf_config import GgufFields
from specserve.hub.gguf_file import GgufFile
from specserve.text.control_tokens import END_OF_TURN


class PreTokenizerSpec(Struct, frozen=True):
    """How text is split into the words within which BPE merges."""

    pattern: str | None = None  # regular expression of a word; None: that of GPT-2
    single_digits: bool = False  # every digit is a word of its own
    ignore_merges: bool = False  # a word in the vocabulary is one token, without applying merges
    nfc: bool = False  # apply Unicode NFC first
    add_bos_default: bool = False  # default of add_bos_token for files that do not set it


def _word_pattern(max_digits: str) -> str:
    """The pre-tokenizer pattern of GPT-4 and its descendants.

    Its alternatives are contractions, words, numbers, symbols and whitespace. `max_digits` is the
    quantifier for the digits of a number, such as "{1,3}".
    """
    return (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
        + max_digits
        + r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )


_LLAMA: Final = PreTokenizerSpec(_word_pattern("{1,3}"), ignore_merges=True, add_bos_default=True)
PRE_TOKENIZERS: Final = {
    "gpt-2": PreTokenizerSpec(),
    "default": PreTokenizerSpec(),
    "smollm": PreTokenizerSpec(single_digits=True),
    "llama-bpe": _LLAMA,
    "llama3": _LLAMA,
    "llama-v3": _LLAMA,
    "qwen2": PreTokenizerSpec(_word_pattern(""), nfc=True),
}


def read_tokenizer(file: GgufFile) -> tuple[Tokenizer, dict[str, Any]]:
    """The tokenizer and the content of tokenizer_config.json.

    Raises `HubError` for a tokenizer that is not supported or has inconsistent metadata.
    """
    fields = GgufFields(file)
    model, pre = fields.text("tokenizer.ggml.model"), fields.text("tokenizer.ggml.pre", None)
    if model != "gpt2" or pre not in PRE_TOKENIZERS:
        raise fields.error(
            f"tokenizer {quoted(model)} with pre-tokenizer {quoted(pre)} cannot be converted; "
            f"supported: 'gpt2' with {', '.join(PRE_TOKENIZERS)}; use a directory with "
            f"tokenizer.json"
        )
    tokens = fields.texts("tokenizer.ggml.tokens")
    kinds = fields.get("tokenizer.ggml.token_type", (list,))
    vocab = {token: index for index, token in enumerate(tokens)}
    if len(vocab) != len(tokens) or len(kinds) != len(tokens):
        raise fields.error(
            f"{len(tokens)} tokens, {len(vocab)} of them distinct, with {len(kinds)} types"
        )
    merges = []
    for merge in fields.texts("tokenizer.ggml.merges"):
        left, _, right = merge.partition(" ")
        if not {left, right, left + right} <= vocab.keys():
            raise fields.error(f"the merge {quoted(merge)} does not join two tokens to a third")
        merges.append((left, right))
    spec = PRE_TOKENIZERS[pre]
    tokenizer = Tokenizer(BPE(vocab, merges, ignore_merges=spec.ignore_merges))
    _set_pre_tokenizer(tokenizer, spec)
    _add_tokens(tokenizer, tokens, kinds)
    config = _tokenizer_config(fields, tokens, spec)
    if config["add_bos_token"]:
        bos = config["bos_token"]
        tokenizer.post_processor = TemplateProcessing(
            single=f"{bos} $A",
            pair=f"{bos} $A {bos} $B:1",
            special_tokens=[(bos, tokenizer.token_to_id(bos))],
        )
    return tokenizer, config


def _set_pre_tokenizer(tokenizer: Tokenizer, spec: PreTokenizerSpec) -> None:
    """Set the normalizer, pre-tokenizer and decoder of `tokenizer`."""
    steps: list[PreTokenizer] = []
    if spec.single_digits:
        steps.append(Digits(individual_digits=True))
    if spec.pattern is not None:
        steps.append(Split(Regex(spec.pattern), behavior="isolated"))
    steps.append(ByteLevel(add_prefix_space=False, use_regex=spec.pattern is None))
    tokenizer.pre_tokenizer = Sequence(steps)
    tokenizer.decoder = ByteLevelDecoder()
    if spec.nfc:
        tokenizer.normalizer = NFC()


def end_tokens(file: GgufFile) -> list[int]:
    """Ids of the tokens that end a text or a turn, for generation_config.json.

    Without a key for the end of a turn, the tokens spelled as in `END_OF_TURN` are used.
    """
    fields = GgufFields(file)
    tokens = fields.texts("tokenizer.ggml.tokens")
    by_key = {key: _token_id(fields, key, tokens) for key in ("eos", "eot", "eom")}
    ids = [index for index in by_key.values() if index is not None]
    if by_key["eot"] is None:
        ids += [index for index, token in enumerate(tokens) if token in END_OF_TURN]
    return list(dict.fromkeys(ids))


def _add_tokens(tokenizer: Tokenizer, tokens: list[str], kinds: list[int]) -> None:
    """Register the tokens that are matched whole in text. They have ids in the vocabulary."""
    for token, kind in zip(tokens, kinds, strict=True):
        special = kind == TokenType.CONTROL or token in END_OF_TURN
        if special or kind == TokenType.USER_DEFINED:
            added = AddedToken(token, special=special, normalized=False)
            (tokenizer.add_special_tokens if special else tokenizer.add_tokens)([added])


def _tokenizer_config(
    fields: GgufFields, tokens: list[str], spec: PreTokenizerSpec
) -> dict[str, Any]:
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": fields.integer("{arch}.context_length"),
        "clean_up_tokenization_spaces": False,
    }
    for ours, theirs in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        if (index := _token_id(fields, theirs, tokens)) is not None:
            config[f"{ours}_token"] = tokens[index]
    default = spec.add_bos_default and "bos_token" in config
    config["add_bos_token"] = fields.get("tokenizer.ggml.add_bos_token", (bool,), default)
    if config["add_bos_token"] and "bos_token" not in config:
        raise fields.error("tokenizer.ggml.add_bos_token is set without a bos_token_id")
    if (template := fields.text("tokenizer.chat_template", None)) is not None:
        config["chat_template"] = template
    return config


def _token_id(fields: GgufFields, name: str, tokens: list[str]) -> int | None:
    key = f"tokenizer.ggml.{name}_token_id"
    index: int | None = fields.integer(key, None)
    if index is not None and not 0 <= index < len(tokens):
        raise fields.error(f"{key} = {index} is no token; there are {len(tokens)}")
    return index
