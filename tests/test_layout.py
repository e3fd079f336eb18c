"""The four packages import under one name only, and nothing imports the short names."""

import ast
from pathlib import Path

ROOT = Path(__file__).parents[1]
SHORT = {"simulators", "solvers", "estimators"}


def test_nothing_imports_a_short_name() -> None:
    for folder in (
        "sim2real",
        "simulators",
        "solvers",
        "estimators",
        "examples",
        "benchmarks",
        "tests",
        "docs",
    ):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                names = []
                if isinstance(node, ast.Import):
                    names = [alias.name for alias in node.names]
                elif isinstance(node, ast.ImportFrom) and node.level == 0:
                    names = [node.module or ""]
                assert not [name for name in names if name.split(".")[0] in SHORT], f"{path}:{node.lineno}"
