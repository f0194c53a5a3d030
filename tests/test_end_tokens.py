"""What ends an answer: whatever any of a model's files says, when they disagree too."""

import json
from pathlib import Path
from typing import Any

import pytest
from tiny import write_tiny_llama
from tiny_text import BOS, CHATML, END, START, write_byte_tokenizer

from specserve.engine.parts import end_tokens
from specserve.llm import LLM
from specserve.models.fields import ModelError
from specserve.models.shape import ModelShape
from specserve.text import Tokenizer
from specserve.types import SamplingParams

_VOCAB = 259
_SETTINGS: dict[str, Any] = {
    "device": "cpu",
    "dtype": "float32",
    "kv_memory": "4MiB",
    "draft": "none",
}


def _write(
    directory: Path,
    *,
    config: Any = None,
    generation: Any = None,
    template: str | None = CHATML,
    files: dict[str, Any] | None = None,
    **tokenizer: Any,
) -> Path:
    """A model over bytes and three control tokens, with end tokens where a test wants them."""
    write_tiny_llama(directory, seed=1, vocab_size=_VOCAB)
    write_byte_tokenizer(directory, template, **tokenizer)
    content = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    files = {"config.json": content | {"eos_token_id": config}, **(files or {})}
    if generation is not None:
        files["generation_config.json"] = {"eos_token_id": generation}
    for name, value in files.items():
        (directory / name).write_text(json.dumps(value), encoding="utf-8")
    return directory


@pytest.mark.parametrize(
    ("says", "ends"),
    [
        ({"config": BOS}, {BOS, END}),
        ({"config": [BOS, START], "generation": END}, {BOS, START, END}),
        ({"generation": [BOS], "eos_token": "<|im_start|>", "template": None}, {BOS, START}),
        ({"eos_token": {"content": "<|im_end|>", "special": True}, "template": None}, {END}),
        ({"eos_token": None, "template": None}, set()),
        # Only the template knows how its turns end.
        ({"config": BOS, "eos_token": "<|bos|>"}, {BOS, END}),
        ({"config": BOS, "eos_token": "<|bos|>", "template": "{{ messages }}"}, {BOS}),
        ({"config": BOS, "eos_token": "no such token", "template": None}, {BOS}),
    ],
)
def test_end_tokens_of_all_files_count(
    tmp_path: Path, says: dict[str, Any], ends: set[int]
) -> None:
    directory = _write(tmp_path, **says)
    assert set(end_tokens(ModelShape.from_dir(directory), Tokenizer(directory))) == ends


def test_an_end_token_that_older_libraries_named(tmp_path: Path) -> None:
    directory = _write(
        tmp_path,
        files={"tokenizer_config.json": {}, "special_tokens_map.json": {"eos_token": "<|im_end|>"}},
    )
    assert end_tokens(ModelShape.from_dir(directory), Tokenizer(directory)) == (END,)


@pytest.mark.parametrize("says", [{"eos_token": "<|im_end|>"}, {"generation": [BOS, END]}])
def test_an_answer_ends_at_each_end_token(tmp_path: Path, says: dict[str, Any]) -> None:
    llm = LLM(str(_write(tmp_path, config=BOS, **says)), **_SETTINGS)
    chat = [{"role": "user", "content": "hi"}]
    params: dict[str, Any] = {"temperature": 0.0, "max_tokens": 6, "logit_bias": {END: 100.0}}
    (answer,) = llm.generate([chat], SamplingParams(**params))
    assert (answer.token_ids, answer.finish_reason, answer.text) == ((END,), "stop", "")
    (answer,) = llm.generate([chat], SamplingParams(**params, min_tokens=3))
    assert answer.token_ids.index(END) == 3
    (answer,) = llm.generate([chat], SamplingParams(**params, ignore_eos=True))
    assert (answer.token_ids, answer.finish_reason) == ((END,) * 6, "length")


@pytest.mark.parametrize(
    ("says", "named"),
    [
        ({"config": _VOCAB}, rf"config\.json: eos_token_id = {_VOCAB}: .* vocab_size is {_VOCAB}"),
        ({"config": [1, 2**30]}, r"/config\.json: eos_token_id = \[1, 1073741824\]"),
        ({"generation": [END, 300]}, r"generation_config\.json: eos_token_id = \[258, 300\]"),
    ],
)
def test_end_tokens_beyond_the_vocabulary(tmp_path: Path, says: dict[str, Any], named: str) -> None:
    with pytest.raises(ModelError, match=named):
        LLM(str(_write(tmp_path, **says)), **_SETTINGS)


def test_an_end_token_of_a_tokenizer_for_another_model(tmp_path: Path) -> None:
    write_tiny_llama(tmp_path, seed=1, vocab_size=200)
    write_byte_tokenizer(tmp_path)
    with pytest.raises(ModelError, match=r"tokenizer_config\.json: .*id 258.*vocab_size is 200"):
        LLM(str(tmp_path), **_SETTINGS)
