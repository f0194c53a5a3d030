"""Starting with an unusable chat template: one line of error, and no process is left."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tiny_chat import write_byte_chat

_ENDLESS = "{% for i in range(99999) %}" * 3 + "{% endfor %}" * 3
_FLAGS = ("--device", "cpu", "--dtype", "float32", "--kv-memory", "4MiB", "--threads", "1")


def _start(command: str, model: Path, *more: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-m", "specserve.cli", command, str(model), *_FLAGS, *more],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_byte_chat(tmp_path_factory.mktemp("templates") / "tiny-chat")


@pytest.mark.parametrize(
    ("command", "more"), [("serve", ("--port", "0")), ("generate", ("--prompt", "x"))]
)
@pytest.mark.parametrize("template", ["{% for %}", "{{ " + "(" * 5000, "{{ 9" + "9" * 5000 + " }}"])
def test_a_bad_template_ends_the_start_with_one_line(
    model: Path, template: str, command: str, more: tuple[str, ...]
) -> None:
    (model / "chat_template.jinja").write_text(template, encoding="utf-8")
    with _start(command, model, *more) as process:
        said = process.communicate(timeout=60)[1]
    assert process.returncode == 2
    errors = [line for line in said.splitlines() if not line.startswith("specserve: reading")]
    assert len(errors) == 1, said
    assert errors[0].startswith(f"specserve: error: {model}")
    assert "chat template cannot be compiled" in errors[0]


def test_sigterm_ends_a_start_that_hangs(model: Path) -> None:
    (model / "chat_template.jinja").write_text(_ENDLESS, encoding="utf-8")
    with _start("serve", model, "--port", "0") as process:
        end = time.monotonic() + 30
        while not _workers(process.pid) and time.monotonic() < end:
            time.sleep(0.05)
        assert _workers(process.pid)
        time.sleep(1)
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=5)
    assert process.returncode != 0


def _workers(parent: int) -> list[int]:
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                status = (entry / "stat").read_text(encoding="utf-8")
                command = (entry / "cmdline").read_bytes()
            except OSError:
                continue
            if (
                int(status.rpartition(")")[2].split()[1]) == parent
                and b"tokenizer_worker" in command
            ):
                found.append(int(entry.name))
    return found
