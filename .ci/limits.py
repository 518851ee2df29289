"""Check the size limits of the code: 600 lines per file, 80 lines and 8 parameters per function.

Tests only have to meet the file limit. Prints each violation as path:line and exits 1 if there is any.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

MAX_FILE, MAX_FUNCTION, MAX_PARAMETERS = 600, 80, 8


def main() -> int:
    root = Path(__file__).parents[1]
    problems: list[str] = []
    for folder in ("tutti", "bench", "tests", ".ci"):
        for path in sorted((root / folder).rglob("*.py")):
            name = path.relative_to(root)
            text = path.read_text()
            if (lines := text.count("\n")) > MAX_FILE:
                problems.append(f"{name}: {lines} lines, at most {MAX_FILE}")
            if folder != "tests":
                problems.extend(f"{name}:{problem}" for problem in _functions(ast.parse(text)))
    print(*problems, sep="\n", end="\n" if problems else "")
    print(f"sizes: {len(problems)} over the limit")
    return bool(problems)


def _functions(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        assert node.end_lineno is not None
        if (lines := node.end_lineno - node.lineno + 1) > MAX_FUNCTION:
            yield f"{node.lineno}: {node.name} has {lines} lines, at most {MAX_FUNCTION}"
        arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        count = sum(argument.arg not in ("self", "cls") for argument in arguments)
        if count > MAX_PARAMETERS:
            yield f"{node.lineno}: {node.name} has {count} parameters, at most {MAX_PARAMETERS}"


if __name__ == "__main__":
    sys.exit(main())
