"""Tokenizers of the shapes that chat models are published with, small enough to see through."""

from collections.abc import Callable
from pathlib import Path
from typing import Final

from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as TokenizerFile

MARKERS: Final = ("<s>", "</s>", "<|im_start|>", "<|im_end|>", "<think>", "</think>")
_WORDS: Final = ("hello", "user", "assistant", "system")


def _sentencepiece() -> TokenizerFile:
    """Llama 2's kind: pieces with U+2581 for space, bytes for what has no piece, markers first."""
    pieces = ["<unk>", *MARKERS, *(f"<0x{byte:02X}>" for byte in range(256)), "▁"]
    pieces += [chr(code) for code in range(33, 127)]
    merges: list[tuple[str, str]] = []
    for word in _WORDS:
        for end in range(1, len(word)):
            pair = (word[:end], word[end])
            if pair not in merges:
                merges.append(pair)
                pieces.append("".join(pair))
        merges.append(("▁", word))
        pieces.append("▁" + word)
    vocab = {piece: index for index, piece in enumerate(dict.fromkeys(pieces))}
    return TokenizerFile(
        models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )


def _legacy() -> TokenizerFile:
    file = _sentencepiece()
    file.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    return file


def _metaspace(scheme: str) -> TokenizerFile:
    file = _sentencepiece()
    file.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    return file


def _byte_level(*, prefix_space: bool = False, markers_inside: bool = False) -> TokenizerFile:
    """GPT-2's kind; with `markers_inside` as converted from GGUF, taking whole words."""
    vocab = sorted(pre_tokenizers.ByteLevel.alphabet())
    if markers_inside:
        vocab += MARKERS
    file = TokenizerFile(
        models.BPE(
            {piece: index for index, piece in enumerate(vocab)}, [], ignore_merges=markers_inside
        )
    )
    file.pre_tokenizer = pre_tokenizers.ByteLevel(
        add_prefix_space=prefix_space, use_regex=not markers_inside
    )
    return file


def _unigram() -> TokenizerFile:
    """T5's kind: markers are pieces that win over all others."""
    pieces = [("<unk>", 0.0), *((marker, 0.0) for marker in MARKERS), ("▁", -2.0)]
    pieces += [(chr(code), -3.0) for code in range(33, 127)]
    pieces += [("▁" + word, -4.0) for word in _WORDS]
    file = TokenizerFile(models.Unigram(pieces, 0, False))
    file.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=True)
    return file


def _folded() -> TokenizerFile:
    """Text is composed and in lower case before tokens are looked for."""
    file = _byte_level()
    file.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    return file


SHAPES: Final[dict[str, Callable[[], TokenizerFile]]] = {
    "Llama 2, legacy": _legacy,
    "Mistral": lambda: _metaspace("first"),
    "TinyLlama": lambda: _metaspace("always"),
    "Gemma": lambda: _metaspace("never"),
    "T5": _unigram,
    "Qwen 2": _byte_level,
    "GPT-2 with a space first": lambda: _byte_level(prefix_space=True),
    "Llama 3 from GGUF": lambda: _byte_level(markers_inside=True),
    "folded": _folded,
}


def write_shape(
    directory: Path,
    shape: str,
    *,
    special: tuple[str, ...] = MARKERS,
    plain: tuple[str, ...] = (),
    normalized: bool = False,
    rstrip: bool = False,
) -> Path:
    """tokenizer.json of a shape, with added tokens that are special and `plain` ones."""
    file = SHAPES[shape]()
    file.decoder = (
        decoders.ByteLevel()
        if isinstance(file.pre_tokenizer, pre_tokenizers.ByteLevel)
        else decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback()])
    )
    flags = {"normalized": normalized, "rstrip": rstrip}
    file.add_special_tokens([AddedToken(t, special=True, **flags) for t in special])
    file.add_tokens([AddedToken(t, special=False, normalized=False) for t in plain])
    file.save(str(directory / "tokenizer.json"))
    return directory
