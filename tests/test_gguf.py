"""GGUF files to model directories: configs, rope, tokenizer, and files that are damaged."""

import json
import random
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf_models import CONFIGS, END, TOKENS, random_tensors
from gguf_models import write_gguf as write_gguf_to
from tokenizers import Tokenizer as TokenizerFile

from specserve.hub import HubError, resolve
from specserve.hub.convert import convert_gguf
from specserve.models.shape import ModelShape
from specserve.text import Tokenizer

Write = Callable[..., Path]


def _no_report(stage: str, fraction: float) -> None:
    pass


@pytest.fixture
def write_gguf(tmp_path: Path) -> Write:
    """write_gguf(metadata, tensors): see `gguf_models`."""
    return partial(write_gguf_to, tmp_path / "tiny.gguf")


def test_the_directory_has_the_file_itself(write_gguf: Write, tmp_path: Path) -> None:
    path, stages = write_gguf(), []
    directory = resolve(
        str(path), cache_dir=tmp_path / "cache", progress=lambda *at: stages.append(at)
    )
    assert (directory / "model.gguf").readlink() == path.resolve()
    assert not list(directory.glob("*.safetensors"))
    shape = ModelShape.from_dir(directory)
    assert (shape.eos_token_ids, shape.rms_norm_eps) == ((END,), 1e-5)
    assert stages[-1] == ("reading tiny.gguf", 1.0)


def test_a_second_start_reads_the_cache_and_a_new_file_does_not(
    write_gguf: Write, tmp_path: Path
) -> None:
    path, cache = write_gguf(), tmp_path / "cache"
    directory = resolve(str(path), cache_dir=cache)
    written = (directory / "config.json").stat().st_mtime_ns
    assert resolve(str(path), cache_dir=cache) == directory
    assert (directory / "config.json").stat().st_mtime_ns == written
    write_gguf({"llama.context_length": 32})
    assert resolve(str(path), cache_dir=cache) == directory
    assert ModelShape.from_dir(directory).max_position_embeddings == 32


YARN = {"llama.rope.scaling.type": "yarn", "llama.rope.scaling.factor": 4.0}


@pytest.mark.parametrize(
    ("metadata", "scaling"),
    [
        ({}, None),
        (
            {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 2.0},
            {"rope_type": "linear", "factor": 2.0},
        ),
        (
            {**YARN, "llama.rope.scaling.original_context_length": 16},
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
        ),
    ],
)
def test_rope_scaling_from_metadata(
    write_gguf: Write, tmp_path: Path, metadata: dict[str, Any], scaling: dict[str, Any] | None
) -> None:
    metadata = {"llama.rope.freq_base": 500000.0, **metadata}
    convert_gguf(write_gguf(metadata), tmp_path, _no_report)
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["rope_theta"], config.get("rope_scaling")) == (500000.0, scaling)


def test_llama3_rope_is_read_from_its_divisors(write_gguf: Write, tmp_path: Path) -> None:
    """The divisors as published for Llama 3.1 (head size 128), every sixteenth of them."""
    theta, factor = 500000.0, 8.0
    wavelengths = 2 * np.pi * theta ** (np.arange(8) / 8)
    smooth = (8192 / wavelengths - 1) / 3
    divisors = 1 / ((1 - smooth) / factor + smooth)
    divisors = np.where(wavelengths < 2048, 1, np.where(wavelengths > 8192, factor, divisors))
    metadata = {"llama.rope.freq_base": theta}
    tensors = {**random_tensors(CONFIGS["llama"]), "rope_freqs.weight": divisors.astype(np.float32)}
    convert_gguf(write_gguf(metadata, tensors), tmp_path, _no_report)
    rope = ModelShape.from_dir(tmp_path).rope
    assert (rope.kind, rope.factor, rope.original_context) == ("llama3", 8.0, 8192)
    assert (rope.low_freq_factor, rope.high_freq_factor) == (1.0, 4.0)

    tensors["rope_freqs.weight"][3] = 5.0
    with pytest.raises(HubError, match="no known rope scaling"):
        convert_gguf(write_gguf(metadata, tensors), tmp_path, _no_report)


