"""Imports run downwards only, by the table below; and what nobody may use."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE_ROOTS = (".", "kernels", "drafts", "evals", "benchmarks")
OURS = (
    "specserve",
    "specserve_kernels",
    "specserve_drafts",
    "specserve_evals",
    "specserve_benchmarks",
)

# A unit is a module or a package; it may import itself and every unit of a lower level.
LEVELS: list[list[str]] = [
    ["specserve_kernels", "specserve.files"],
    [
        "specserve.types",
        "specserve.config",
        "specserve.tree",
        "specserve.fair_share",
        "specserve.field_help",
        "specserve.read_only",
        "specserve.cache.pool",
        "specserve.cache.table",
        "specserve.cache.prefix",
        "specserve.text",
        "specserve.hub",
        "specserve.server.descriptions",
    ],
    [
        "specserve.completion",
        "specserve.inputs",
        "specserve.sequence",
        "specserve.step",
        "specserve.cache.manager",
        "specserve.cache.storage",
        "specserve.sampling",
        "specserve.speculation.calibration",
        "specserve.speculation.cost_model",
    ],
    [
        "specserve.speculation.controller",
        "specserve.speculation.drafter",
        "specserve.speculation.lookup",
        "specserve.speculation.node_selection",
        "specserve.speculation.prediction",
        "specserve.batch",
        "specserve.models",
    ],
    [
        "specserve.schedule",
        "specserve.verify",
        "specserve.runner",
        "specserve.speculation.registry",
        "specserve.speculation.compose",
        "specserve.speculation.failures",
        "specserve.speculation.interface_check",
        "specserve.speculation.counts",
        "specserve_drafts",
    ],
    ["specserve.engine"],
    ["specserve.process"],
    [
        "specserve",
        "specserve.llm",
        "specserve.shared_engine",
        "specserve.async_llm",
        "specserve.async_engine",
        "specserve.server",
        "specserve.client",
        "specserve.cli",
        "specserve_evals",
        "specserve_benchmarks",
        "specserve_drafts.tune",
    ],
]
WITHIN_A_LEVEL = {
    ("specserve.cache.table", "specserve.cache.pool"),
    ("specserve.cache.table", "specserve.read_only"),
    ("specserve.read_only", "specserve.types"),
    ("specserve.text", "specserve.types"),
    ("specserve.hub", "specserve.text"),
    ("specserve.step", "specserve.sequence"),
    ("specserve.speculation.drafter", "specserve.batch"),
    ("specserve.speculation.drafter", "specserve.models"),
    ("specserve.speculation.prediction", "specserve.speculation.lookup"),
    ("specserve.speculation.controller", "specserve.speculation.node_selection"),
    ("specserve.models", "specserve.batch"),
    ("specserve.speculation.compose", "specserve.speculation.counts"),
    ("specserve.speculation.compose", "specserve.speculation.failures"),
    ("specserve.speculation.registry", "specserve.speculation.failures"),
    ("specserve.speculation.registry", "specserve.speculation.interface_check"),
    ("specserve", "specserve.llm"),
    ("specserve", "specserve.async_llm"),
    ("specserve.llm", "specserve.shared_engine"),
    ("specserve.async_llm", "specserve.async_engine"),
    ("specserve", "specserve.client"),
    ("specserve.server", "specserve"),
    ("specserve.server", "specserve.async_engine"),
    ("specserve.cli", "specserve.server"),
    ("specserve.cli", "specserve.client"),
    ("specserve.cli", "specserve"),
    ("specserve.cli", "specserve.llm"),
    ("specserve_evals", "specserve"),
    ("specserve_evals", "specserve.llm"),
    ("specserve_evals", "specserve.cli"),
    ("specserve_benchmarks", "specserve"),
    ("specserve_benchmarks", "specserve.llm"),
    ("specserve_benchmarks", "specserve.cli"),
    ("specserve_benchmarks", "specserve_evals"),
    ("specserve_drafts.tune", "specserve"),
    ("specserve_drafts.tune", "specserve.llm"),
    ("specserve_drafts.tune", "specserve.cli"),
    ("specserve_drafts.tune", "specserve_evals"),
}
DRAFTS_MAY_USE = {
    "specserve_kernels",
    "specserve.files",
    "specserve.types",
    "specserve.tree",
    "specserve.cache.table",
    "specserve.cache.storage",
    "specserve.text",
    "specserve.hub",
    "specserve.sequence",
    "specserve.step",
    "specserve.sampling",
    "specserve.speculation.drafter",
    "specserve.speculation.lookup",
    "specserve.batch",
    "specserve.models",
}
DRAFTS_ARE_USED_BY = {"specserve_evals", "specserve_benchmarks", "specserve_drafts.tune"}
WITHOUT_TORCH = {
    "specserve",
    "specserve.fair_share",
    "specserve.types",
    "specserve.config",
    "specserve.tree",
    "specserve.read_only",
    "specserve.sequence",
    "specserve.step",
    "specserve.cache.pool",
    "specserve.cache.table",
    "specserve.cache.prefix",
    "specserve.cache.manager",
    "specserve.schedule",
    "specserve.text",
    "specserve.hub",
    "specserve.verify.walk",
    "specserve.verify.stopping",
    "specserve.speculation.calibration",
    "specserve.speculation.controller",
    "specserve.speculation.cost_model",
    "specserve.speculation.node_selection",
    "specserve.speculation.counts",
    "specserve.models.generation_config",
    "specserve.engine.limits",
    "specserve.engine.metrics",
    "specserve.process.frames",
    "specserve.process.messages",
    "specserve.process.engine_process",
    "specserve.process.child",
    "specserve.process.tokenizer_messages",
    "specserve.process.tokenizer_pool",
    "specserve.process.tokenizer_main",
    "specserve.async_engine",
    "specserve.async_llm",
    "specserve.completion",
    "specserve.field_help",
    "specserve.inputs",
    "specserve.server",
    "specserve.client",
}
UNSAFE_MODULES = {"pickle", "cPickle", "cloudpickle", "dill", "marshal", "shelve", "joblib"}
UNSAFE_CALLS = {"torch.load", "eval", "exec", "os.system"}
# Runs in a process of its own, with limits, and reads tensors only.
ALLOWED_CALLS = {("specserve.cli.convert_child", "torch.load")}
VAGUE_NAMES = {"utils.py", "helpers.py", "util.py", "helper.py", "common.py", "misc.py"}

LEVEL_OF = {unit: level for level, units in enumerate(LEVELS) for unit in units}


def unit_of(module: str) -> str | None:
    """The unit a module of ours belongs to: the longest entry of the table that contains it.

    The roots `specserve` and `specserve.cache` contain nothing: a new module needs a place.
    """
    parts = module.split(".")
    for length in range(len(parts), 0, -1):
        name = ".".join(parts[:length])
        if name in LEVEL_OF and (name != "specserve" or module == name):
            return name
    return None


def imported_modules(tree: ast.AST, known: set[str]) -> Iterator[tuple[int, str]]:
    """(line, module) of every import, at any depth, TYPE_CHECKING included."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = "." * node.level + (node.module or "")
            for alias in node.names:
                full = f"{base}.{alias.name}"
                yield node.lineno, full if full in known else base


