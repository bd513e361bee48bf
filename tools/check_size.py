"""Size limits of `make check`: files of 400 lines, functions of 60.

usage: python -m tools.check_size DIR ...
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60


def oversized(path: Path) -> Iterator[str]:
    """Yield one line for the file if it is too long and for each function of it that is."""
    source = path.read_text()
    num_lines = len(source.splitlines())
    if num_lines > MAX_FILE_LINES:
        yield f"{path}: {num_lines} lines, the limit is {MAX_FILE_LINES}; split it"
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno:
            num_lines = node.end_lineno - node.lineno + 1
            if num_lines > MAX_FUNCTION_LINES:
                limit = f"the limit is {MAX_FUNCTION_LINES}; split it"
                yield f"{path}:{node.lineno}: {node.name} has {num_lines} lines, {limit}"


def main(directories: list[str]) -> int:
    """Print what is too long under the directories; returns the exit status."""
    if not directories or "--help" in directories:
        print(__doc__)
        return 0 if directories else 2
    complaints = [line for top in directories for path in sorted(Path(top).rglob("*.py")) for line in oversized(path)]
    print("\n".join(complaints) or f"sizes: every file and function under {' '.join(directories)} is within its limit")
    return 1 if complaints else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
