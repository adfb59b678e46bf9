"""Every fuzz target by name: a module with `one_input(data)`, which returns or raises, and `seeds()`, the inputs it begins with.

A module may have `open_rig(folder)` and `close_rig()`, for what is too dear to be made for each input, and NEEDS_ROOT.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from types import ModuleType

CORPUS = Path(__file__).parent / "corpus"

TARGETS = (
    "broker_packets",
    "channel_messages",
    "command_lines",
    "daemon",
    "directories",
    "frontend",
    "fuse_requests",
    "id_maps",
    "policies",
    "rings",
    "xattr_maps",
)


def load(name: str) -> ModuleType:
    return import_module(f"tests.fuzz.{name}")


def corpus_files(name: str) -> list[Path]:
    """Seeds, and what once went wrong."""
    folder = CORPUS / name
    return sorted(folder.iterdir()) if folder.is_dir() else []