def import_violations(module: str, source: str, known: set[str]) -> list[str]:
    """What is wrong with the imports of one module."""
    unit = unit_of(module)
    if unit is None:
        return [f"{module}: has no level; give it one in the table"]
    found = []
    for line, target in imported_modules(ast.parse(source), known):
        reason = import_error(module, unit, target)
        if reason is not None:
            found.append(f"{module}:{line}: imports {target}: {reason}")
    return found


def import_error(module: str, unit: str, target: str) -> str | None:
    if target.startswith("."):
        return "relative imports are not used"
    top = target.partition(".")[0]
    if top in UNSAFE_MODULES:
        return "it can run code that comes with data"
    if top == "torch" and (unit in WITHOUT_TORCH or module in WITHOUT_TORCH):
        return "this module knows no tensors"
    if top not in OURS:
        return None
    other = unit_of(target)
    if other is None:
        return "it has no level; give it one in the table"
    if other == unit:
        return None
    if unit == "specserve_drafts":
        return None if other in DRAFTS_MAY_USE else "a drafter knows nothing of the engine"
    if other == "specserve_drafts" and unit not in DRAFTS_ARE_USED_BY:
        return "drafters are loaded by name"
    if LEVEL_OF[other] < LEVEL_OF[unit] or (unit, other) in WITHIN_A_LEVEL:
        return None
    return f"level {LEVEL_OF[unit]} may not look at level {LEVEL_OF[other]}"


@pytest.mark.parametrize(
    "module", ["specserve.server.lifecycle", "specserve.client", "specserve.async_llm"]
)
def test_the_http_side_never_loads_torch(module: str) -> None:
    code = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def unsafe_calls(module: str, source: str) -> list[str]:
    return [
        f"{module}:{node.lineno}: calls {ast.unparse(node.func)}"
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Call)
        and (call := ast.unparse(node.func)) in UNSAFE_CALLS
        and (module, call) not in ALLOWED_CALLS
    ]


