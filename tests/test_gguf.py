"""GGUF files to model directories: weights, rope, tokenizer, and files that are damaged."""

import json
import random
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer as TokenizerFile
from tokenizers.pre_tokenizers import ByteLevel
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from specserve.hub import HubError, resolve
from specserve.hub.bf16_file import to_bf16
from specserve.hub.convert import convert_gguf
from specserve.models.loader import load_model
from specserve.models.shape import ModelShape
from specserve.text import Tokenizer
from specserve_kernels.dispatch import select_kernels

Write = Callable[..., Path]
CONTROL = gguf.TokenType.CONTROL
# 256 bytes, three merges, then what text spells whole
MERGES = ["h e", "l l", "he ll"]
TOKENS = [
    *sorted(ByteLevel.alphabet()),
    *(merge.replace(" ", "") for merge in MERGES),
    "<|end|>",
    "<think>",
]
END = TOKENS.index("<|end|>")
SIZES: dict[str, Any] = {
    "vocab_size": len(TOKENS),
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "eos_token_id": END,
}


def _no_report(stage: str, fraction: float) -> None:
    pass


def _interleave(weight: np.ndarray[Any, Any], num_heads: int) -> np.ndarray[Any, Any]:
    """The row order of GGUF's llama: rotary pairs side by side."""
    halves = weight.reshape(num_heads, 2, weight.shape[0] // num_heads // 2, *weight.shape[1:])
    return halves.swapaxes(1, 2).reshape(weight.shape)


@pytest.fixture
def write_gguf(tmp_path: Path) -> Write:
    """write_gguf(metadata, tensors, arch): a file of a random model; metadata None drops a key."""

    def write(
        metadata: dict[str, Any] | None = None,
        tensors: dict[str, np.ndarray[Any, Any]] | None = None,
        arch: str = "llama",
        kind: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32,
    ) -> Path:
        path = tmp_path / "tiny.gguf"
        writer = gguf.GGUFWriter(path, arch)
        for key, value in {**_metadata(arch), **(metadata or {})}.items():
            if isinstance(value, str):
                writer.add_string(key, value)
            elif isinstance(value, list):
                writer.add_array(key, value)
            elif isinstance(value, bool):
                writer.add_bool(key, value)
            elif isinstance(value, float):
                writer.add_float32(key, value)
            elif value is not None:
                writer.add_uint32(key, value)
        for name, tensor in (_tensors(arch)[1] if tensors is None else tensors).items():
            quantised = tensor.ndim == 2 and kind != gguf.GGMLQuantizationType.F32
            data = gguf.quants.quantize(tensor, kind) if quantised else tensor
            writer.add_tensor(name, data, raw_dtype=kind if quantised else None)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path

    return write


def _metadata(arch: str) -> dict[str, Any]:
    return {
        f"{arch}.block_count": 2,
        f"{arch}.context_length": 64,
        f"{arch}.embedding_length": 64,
        f"{arch}.feed_forward_length": 96,
        f"{arch}.attention.head_count": 4,
        f"{arch}.attention.head_count_kv": 2,
        f"{arch}.attention.key_length": 16,
        f"{arch}.attention.layer_norm_rms_epsilon": 1e-5,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": TOKENS,
        "tokenizer.ggml.token_type": [1] * END + [CONTROL, gguf.TokenType.USER_DEFINED],
        "tokenizer.ggml.merges": MERGES,
        "tokenizer.ggml.eos_token_id": END,
    }


def _tensors(arch: str) -> tuple[Any, dict[str, np.ndarray[Any, Any]]]:
    """A random transformers model in bfloat16 values, and its tensors as GGUF has them."""
    torch.manual_seed(0)
    if arch == "llama":
        model: Any = LlamaForCausalLM(LlamaConfig(initializer_range=0.2, **SIZES))
    else:
        model = Qwen3ForCausalLM(Qwen3Config(initializer_range=0.2, **SIZES))
    model = model.bfloat16().float()
    names = gguf.get_tensor_name_map(getattr(gguf.MODEL_ARCH, arch.upper()), 2)
    tensors = {}
    for name, tensor in model.state_dict().items():
        data = tensor.numpy()
        for part, heads in (("q_proj", 4), ("k_proj", 2)):
            if arch == "llama" and part in name:
                data = _interleave(data, heads)
        tensors[str(names.get_name(name, (".weight", ".bias")))] = np.ascontiguousarray(data)
    return model, tensors


@pytest.mark.parametrize("arch", ["llama", "qwen3"])
def test_a_converted_model_is_the_same_model(write_gguf: Write, tmp_path: Path, arch: str) -> None:
    reference, tensors = _tensors(arch)
    path = write_gguf(tensors=tensors, arch=arch)
    stages: list[tuple[str, float]] = []
    directory = resolve(
        str(path), cache_dir=tmp_path / "cache", progress=lambda *at: stages.append(at)
    )
    model = load_model(
        directory,
        kernels=select_kernels(torch.device("cpu")),
        dtype=torch.float32,
        device=torch.device("cpu"),
        exact=True,
    )
    theirs = reference.state_dict()
    assert model.weight_slots().keys() == theirs.keys()
    for name, slot in model.weight_slots().items():
        assert torch.equal(slot, theirs[name]), name
    assert model.shape.eos_token_ids == (END,)
    assert model.shape.rms_norm_eps == 1e-5
    assert stages[-1] == ("converting tiny.gguf", 1.0)


def test_quantised_rows_are_restored_in_order(write_gguf: Write, tmp_path: Path) -> None:
    reference, _ = _tensors("llama")
    kind = gguf.GGMLQuantizationType.Q8_0
    convert_gguf(write_gguf(kind=kind), tmp_path, _no_report)
    ours = load_file(tmp_path / "model.safetensors")
    for name, theirs in reference.state_dict().items():
        torch.testing.assert_close(ours[name].float(), theirs, atol=0.01, rtol=0.01)


def test_a_second_start_reads_the_cache_and_a_new_file_does_not(
    write_gguf: Write, tmp_path: Path
) -> None:
    path, cache = write_gguf(), tmp_path / "cache"
    directory = resolve(str(path), cache_dir=cache)
    written = (directory / "model.safetensors").stat().st_mtime_ns
    assert resolve(str(path), cache_dir=cache) == directory
    assert (directory / "model.safetensors").stat().st_mtime_ns == written
    write_gguf({"llama.context_length": 32})
    assert resolve(str(path), cache_dir=cache) == directory
    assert ModelShape.from_dir(directory).max_position_embeddings == 32


def test_bfloat16_rounding_equals_torch() -> None:
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(-(2**31), 2**31 - 1, (100_000,), generator=generator, dtype=torch.int32)
    values = torch.cat([bits, torch.tensor([0x3F808000, 0x3F818000, 0x7F7FFFFF])]).to(torch.int32)
    floats = values.view(torch.float32)
    ours = torch.from_numpy(to_bf16(floats.numpy()).view(np.int16)).view(torch.bfloat16)
    torch.testing.assert_close(ours, floats.bfloat16(), rtol=0, atol=0, equal_nan=True)


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
    tensors = {**_tensors("llama")[1], "rope_freqs.weight": divisors.astype(np.float32)}
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
    assert tokenizer.encode("<think>") == [END + 1]
    assert tokenizer.chat([{"role": "user", "content": "he"}]) == [TOKENS.index("he"), END]
    assert tokenizer.eos_ids == (END,)


def test_a_beginning_token_is_added_when_the_file_says_so(
    write_gguf: Write, tmp_path: Path
) -> None:
    metadata = {"tokenizer.ggml.add_bos_token": True, "tokenizer.ggml.bos_token_id": END}
    convert_gguf(write_gguf(metadata), tmp_path, _no_report)
    assert Tokenizer(tmp_path).encode("hell") == [END, TOKENS.index("hell")]


@pytest.mark.parametrize(
    ("pre", "text", "pieces"),
    [
        ("gpt-2", "it's  1234 no", ["it", "'s", " ", " 1234", " no"]),
        ("smollm", "ab 12", ["ab", " ", "1", "2"]),
        ("llama-bpe", "it's 12345\n\n x", ["it", "'s", " ", "123", "45", "\n\n", " x"]),
        ("qwen2", "IT'S 12 e\u0301", ["IT", "'S", " ", "1", "2", " \u00e9"]),
    ],
)
def test_each_known_cut(
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
        ({"llama.attention.head_count": 0}, "0 heads"),
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
        ({"tokenizer.ggml.add_bos_token": True}, "without a bos_token_id"),
    ],
)
def test_what_cannot_be_converted_is_refused(
    write_gguf: Write, tmp_path: Path, metadata: dict[str, Any], message: str
) -> None:
    path = write_gguf(metadata)
    with pytest.raises(HubError, match=message) as error:
        resolve(str(path), cache_dir=tmp_path / "cache")
    assert "tiny.gguf" in str(error.value) or "attn_q" in str(error.value)
    assert not [p for p in (tmp_path / "cache").iterdir() if not p.name.endswith(".lock")]


def test_all_unknown_tensors_in_one_error(write_gguf: Write, tmp_path: Path) -> None:
    extra = {
        "blk.0.ssm_in.weight": np.ones(4, np.float32),
        "v.patch.weight": np.ones(4, np.float32),
    }
    path = write_gguf(tensors={**_tensors("llama")[1], **extra})
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
