"""`used_by` of a rule names what makes the call: operations, functions and modules that there are, in the code of the rule's roles.

A name is looked up, and looked for among what the role's modules name. What the C library, the interpreter or the kernel asks for
is prose behind who it is, and no test can read that.
"""

import ast
import importlib
import importlib.util
from functools import cache
from pathlib import Path

import pytest

from vfsd.sandbox.seccomp import load_policy
from vfsd.wire import fuse_abi
from vfsd.worker.opcodes import HANDLERS

TREE = Path(__file__).parents[2]
ENTRY_POINTS = {"broker": "vfsd.broker.__main__", "control": "vfsd.worker.control", "worker": "vfsd.worker.__main__"}
AFTER_LOCK_DOWN = {"vfsd.sandbox.filecalls"}  # of vfsd.sandbox, whose other modules confine: their calls are over by then
NOT_OURS = ("glibc: ", "interpreter: ", "kernel: ")
POLICY = load_policy()


@cache
def source_of(module):
    """Its syntax tree; None if there is no such module of vfsd."""
    path = TREE.joinpath(*module.split("."))
    found = [each for each in (path.with_suffix(".py"), path / "__init__.py") if each.exists()]
    return ast.parse(found[0].read_text(encoding="utf-8")) if found else None


def imported(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@cache
def modules_of(role):
    """All modules of vfsd that a role runs after its lock-down, and those of Python that they import."""
    found, waiting = set(), [ENTRY_POINTS[role]]
    while waiting:
        module = waiting.pop()
        if module in found or (module.startswith("vfsd.sandbox") and module not in AFTER_LOCK_DOWN):
            continue
        tree = source_of(module) if module.startswith("vfsd.") else None
        if tree is not None:
            waiting += imported(tree)
        if tree is not None or not module.startswith("vfsd"):
            found.add(module)
    return found


@cache
def attributes_of(role):
    """(the name before the dot if it is a plain one, the name behind it) of everything that the role's modules name."""
    trees = [tree for module in modules_of(role) if module.startswith("vfsd") and (tree := source_of(module)) is not None]
    nodes = [node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Attribute)]
    return {(node.value.id if isinstance(node.value, ast.Name) else "", node.attr) for node in nodes}


def defines(module, name):
    tree = source_of(module)
    return tree is not None and any(isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name == name for node in tree.body)


def is_used(name, role):
    """Whether the code of a role has it; ValueError for what there is not at all."""
    if name.startswith(NOT_OURS):
        return True
    if name.isupper():
        if getattr(fuse_abi, f"FUSE_{name}", None) not in HANDLERS:
            raise ValueError(f"{name}: no operation of FUSE that vfsd has")
        return role in ("broker", "worker")
    if name.startswith("vfsd."):
        module, _, last = name.rpartition(".")
        if source_of(name) is None and not defines(module, last):
            raise ValueError(f"{name}: no module of vfsd, nor a function or class in one")
        return name in modules_of(role) or (source_of(name) is None and module in modules_of(role))
    module, *path = name.split(".")
    if importlib.util.find_spec(module) is None:
        raise ValueError(f"{name}: neither of vfsd nor of Python")
    found = importlib.import_module(module)
    for each in path:
        found = getattr(found, each, None)
        if found is None:
            raise ValueError(f"{name}: Python has no such thing")
    if not path:
        return module in modules_of(role)
    of_module = len(path) == 1
    return any(attribute == path[-1] and (owner == module or not of_module) for owner, attribute in attributes_of(role))


def roles_with(rule):
    """A group's rule belongs to several."""
    return [name for name, role in POLICY.roles.items() if any(each.used_by == rule.used_by and same(each, rule) for each in role.rules)]


def same(one, other):
    return (one.syscall, one.conditions, one.action) == (other.syscall, other.conditions, other.action)


RULES = {f"{rule.syscall} {' '.join(rule.conditions)}": rule for role in ENTRY_POINTS for rule in POLICY.roles[role].rules}


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_what_uses_a_rule_is_there(rule):
    names = rule.used_by.split(", ")
    roles = roles_with(rule)
    assert [name for name in names if not any(is_used(name, role) for role in roles)] == []
    assert [role for role in roles if not any(is_used(name, role) for name in names)] == []


def test_a_denial_is_used_by_nobody():
    assert {rule.used_by for rule in POLICY.roles["supervisor"].rules} == {"nobody"}


@pytest.mark.parametrize(
    "name", ["LOOKDOWN", "vfsd.broker.no_such_module", "vfsd.fds.no_such_function", "os.no_such_call", "timers", "channels"]
)
def test_what_there_is_not_is_noticed(name):
    with pytest.raises(ValueError, match=name):
        is_used(name, "broker")


@pytest.mark.parametrize(
    ("name", "role"),
    [("os.listdir", "broker"), ("os.preadv", "broker"), ("READ", "control"), ("vfsd.broker.credentials", "worker")],
)
def test_what_a_role_does_not_do_is_noticed(name, role):
    assert not is_used(name, role)
