"""Settings: where they come from, what overrides what, and what is refused with which words."""

from pathlib import Path
from typing import Any

import msgspec
import pytest

from specserve.cli.parser import build_parser, engine_config
from specserve.cli.show_config import show_config
from specserve.config import (
    ALL_SECTIONS,
    ConfigError,
    EngineConfig,
    llm_config,
    load_config,
    parse_bytes,
)
from specserve_evals.runs import parse_variants


def write(folder: Path, text: str) -> Path:
    file = folder / "specserve.toml"
    file.write_text(text)
    return file


def test_defaults() -> None:
    assert load_config({}) == EngineConfig()


def test_settings_override_the_file(tmp_path: Path) -> None:
    file = write(
        tmp_path,
        '[target]\ntarget = "a"\nthreads = 1\n[cache]\nblock_size = 32\n'
        '[draft]\ndraft = ["ngram", "other"]\n[draft.options.ngram]\nmax_match = 3\n',
    )
    config = load_config({"threads": 2, "kv_memory": "1GiB"}, file)
    assert (config.target.target, config.target.threads) == ("a", 2)
    assert (config.cache.block_size, config.cache.kv_memory) == (32, "1GiB")
    assert config.draft.draft == ("ngram", "other")
    assert config.draft.options == {"ngram": {"max_match": 3}}


@pytest.mark.parametrize("draft", ["ngram,a/b", "ngram, a/b", ["ngram", "a/b"], ("ngram,a/b",)])
def test_drafters_are_a_list_or_separated_by_commas(tmp_path: Path, draft: Any) -> None:
    """From Python, from a file, and from flags, which `serve`, `generate` and the evals share."""
    assert load_config({"draft": draft}).draft.draft == ("ngram", "a/b")
    assert llm_config(None, draft, None, {}).draft.draft == ("ngram", "a/b")
    shown = list(draft) if isinstance(draft, tuple) else draft
    file = write(tmp_path, f"[draft]\ndraft = {shown!r}\n")
    assert load_config({}, file).draft.draft == ("ngram", "a/b")
    flags = [f"--draft={text}" for text in ([draft] if isinstance(draft, str) else draft)]
    for command in ("serve", "generate"):
        args = build_parser().parse_args([command, *flags])
        assert engine_config(args).draft.draft == ("ngram", "a/b")
    (variant,) = parse_variants([",".join(shown) if isinstance(shown, list) else shown])
    assert variant.draft == ("ngram", "a/b")


def test_field_names_are_unique_over_sections() -> None:
    names = [
        name
        for section in msgspec.structs.fields(EngineConfig)
        for name in section.type.__struct_fields__
    ]
    assert len(names) == len(set(names))


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"draft": ["ngram", 'a, "b"\\ü\x7f\n\t'], "prefix_caching": False, "threads": 2},
        {"options": {"ngram": {"max_match": 3}, "my.own": {"a b": [1, 2.5, {"c": True}], "d": {}}}},
        {"options": {"x": {"low": float("-inf"), "big": 1e300}}, "kv_memory": "2GiB"},
        {
            "api_key_file": "keys",
            "max_prompt_tokens": 7,
            "allowed_origins": ("http://a", "http://b"),
        },
    ],
)
def test_what_is_shown_can_be_read_back(tmp_path: Path, settings: dict[str, Any]) -> None:
    """Settings without a value too: they are comments."""
    config = load_config(settings, sections=ALL_SECTIONS)
    shown = show_config(config)
    assert load_config({}, write(tmp_path, shown)) == config
    values = [item for section in msgspec.to_builtins(config).values() for item in section.items()]
    assert [line for line in shown.splitlines() if line.startswith("#")] == [
        f"# {name}: not given" for name, value in values if value is None
    ]


