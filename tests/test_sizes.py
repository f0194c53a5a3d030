"""Files and functions of the runtime, the kernels and the drafters stay small enough to read."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

ROOT: Final = Path(__file__).parent.parent
FOLDERS: Final = ("specserve", "kernels/specserve_kernels", "drafts/specserve_drafts")
SUFFIXES: Final = (".py", ".cpp", ".h")
MAX_FILE: Final = 350  # lines
MAX_FUNCTION: Final = 60  # lines, from the signature to the end of the body
MAX_LINES: Final = {"specserve/engine/engine.py": 149}  # files with a limit of their own

_NO_CODE: Final = re.compile(
    r'//[^\n]*|/\*.*?\*/|"(?:\\.|[^"\\\n])*"|\'(?:\\.|[^\'\\\n])\'|^[ \t]*#(?:\\\n|[^\n])*',
    re.DOTALL | re.MULTILINE,
)
_TEMPLATE: Final = re.compile(r"template\s*<[^{}]*?>\s*(?=[\w:])")
_SCOPE: Final = re.compile(r"\b(?:namespace|class|struct|union|enum)\b[^()]*$")
_NAME: Final = re.compile(r"([\w:~]+|operator\s*[^\s(]+)\s*\(")

FILES: Final = [
    str(file.relative_to(ROOT))
    for folder in FOLDERS
    for file in sorted((ROOT / folder).rglob("*"))
    if file.suffix in SUFFIXES
]


def python_functions(source: str) -> Iterator[tuple[str, int]]:
    """(name, number of lines) of every function, nested ones included."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None
            yield node.name, node.end_lineno - node.lineno + 1


def cpp_functions(source: str) -> Iterator[tuple[str, int]]:
    """(name, number of lines) of every function outside of other functions.

    Finds matching braces after comments, literals and preprocessor lines have been blanked. It
    assumes that a brace at the level of namespaces and classes opens a function if parentheses
    precede it. So constructors have to initialise members with parentheses, and there may be no raw
    strings and no macros with unbalanced braces. Lambdas count as a part of their function.
    """
    code = _NO_CODE.sub(lambda match: re.sub(r"[^\n]", " ", match[0]), source)
    start = depth = parentheses = 0  # start of the current declaration; parentheses that are open
    in_function: tuple[str, int, int] | None = None  # name, start, depth of its body
    for at, char in enumerate(code):
        parentheses += (char == "(") - (char == ")")
        if char == "{":
            depth += 1
            if in_function is None:
                head = _TEMPLATE.sub("", code[start:at])
                if "(" in head and not _SCOPE.search(head) and "=" not in head.partition("(")[0]:
                    name = _NAME.search(head)
                    assert name is not None, head
                    first = start + len(code[start:at]) - len(code[start:at].lstrip())
                    in_function = name[1], first, depth
                else:
                    start = at + 1
        elif char == "}":
            if in_function is not None and depth == in_function[2]:
                yield in_function[0], code.count("\n", in_function[1], at) + 1
                in_function = None
            depth -= 1
            if in_function is None:
                start = at + 1
        elif char == ";" and not parentheses and in_function is None:
            start = at + 1
    assert depth == parentheses == 0, "unbalanced braces"


@pytest.mark.parametrize("path", FILES)
def test_size(path: str) -> None:
    source = (ROOT / path).read_text()
    limit = MAX_LINES.get(path, MAX_FILE)
    assert source.count("\n") <= limit, f"{path} has more than {limit} lines"
    functions = python_functions(source) if path.endswith(".py") else cpp_functions(source)
    long = [f"{name}: {lines} lines" for name, lines in functions if lines > MAX_FUNCTION]
    assert long == [], f"functions of {path} with more than {MAX_FUNCTION} lines"


def test_all_files_and_functions_are_found() -> None:
    assert len(FILES) > 200
    assert {Path(path).suffix for path in FILES} == set(SUFFIXES)
    assert set(MAX_LINES) <= set(FILES)
    found = {
        name
        for path in FILES
        if not path.endswith(".py")
        for name, _ in cpp_functions((ROOT / path).read_text())
    }
    assert {"num_splits", "PYBIND11_MODULE"} <= found
    assert len(found) > 150


CPP: Final = """\
#include <a>  // {
#define MACRO(x) {
namespace a {
struct Point {
    int x = 0, y = 0;
    // A comment with a brace {
    Point(int value) : x(value), y(f(";{")) {
        for (int i = 0; i < 3; ++i) { ++x; }
    }
    int sum() const { return x + y; }
};
constexpr int kTable[] = {1, 2};
template <typename T, int (*F)(int) = nullptr>
auto apply(T value,
           int count) -> T {
    const auto twice = [&](int i) {
        return '{' + i;
    };
    return twice(count);
}
}
"""


def test_functions_of_cpp_are_measured() -> None:
    assert list(cpp_functions(CPP)) == [("Point", 3), ("sum", 1), ("apply", 8)]
