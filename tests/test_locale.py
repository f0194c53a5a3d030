"""Texts, paths and arguments hold any character, whatever the locale knows."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest
from test_layering import our_modules
from tiny_chat import write_byte_chat

from specserve.hub import HubError, resolve

_ASCII = {"LC_ALL": "POSIX", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
_TEXT_METHODS = {"read_text", "write_text"}


def _run(code: list[str], **env: str) -> "subprocess.CompletedProcess[bytes]":
    return subprocess.run(
        [sys.executable, *code], capture_output=True, env=os.environ | env, check=False
    )


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = write_byte_chat(tmp_path_factory.mktemp("locale") / "modell-ü-模型")
    template = "{{ 'grüß ' }}{% for m in messages %}{{ m.content }}{% endfor %}"
    (directory / "chat_template.jinja").write_text(template, encoding="utf-8")
    return directory


@pytest.mark.parametrize("env", [_ASCII, {"PYTHONIOENCODING": "ascii"}])
def test_a_command_in_a_locale_of_ascii(model: Path, tmp_path: Path, env: dict[str, str]) -> None:
    """Also what is printed: a character that the terminal's encoding lacks shows as its code."""
    config = tmp_path / "specserve.toml"
    content = '# für den Test\n[target]\ndevice = "cpu"\n[cache]\nkv_memory = "4MiB"\n'
    config.write_text(content, encoding="utf-8-sig")
    command = ["generate", str(model), "--config", str(config), "--prompt", "ü 中 🙂"]
    more = ["--max-tokens", "2", "--logit-bias", "195=100", "--json"]
    done = _run(["-m", "specserve.cli", *command, *more], **env)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(b"token_ids") == 1


def test_a_path_that_a_locale_cannot_name(model: Path) -> None:
    code = "import sys; from specserve.hub import resolve; resolve(sys.argv[1])"
    done = _run(["-c", code, str(model)], **_ASCII)
    assert b"is no path in the encoding of the locale (ascii); set PYTHONUTF8=1" in done.stderr
    with pytest.raises(HubError, match=r"target: 'm-\\udcff' is no path"):
        resolve("m-\udcff")


def test_text_files_are_opened_with_an_encoding() -> None:
    found = [
        f"{module}:{node.lineno}"
        for module, path in our_modules().items()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and _opens_text(node)
    ]
    assert found == []


def _opens_text(node: ast.Call) -> bool:
    """Whether a call opens a file as text and leaves the encoding to the locale."""
    if any(keyword.arg == "encoding" for keyword in node.keywords):
        return False
    name = node.func.attr if isinstance(node.func, ast.Attribute) else ""
    modes = [a.value for a in node.args if isinstance(a, ast.Constant)]
    return name in _TEXT_METHODS or (name == "open" and modes in (["r"], ["w"], ["x"], ["a"]))
