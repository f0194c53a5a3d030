"""Small tokenizers of every family on disk, with added tokens that are easily misread."""

import json
from collections.abc import Iterable
from pathlib import Path

from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as TokenizerFile

from specserve.text.detokenizer import byte_alphabet

SPECIAL = ("<s>", "</s>")
# Not special. All but the first two are written with characters that decoders rewrite.
ADDED = ("<think>", "  ", "café", "中文", "▁▁x", "<0x41>", "Ġa", "õ", "<\uff5cUser\uff5c>")
WORDS = (
    "one",
    "▁one",
    "▁two",
    "▁",
    "▁▁",
    "x",
    "▁x▁y",
    "A",
    "é",
    "▁é",
    "語",
    ".",
    "##x",
    "'",
    "n't",
)
STRIP = decoders.Strip(" ", 1, 0)
_SPACES = decoders.Replace("▁", " ")

FAMILIES = {
    "byte level": decoders.ByteLevel(),
    "byte level in a sequence": decoders.Sequence([decoders.ByteLevel()]),
    "sentencepiece": decoders.Sequence([_SPACES, decoders.ByteFallback(), decoders.Fuse(), STRIP]),
    "sentencepiece that keeps its space": decoders.Sequence(
        [_SPACES, decoders.ByteFallback(), decoders.Fuse()]
    ),
    "sentencepiece that fuses first": decoders.Sequence(
        [decoders.ByteFallback(), decoders.Fuse(), _SPACES, STRIP]
    ),
    "metaspace": decoders.Metaspace(),
    "metaspace that keeps its space": decoders.Metaspace(prepend_scheme="never"),
    "metaspace with bytes": decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()]),
    "wordpiece": decoders.WordPiece(),
    "replaced by a pattern": decoders.Sequence([decoders.Replace(Regex("[▁_]"), " ")]),
    "no decoder": None,
}


def spellings(family: str) -> list[str]:
    """Of the model's own tokens, by id."""
    if family.startswith("byte level"):
        own = [*sorted(byte_alphabet()), "Ġone", "Ã©", "ĠĠ", "<unk>"]
    else:
        own = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *WORDS]
    return [*own, SPECIAL[0]]


def write_tokenizer(
    directory: Path,
    family: str,
    *,
    added: Iterable[str] = ADDED,
    special: Iterable[str] = SPECIAL,
    own: Iterable[str] = (),
    **config: object,
) -> Path:
    """A tokenizer of one of the families, whose model has `own` tokens more; `config` is
    tokenizer_config.json."""
    vocabulary: dict[str, int] = {}
    for token in (*spellings(family), *own):
        vocabulary.setdefault(token, len(vocabulary))
    file = TokenizerFile(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    if family.startswith("byte level"):
        file.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    else:
        file.normalizer = normalizers.Replace(" ", "▁")
    if FAMILIES[family] is not None:
        file.decoder = FAMILIES[family]
    file.add_special_tokens([AddedToken(token, special=True) for token in special])
    file.add_tokens([AddedToken(token, special=False, normalized=False) for token in added])
    directory.mkdir(parents=True, exist_ok=True)
    file.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return directory
