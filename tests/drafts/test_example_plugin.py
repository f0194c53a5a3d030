"""The template of a plug-in, installed by pip and used as its README says."""

import json
import os
import subprocess
import sys
from pathlib import Path
from shutil import copytree

import pytest

from specserve.cli import main
from specserve_evals.conformance import CHECKS

PLUGIN = Path(__file__).parents[2] / "drafts/example_plugin"
TINY = ["--raw", "--device", "cpu", "--dtype", "float32", "--kv-memory", "4MiB"]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory that the plug-in is installed in."""
    folder = tmp_path_factory.mktemp("plugin")
    copytree(PLUGIN, folder / "source")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index"]
    flags = ["--no-build-isolation", "--disable-pip-version-check", "--target", "site"]
    subprocess.run([*pip, *flags, "./source"], cwd=folder, check=True)
    return folder / "site"


def test_commands_find_the_installed_drafter(
    site: Path,
    tiny_model: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(site)
    answers = []
    for draft in (["none"], ["repeat", "--options", "repeat.period=2"]):
        line = ["--prompt", "w1 w2 w1 w2", "--temperature", "0", "--max-tokens", "24", "--json"]
        assert main(["generate", str(tiny_model), *TINY, *line, "--draft", *draft]) == 0
        answers.append(json.loads(capsys.readouterr().out))
    plain, drafted = answers
    assert drafted["token_ids"] == plain["token_ids"]
    assert drafted["speculation"]["num_draft_tokens"] > 0
    assert main(["eval", "conformance", "--draft", "repeat"]) == 0
    assert f"\n{len(CHECKS)} passed\n" in capsys.readouterr().out


def test_its_tests_run(site: Path) -> None:
    """One of them, as the command before has run the same checks."""
    run = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "load"]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(site), *sys.path])}
    done = subprocess.run(
        [*run, "source"], cwd=site.parent, env=env, capture_output=True, text=True, check=False
    )
    assert f"1 passed, {len(CHECKS) - 1} deselected" in done.stdout, done.stdout + done.stderr