def test_tokens_keep_their_ids_and_kinds(write_gguf: Write, tmp_path: Path) -> None:
    metadata = {"tokenizer.chat_template": "{{ messages[0].content }}<|end|>"}
    convert_gguf(write_gguf(metadata), tmp_path, _no_report)
    tokenizer = Tokenizer(tmp_path)
    assert tokenizer.vocab_size == len(TOKENS)
    assert tokenizer.encode("hell") == [TOKENS.index("hell")]
    assert tokenizer.encode("<|end|>", allow_special=True) == [END]
    assert END not in tokenizer.encode("<|end|>")
    assert tokenizer.encode("<think>", allow_special=True) == [END + 1]
    assert END + 1 not in tokenizer.encode("<think>")
    assert tokenizer.chat([{"role": "user", "content": "he"}]) == [TOKENS.index("he"), END]
    assert tokenizer.eos_ids == (END,)


def test_a_beginning_token_is_added_if_the_file_requires_it(
    write_gguf: Write, tmp_path: Path
) -> None:
    metadata = {"tokenizer.ggml.add_bos_token": True, "tokenizer.ggml.bos_token_id": END}
    convert_gguf(write_gguf(metadata), tmp_path, _no_report)
    assert Tokenizer(tmp_path).encode("hell") == [END, TOKENS.index("hell")]


@pytest.mark.parametrize(
    ("metadata", "begins"),
    [
        ({"tokenizer.ggml.pre": "llama-bpe"}, True),
        ({"tokenizer.ggml.pre": "llama-bpe", "tokenizer.ggml.add_bos_token": False}, False),
        ({"tokenizer.ggml.pre": "llama-bpe", "tokenizer.ggml.bos_token_id": None}, False),
        ({"tokenizer.ggml.pre": "gpt-2"}, False),
        ({"tokenizer.ggml.pre": "qwen2"}, False),
        ({"tokenizer.ggml.pre": "qwen2", "tokenizer.ggml.add_bos_token": True}, True),
    ],
)
def test_whether_prompts_begin_with_bos(
    write_gguf: Write, tmp_path: Path, metadata: dict[str, Any], begins: bool
) -> None:
    """Llama 3's pre-tokenizer stands for it where the key is missing, as in many files."""
    convert_gguf(write_gguf({"tokenizer.ggml.bos_token_id": END, **metadata}), tmp_path, _no_report)
    assert (Tokenizer(tmp_path).encode("hell")[0] == END) == begins


_TURNS = [*TOKENS, "<|eot_id|>", "<|im_end|>", "<|eom_id|>"]
_FIRST = len(TOKENS)


@pytest.mark.parametrize(
    ("metadata", "ends"),
    [
        ({}, [END, _FIRST, _FIRST + 1, _FIRST + 2]),
        ({"tokenizer.ggml.eot_token_id": _FIRST}, [END, _FIRST]),
        (
            {"tokenizer.ggml.eot_token_id": _FIRST + 1, "tokenizer.ggml.eom_token_id": _FIRST + 2},
            [END, _FIRST + 1, _FIRST + 2],
        ),
    ],
)
def test_what_ends_a_turn(
    write_gguf: Write, tmp_path: Path, metadata: dict[str, Any], ends: list[int]
) -> None:
    """By its key, else by its name; and it is a control token, whatever the file flags."""
    kinds = [1] * len(TOKENS) + [3, 1, 4]
    tokens = {"tokenizer.ggml.tokens": _TURNS, "tokenizer.ggml.token_type": kinds}
    eos = {"tokenizer.ggml.eos_token_id": END}
    file = write_gguf(tokens | eos | metadata, _tensors_for(len(_TURNS)))
    convert_gguf(file, tmp_path, _no_report)
    assert ModelShape.from_dir(tmp_path).eos_token_ids == tuple(ends)
    assert Tokenizer(tmp_path).hidden_ids >= {_FIRST, _FIRST + 1, _FIRST + 2}


def _tensors_for(vocab_size: int) -> dict[str, Any]:
    tensors = random_tensors(CONFIGS["llama"])
    for name in ("token_embd.weight", "output.weight"):
        rows = [tensors[name][:1]] * (vocab_size - len(TOKENS))
        tensors[name] = np.concatenate([tensors[name], *rows])
    return tensors