def test_an_option_without_a_value_is_not_shown(tmp_path: Path) -> None:
    config = load_config({"options": {"recycle": {"file": None, "pretrained": False}}})
    again = load_config({}, write(tmp_path, show_config(config)))
    assert again.draft.options == {"recycle": {"pretrained": False}}


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"block_siz": 16}, ["block_siz:", "did you mean 'block_size'"]),
        ({"zzz": 1}, ["zzz:", "known:", "max_model_len"]),
        ({"block_size": 24}, ["block_size: 24", "8, 16, 32, 64 or 128"]),
        ({"block_size": True}, ["block_size: True; expected int, got bool"]),
        ({"threads": 0}, ["threads: 0", "1 to 1024"]),
        ({"threads": "2"}, ["threads: '2'; expected int, got str"]),
        ({"max_model_len": 1}, ["max_model_len: 1"]),
        ({"draft": ["ngram", "ngram"]}, ["draft:", "twice"]),
        ({"max_nodes": 0}, ["max_nodes: 0", "1 to 64"]),
        ({"max_nodes": 65}, ["max_nodes: 65", "1 to 64"]),
        ({"draft": []}, ["draft:", "'none'"]),
        ({"draft": "ngram,"}, ["draft: 'ngram,' has an empty name", "NAME,NAME"]),
        ({"draft": "none,ngram"}, ["draft: 'none' cannot be combined"]),
        ({"draft": ["none", "ngram"]}, ["draft: 'none' cannot be combined"]),
        ({"max_num_seqs": 0}, ["max_num_seqs: 0"]),
        ({"max_num_seqs": 300}, ["max_num_batched_tokens: 256", "300 to 65536"]),
        ({"dtype": "float8"}, ["float8", "dtype"]),
        ({"exactness": "perhaps"}, ["perhaps", "exactness"]),
        ({"kv_memory": "lots"}, ["kv_memory: 'lots'", "2GiB"]),
        ({"options": {"ngram": 3}}, ["options"]),
    ],
)
def test_a_wrong_setting_is_named(settings: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(settings)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    "settings",
    [
        {"max_nodes": 1},
        {"max_nodes": 64},
        {"threads": 1024},
        {"max_model_len": 2},
        {"max_num_seqs": 256},
        {"max_num_seqs": 300, "max_num_batched_tokens": 300},
        {"block_size": 8},
        {"block_size": 128},
        {"draft": ["none"]},
    ],
)
def test_the_edges_are_allowed(settings: dict[str, Any]) -> None:
    load_config(settings)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[cache]\nblock_siz = 16\n", ["cache.block_siz", "did you mean 'block_size'"]),
        ("[cash]\nblock_size = 16\n", ["cash", "did you mean 'cache'"]),
        ("cache = 16\n", ["cache", "section"]),
        ("block_size = 16\n", ["block_size", "known: target, cache, draft, schedule"]),
        ("[cache]\nblock_size = 16.5\n", ["block_size"]),
        ("[cache\n", ["not valid TOML"]),
        ('[target]\ntarget = "\\xff"\n', ["not valid TOML"]),
    ],
)
def test_a_wrong_file_is_named(tmp_path: Path, text: str, words: list[str]) -> None:
    file = write(tmp_path, text)
    with pytest.raises(ConfigError) as caught:
        load_config({}, file)
    for word in [str(file), *words]:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[draft]\ndraft = 3\n", "draft.draft: 3; expected array, got int"),
        ('[draft]\nmax_nodes = "a"\n', "draft.max_nodes: 'a'; expected int, got str"),
        ("[draft.options]\nngram = 3\n", "draft.options: {'ngram': 3}; expected object, got int"),
        ('[draft]\ndraft = ["ngram", 1]\n', "draft.draft: ['ngram', 1]; expected str, got int"),
    ],
)
def test_the_error_of_a_wrong_type_names_the_value(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "specserve.toml"
    file.write_text(text)
    with pytest.raises(ConfigError) as error:
        load_config({}, file)
    assert str(error.value) == f"{file}: {message}"


def test_bytes_that_are_no_text_are_no_toml(tmp_path: Path) -> None:
    file = tmp_path / "binary.toml"
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="not valid TOML"):
        load_config({}, file)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"missing\.toml cannot be read"):
        load_config({}, tmp_path / "missing.toml")


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("1", 1),
        ("1B", 1),
        ("2K", 2048),
        ("512MiB", 512 * 2**20),
        ("512 mb", 512 * 2**20),
        ("1.5GiB", 3 * 2**29),
        ("2g", 2**31),
        (" 1TiB ", 2**40),
    ],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_bytes("kv_memory", text) == size


@pytest.mark.parametrize(
    "text", ["", "GiB", "-1G", "0", "0.1", "nanG", "infG", "1e999", "2PiB", "1 2G", "2GiBiB"]
)
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(ConfigError, match="kv_memory"):
        parse_bytes("kv_memory", text)
