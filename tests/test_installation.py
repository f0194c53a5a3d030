"""What an installation has, and that Python and type checkers find it wherever they are started."""

import ast
import re
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGES = {
    "specserve": ROOT,
    "specserve_kernels": ROOT / "kernels",
    "specserve_drafts": ROOT / "drafts",
    "specserve_evals": ROOT / "evals",
    "specserve_benchmarks": ROOT / "benchmarks",
}


def run_outside(directory: Path, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=directory,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def test_everything_imported_is_a_dependency_or_in_an_extra() -> None:
    """The environment of the tests has more packages than that of `make serve`."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    declared = {
        match[0].lower().replace("_", "-")
        for requirement in (*project["dependencies"], *extras["gpu"], *extras["evals"])
        if (match := re.match(r"[\w-]+", requirement))
    }
    imported = {
        name.partition(".")[0]
        for package, folder in PACKAGES.items()
        for file in (folder / package).rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        for name in imported_names(node)
    }
    distributions = packages_distributions()
    undeclared = {
        name: distributions.get(name)
        for name in imported - set(sys.stdlib_module_names) - PACKAGES.keys()
        if declared.isdisjoint(
            other.lower().replace("_", "-") for other in distributions.get(name, ())
        )
    }
    assert undeclared == {}


def imported_names(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom) and node.module is not None:
        return [node.module]
    return []


def test_a_folder_called_specserve_does_not_hide_the_package(tmp_path: Path) -> None:
    """As the parent directory of a clone has one."""
    (tmp_path / "specserve" / "specserve").mkdir(parents=True)
    assert run_outside(tmp_path, "-c", "import specserve; print(specserve.__version__)")


def test_mypy_finds_all_packages_outside_of_the_repository(tmp_path: Path) -> None:
    program = f"import {', '.join(PACKAGES)}"
    found = run_outside(tmp_path, "-m", "mypy", "--follow-imports=skip", "-c", program)
    assert "Success" in found
