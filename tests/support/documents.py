"""Documents as tests see them: the tools that make them, and the tests that they name."""

import ast
import importlib.machinery
import importlib.util
import re
import sys
from functools import cache
from pathlib import Path
from types import ModuleType

TESTS = Path(__file__).parents[1]
TREE = TESTS.parent
NAMED_TEST = re.compile(r"`([a-z]+/test_\w+\.py)::(test_\w+)`")


@cache
def load_tool(name: str) -> ModuleType:
    """A program of tools/ whose name has no suffix, imported; no bytecode is left beside it."""
    loader = importlib.machinery.SourceFileLoader(name, str(TREE / "tools" / name))
    spec = importlib.util.spec_from_loader(loader.name, loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    sys.dont_write_bytecode, before = True, sys.dont_write_bytecode
    try:
        loader.exec_module(module)
    finally:
        sys.dont_write_bytecode = before
    return module


@cache
def functions_of(path: str) -> frozenset[str]:
    """Names of the functions of one file, `path` from the tests' directory; none if there is no such file."""
    if not (TESTS / path).exists():
        return frozenset()
    tree = ast.parse((TESTS / path).read_text(encoding="utf-8"))
    return frozenset(node.name for node in tree.body if isinstance(node, ast.FunctionDef))


def missing_tests(text: str) -> list[str]:
    """Those that a text names and that do not exist."""
    return sorted({f"{path}::{name}" for path, name in NAMED_TEST.findall(text) if name not in functions_of(path)})
