"""The text of --xattrmap, and the names that its rules translate.

Oracle: rules, or a ConfigError of one line that shows where the text goes wrong; a name of the guest's becomes a name of the
host's or EPERM or ENOTSUP, as a second reading of the grammar says; a host's name that the guest sees is one that it may have.
"""

from __future__ import annotations

import errno

from tests.fuzz.provider import Provider, Recipe
from vfsd.broker.xattr_map import CAPABILITY, Rule, XattrMap, parse
from vfsd.errors import ConfigError, ReplyErrno

_NAMES = (
    b"",
    b"user.",
    b"user.x",
    b"trusted.x",
    b"security.capability",
    b"user.virtiofs.trusted.x",
    b"\xff\xfe",
    b"system.posix_acl_access",
)
_WORDS = (
    "prefix",
    "ok",
    "bad",
    "unsupported",
    "map",
    "client",
    "server",
    "all",
    "",
    "user.",
    "trusted.",
    "user.virtiofs.",
    "\udcff",
    "\0",
    " ",
)
_SEPARATORS = (":", "/", "|", ",", "\u00e9", " ", "x")


def one_input(data: bytes) -> None:
    provider = Provider(data)
    text = _text(provider)
    names = [*_NAMES, provider.blob(300)]
    try:
        rules = parse(text)
    except ConfigError as error:
        assert ">>>here>>>" in str(error) or "there are no rules" in str(error)
        assert "\n" not in str(error)
        return
    assert rules.rules
    for name in names:
        _check_to_server(rules, name)
        _check_to_client(rules, name)
    assert rules.remaps_capability == (_to_server(rules, CAPABILITY) not in (CAPABILITY, errno.EPERM, errno.ENOTSUP))


def _text(provider: Provider) -> str:
    """Any text, or words between separators."""
    if provider.flag():
        return provider.blob(400).decode(errors="surrogateescape")
    text = ""
    separator = provider.pick(_SEPARATORS)
    for _ in range(provider.byte() % 40):
        if provider.one_in(16):
            separator = provider.pick(_SEPARATORS)
        if provider.one_in(6):
            text += " "
        text += separator + provider.pick(_WORDS)
    return text + separator


def _to_server(rules: XattrMap, name: bytes) -> bytes | int:
    try:
        return rules.to_server(name)
    except ReplyErrno as error:
        return error.errno


def _check_to_server(rules: XattrMap, name: bytes) -> None:
    rule = _first([rule for rule in rules.rules if rule.scope in ("client", "all") and name[: len(rule.key)] == rule.key])
    expected = (
        {"prefix": rule.prepend + name, "ok": name, "unsupported": errno.ENOTSUP}.get(rule.kind, errno.EPERM) if rule else errno.EPERM
    )
    assert _to_server(rules, name) == expected


def _check_to_client(rules: XattrMap, name: bytes) -> None:
    rule = _first([rule for rule in rules.rules if rule.scope in ("server", "all") and name[: len(rule.prepend)] == rule.prepend])
    expected = None
    if rule is not None and rule.kind == "prefix":
        expected = name[len(rule.prepend) :] or None
    elif rule is not None and rule.kind == "ok":
        expected = name
    assert rules.to_client(name) == expected


def _first(matching: list[Rule]) -> Rule | None:
    return matching[0] if matching else None


def seeds() -> dict[str, bytes]:
    texts = {
        "map": ":map::user.virtiofs.:",
        "map-of-one-kind": ":map:trusted.:user.virtiofs.:",
        "rules": ":prefix:all:trusted.:user.virtiofs.: :bad:all:security.:: /unsupported/client/system.// :ok:all:::",
        "rule-that-ends-early": ":prefix:all:trusted.",
        "no-such-type": ":oops:all:::",
        "something-after-map": ":map::x: :ok:all:::",
        "not-utf-8": ":ok:all:\udcff::",
        "only-space": "  \n",
    }
    return {name: bytes(Recipe().flag(True).blob(text.encode(errors="surrogateescape")).blob(b"trusted.y")) for name, text in texts.items()}