def our_modules() -> dict[str, Path]:
    """Module name -> file, for every package of the distribution."""
    modules = {}
    for root, package in zip(PACKAGE_ROOTS, OURS, strict=True):
        for file in (ROOT / root / package).rglob("*.py"):
            relative = file.relative_to(ROOT / root).with_suffix("")
            modules[".".join(relative.parts).removesuffix(".__init__")] = file
    return modules


MODULES = our_modules()


def test_no_modules_import_each_other_in_a_circle() -> None:
    """Imports within functions and for type checking count too."""
    graph = {
        module: {
            target
            for _, target in imported_modules(ast.parse(file.read_text()), set(MODULES))
            if target in MODULES and target != module
        }
        for module, file in MODULES.items()
    }
    TopologicalSorter(graph).prepare()  # raises CycleError, which names the modules of a circle


def test_every_package_is_seen() -> None:
    assert {name.partition(".")[0] for name in MODULES} == set(OURS)
    assert len(MODULES) > 40


@pytest.mark.parametrize(
    "module", sorted(set(MODULES) - {"specserve.cache", "specserve.speculation"})
)
def test_imports(module: str) -> None:
    source = MODULES[module].read_text()
    assert import_violations(module, source, set(MODULES)) == []
    assert unsafe_calls(module, source) == []


@pytest.mark.parametrize("package", ["specserve.cache", "specserve.speculation"])
def test_packages_of_several_levels_export_nothing(package: str) -> None:
    assert not list(imported_modules(ast.parse(MODULES[package].read_text()), set(MODULES)))


@pytest.mark.parametrize(
    ("module", "source", "reason"),
    [
        ("specserve.tree", "import torch", "no tensors"),
        ("specserve.speculation.cost_model", "def f():\n    from torch import nn", "no tensors"),
        ("specserve.verify.walk", "import torch.nn", "no tensors"),
        ("specserve.sampling", "from specserve.batch import ForwardBatch", "level 2"),
        ("specserve.batch", "import specserve.engine.engine", "level 3"),
        (
            "specserve.types",
            "from typing import TYPE_CHECKING\n"
            "if TYPE_CHECKING:\n    from specserve.sequence import SequenceState",
            "level 1",
        ),
        ("specserve.hub.resolve", "from specserve import llm", "level 1"),
        ("specserve.models.llama", "from specserve.speculation import drafter", "level 3"),
        (
            "specserve_drafts.ngram",
            "from specserve.speculation.controller import SpeculationController",
            "engine",
        ),
        ("specserve_drafts.ngram", "from specserve.config import EngineConfig", "engine"),
        ("specserve.engine.engine", "import specserve_drafts.ngram", "by name"),
        ("specserve_kernels.ops", "from specserve.tree import MAX_NODES", "level 0"),
        ("specserve.verify.walk", "from .stopping import StopRule", "relative"),
        ("specserve.models.loader", "import pickle", "run code"),
        ("specserve.newcomer", "", "no level"),
        ("specserve.llm", "import specserve.newcomer", "no level"),
    ],
)
def test_a_violation_is_reported(module: str, source: str, reason: str) -> None:
    (violation,) = import_violations(module, source, set(MODULES))
    assert violation.startswith(module)
    assert reason in violation


@pytest.mark.parametrize("source", ["import torch\ntorch.load('x')", "def f():\n    eval('1')"])
def test_an_unsafe_call_is_reported(source: str) -> None:
    (violation,) = unsafe_calls("specserve.models.loader", source)
    assert violation.startswith("specserve.models.loader:2")


def test_one_module_may_load_pickled_tensors_and_nothing_imports_it() -> None:
    (allowed,) = ALLOWED_CALLS
    source = MODULES[allowed[0]].read_text()
    calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    (load,) = [ast.unparse(call) for call in calls if ast.unparse(call.func) == "torch.load"]
    assert "weights_only=True" in load
    assert unsafe_calls(allowed[0], "import torch\neval('1')\nexec('1')") != []
    assert unsafe_calls("specserve.cli.convert", source) != []
    for file in MODULES.values():
        targets = imported_modules(ast.parse(file.read_text()), set(MODULES))
        assert allowed[0] not in [target for _, target in targets]


def test_files_are_named_for_what_they_hold() -> None:
    files = [file for root in (*PACKAGE_ROOTS[1:], "specserve", "tests") for file in python(root)]
    assert [file for file in files if file.name in VAGUE_NAMES] == []


def python(folder: str) -> list[Path]:
    return list((ROOT / folder).rglob("*.py"))
