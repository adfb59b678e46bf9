"""What options take: argparse types. argparse shows an error's text behind the option's name."""

from __future__ import annotations

import argparse
import os

from vfsd.broker.xattr_map import parse as parse_xattr_map
from vfsd.config import MAX_TAG_BYTES
from vfsd.errors import ConfigError
from vfsd.sandbox.capabilities import Change, decode_changes
from vfsd.sandbox.id_maps import IdRange, decode_id_range

_MOST_DIGITS = 20  # of 2^63 and its sign


def bounded_int(smallest: int, largest: int) -> type[int]:
    """An argparse type; argparse shows the error's text behind the option's name."""

    def convert(text: str) -> int:
        if not (text.isascii() and text.removeprefix("-").isdecimal() and len(text) <= _MOST_DIGITS):
            raise argparse.ArgumentTypeError(f"{text!r} is not a number; give one from {smallest} to {largest}")
        value = int(text)
        if not smallest <= value <= largest:
            raise argparse.ArgumentTypeError(f"{value} is out of range; give a number from {smallest} to {largest}")
        return value

    return convert  # type: ignore[return-value]  # argparse wants a callable, typeshed's alias calls it a type


def tag_bytes(text: str) -> bytes:
    tag = os.fsencode(text)
    if not tag or len(tag) > MAX_TAG_BYTES:
        raise argparse.ArgumentTypeError(f"{len(tag)} bytes; a tag has 1 to {MAX_TAG_BYTES} bytes, choose another one")
    return tag


def path_bytes(text: str) -> bytes:
    if not text:
        raise argparse.ArgumentTypeError("the path is empty; give the path of a directory or socket")
    return os.fsencode(text)


def id_range(text: str) -> IdRange:
    try:
        return decode_id_range(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def xattrmap(text: str) -> str:
    """Checked here, so that the fault is shown at once; the broker reads it again."""
    try:
        parse_xattr_map(text)
    except ConfigError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return text


def modcaps(text: str) -> tuple[Change, ...]:
    try:
        return decode_changes(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