@pytest.mark.parametrize(
    ("pre", "text", "pieces"),
    [
        ("gpt-2", "it's  1234 no", ["it", "'s", " ", " 1234", " no"]),
        ("smollm", "ab 12", ["ab", " ", "1", "2"]),
        ("llama-bpe", "it's 12345\n\n x", ["it", "'s", " ", "123", "45", "\n\n", " x"]),
        ("qwen2", "IT'S 12 e\u0301", ["IT", "'S", " ", "1", "2", " \u00e9"]),
    ],
)
def test_each_known_pre_tokenizer(
    write_gguf: Write, tmp_path: Path, pre: str, text: str, pieces: list[str]
) -> None:
    convert_gguf(write_gguf({"tokenizer.ggml.pre": pre}), tmp_path, _no_report)
    tokenizer = TokenizerFile.from_file(str(tmp_path / "tokenizer.json"))
    cutter, decoder = tokenizer.pre_tokenizer, tokenizer.decoder
    assert cutter is not None
    assert decoder is not None
    normal = tokenizer.normalizer.normalize_str(text) if tokenizer.normalizer else text
    assert [decoder.decode([piece]) for piece, _ in cutter.pre_tokenize_str(normal)] == pieces


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"general.architecture": "mamba"}, "'mamba' is not supported; supported: llama"),
        ({"llama.expert_count": 8}, "mixtures of experts"),
        ({"split.count": 2}, "one part of several"),
        ({"llama.block_count": None}, "llama.block_count is missing"),
        ({"llama.block_count": "two"}, "llama.block_count = 'two'"),
        ({"llama.attention.head_count": 0}, "head_count = 0 .*from 1"),
        ({"llama.attention.head_count": 3}, r"attn_q.weight.*\[64, 64\].*3 heads of size 16"),
        ({"llama.rope.dimension_count": 8}, "a part of each head"),
        (YARN, "original_context_length is missing"),
        (
            {"llama.rope.scaling.type": "longrope", "llama.rope.scaling.factor": 2.0},
            "'longrope' is not supported",
        ),
        ({"tokenizer.ggml.model": "llama"}, "tokenizer 'llama'.*tokenizer.json"),
        ({"tokenizer.ggml.pre": "tekken"}, "pre-tokenizer 'tekken' cannot.*smollm"),
        ({"tokenizer.ggml.pre": None}, "pre-tokenizer None"),
        ({"tokenizer.ggml.tokens": TOKENS[:-1] + TOKENS[:1]}, "260 of them distinct"),
        ({"tokenizer.ggml.merges": ["q q"]}, "the merge 'q q' does not join"),
        ({"tokenizer.ggml.merges": [1, 2]}, "merges is not a list of strings"),
        ({"tokenizer.ggml.eos_token_id": 999}, "eos_token_id = 999 is no token"),
        ({"tokenizer.ggml.eot_token_id": 261}, "eot_token_id = 261 is no token"),
        ({"tokenizer.ggml.add_bos_token": True}, "without a bos_token_id"),
    ],
)
def test_what_cannot_be_converted_is_refused(
    write_gguf: Write, tmp_path: Path, metadata: dict[str, Any], message: str
) -> None:
    path = write_gguf(metadata)
    with pytest.raises(HubError, match=message) as error:
        resolve(str(path), cache_dir=tmp_path / "cache")
    assert "tiny.gguf" in str(error.value)
    assert not [p for p in (tmp_path / "cache").iterdir() if not p.name.endswith(".lock")]


def test_all_unknown_tensors_in_one_error(write_gguf: Write, tmp_path: Path) -> None:
    extra = {
        "blk.0.ssm_in.weight": np.ones(4, np.float32),
        "v.patch.weight": np.ones(4, np.float32),
    }
    path = write_gguf(tensors={**random_tensors(CONFIGS["llama"]), **extra})
    with pytest.raises(HubError, match=r"2 tensors are unknown: blk\.0\.ssm_in\.weight, v\.patch"):
        convert_gguf(path, tmp_path, _no_report)


def test_a_file_cut_short_anywhere_is_refused(write_gguf: Write, tmp_path: Path) -> None:
    path = write_gguf()
    whole = path.read_bytes()
    for size in [0, 3, 20, *range(24, len(whole), len(whole) // 40), len(whole) - 64]:
        path.write_bytes(whole[:size])
        with pytest.raises(HubError, match=r"tiny\.gguf"):
            convert_gguf(path, tmp_path, _no_report)


def test_flipped_bytes_never_end_in_another_error(write_gguf: Write, tmp_path: Path) -> None:
    path = write_gguf()
    whole = path.read_bytes()
    header = whole.index(b"output_norm.weight")
    chance = random.Random(0)
    for _ in range(150):
        damaged = bytearray(whole)
        damaged[chance.randrange(header)] ^= 1 << chance.randrange(8)
        path.write_bytes(damaged)
        with suppress(HubError):
            convert_gguf(path, tmp_path, _no_report)
