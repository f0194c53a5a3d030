"""Prompt files with categories: reading, errors, and the choice of prompts."""

import json
from pathlib import Path

import pytest

from specserve_evals.prompts import Prompt, load_prompts, select


def write(path: Path, *rows: object) -> Path:
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
    return path


def prompts(**counts: int) -> list[Prompt]:
    return [
        Prompt(f"{category}{index}", category, [{"role": "user", "content": "x" * index}])
        for category, count in counts.items()
        for index in range(count)
    ]


def ids(chosen: tuple[Prompt, ...]) -> list[str]:
    return [prompt.id for prompt in chosen]


def test_every_kind_of_row(tmp_path: Path) -> None:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    file = write(
        tmp_path / "p.jsonl",
        {"question_id": 81, "category": "writing", "turns": ["first", "second"]},
        "",
        {"prompt": "plain", "source": "somewhere"},
        {"messages": messages, "category": "chat"},
        json.dumps("a string"),
    )
    assert load_prompts(file) == [
        Prompt("81", "writing", [{"role": "user", "content": "first"}]),
        Prompt("1", "all", [{"role": "user", "content": "plain"}]),
        Prompt("2", "chat", messages),
        Prompt("3", "all", [{"role": "user", "content": "a string"}]),
    ]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ("{", "JSON"),
        ({"text": "no known key"}, "no prompt"),
        ({"turns": []}, "no prompt"),
        ({"prompt": "x", "category": 3}, r"\$\.category"),
        ({"prompt": "x", "question_id": [1]}, r"\$\.question_id"),
    ],
)
def test_a_bad_row_is_named(tmp_path: Path, row: object, reason: str) -> None:
    file = write(tmp_path / "p.jsonl", {"prompt": "fine"}, row)
    with pytest.raises(ValueError, match=rf"p\.jsonl:2.*{reason}"):
        load_prompts(file)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"missing\.jsonl"):
        load_prompts(tmp_path / "missing.jsonl")


def test_a_limit_is_spread_over_all_categories() -> None:
    chosen = select(prompts(a=5, b=1, c=5), limit=6).prompts
    assert ids(chosen) == ["a0", "b0", "c0", "a1", "c1", "a2"]


def test_a_number_per_category() -> None:
    chosen = select(prompts(a=5, b=1, c=2), per_category=2).prompts
    assert ids(chosen) == ["a0", "b0", "c0", "a1", "c1"]


def test_without_limits_all_are_chosen() -> None:
    assert len(select(prompts(a=3, b=2)).prompts) == 5


def test_a_prompt_that_does_not_fit_is_replaced_by_the_next_of_its_category() -> None:
    selection = select(prompts(a=3, b=3), limit=2, fits=lambda prompt: prompt.id != "a0")
    assert ids(selection.prompts) == ["a1", "b0"]
    assert ids(selection.passed_over) == ["a0"]
    assert "a0" in selection.describe()


def test_no_prompt_that_fits_is_an_error() -> None:
    with pytest.raises(ValueError, match="none of 2 fits"):
        select(prompts(a=2), fits=lambda prompt: False)
