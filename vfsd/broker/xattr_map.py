"""The rules of --xattrmap: under which name the host keeps an extended attribute of the guest's.

A rule is TYPE, SCOPE, KEY and PREPEND, each ended by a separator, which is the rule's first character and may be any but
white space; the first rule that matches decides. Scope `client` means names that the guest uses, matched by KEY, `server`
names that the host has, matched by PREPEND, `all` both. Types: `prefix` puts PREPEND before the guest's name (and takes it
off the host's), `ok` leaves the name alone, `bad` refuses it with EPERM, `unsupported` with ENOTSUP; a host's name that is
refused is not listed. `map`, with KEY and PREPEND only, stands for the three or four rules that one usually wants.

Who controls the bytes: the rules are the administrator's, the names are the guest's and the host's. Pure; imports nothing
but errors.
"""

from __future__ import annotations

import errno
from typing import Final, NamedTuple

from vfsd.errors import ConfigError, ReplyErrno

CAPABILITY: Final = b"security.capability"
_PREFIX, _OK, _BAD, _UNSUPPORTED, _MAP = "prefix", "ok", "bad", "unsupported", "map"
_TYPES = (_PREFIX, _OK, _BAD, _UNSUPPORTED, _MAP)
_CLIENT, _SERVER, _ALL = "client", "server", "all"
_SCOPES = (_CLIENT, _SERVER, _ALL)


class Rule(NamedTuple):
    kind: str
    scope: str
    key: bytes
    prepend: bytes


class XattrMap(NamedTuple):
    rules: tuple[Rule, ...]

    def to_server(self, name: bytes) -> bytes:
        """The host's name of what the guest calls `name`. ReplyErrno EPERM or ENOTSUP if it may not have such an attribute."""
        for rule in self.rules:
            if rule.scope == _SERVER or not name.startswith(rule.key):
                continue
            if rule.kind == _BAD:
                break
            if rule.kind == _UNSUPPORTED:
                raise ReplyErrno(errno.ENOTSUP)
            return rule.prepend + name if rule.kind == _PREFIX else name
        raise ReplyErrno(errno.EPERM)

    def to_client(self, name: bytes) -> bytes | None:
        """What the guest calls the host's `name`; None if it does not see it."""
        for rule in self.rules:
            if rule.scope == _CLIENT or not name.startswith(rule.prepend):
                continue
            if rule.kind == _PREFIX:
                return name[len(rule.prepend) :] or None
            return name if rule.kind == _OK else None
        return None

    @property
    def remaps_capability(self) -> bool:
        """Whether file capabilities are under another name, so that the host's kernel does not know them for what they are."""
        return self.server_capability is not None

    @property
    def server_capability(self) -> bytes | None:
        """The other name, if there is one."""
        try:
            name = self.to_server(CAPABILITY)
        except ReplyErrno:
            return None
        return name if name != CAPABILITY else None


def parse(text: str) -> XattrMap:
    """The rules in `text`; ConfigError shows where they go wrong, and says what would be right."""
    return XattrMap(_Parser(text).rules())


class _Parser:
    """A position in the text, which errors point at."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._at = 0

    def rules(self) -> tuple[Rule, ...]:
        found: list[Rule] = []
        self._skip_space()
        if self._at == len(self._text):
            raise self._error(self._at, "there are no rules; write at least one, for example :map::user.virtiofs.:")
        while self._at < len(self._text):
            mapped = self._rule(found)
            self._skip_space()
            if mapped and self._at < len(self._text):
                raise self._error(self._at, "nothing may follow a map rule, which decides about every name; put it last")
        return tuple(found)

    def _rule(self, found: list[Rule]) -> bool:
        """Read one rule; True if it is a map."""
        separator = self._text[self._at]
        self._at += 1
        kind = self._word(separator, "type", _TYPES)
        if kind == _MAP:
            found += _expand(self._name(separator, "key"), self._name(separator, "prepend"))
            return True
        scope = self._word(separator, "scope", _SCOPES)
        found.append(Rule(kind, scope, self._name(separator, "key"), self._name(separator, "prepend")))
        return False

    def _word(self, separator: str, what: str, known: tuple[str, ...]) -> str:
        start, word = self._field(separator, what)
        if word not in known:
            raise self._error(start, f"{word!r} is no {what}; write {', '.join(known[:-1])} or {known[-1]}")
        return word

    def _name(self, separator: str, what: str) -> bytes:
        start, name = self._field(separator, what)
        for position, character in enumerate(name):
            if character == "\0" or 0xD800 <= ord(character) < 0xE000:  # the latter are bytes that are not UTF-8
                raise self._error(start + position, f"the {what} is not UTF-8 text; attribute names are")
        return name.encode()

    def _field(self, separator: str, what: str) -> tuple[int, str]:
        """Where the field begins, and what it holds; moves behind the separator that ends it."""
        start = self._at
        end = self._text.find(separator, start)
        if end < 0:
            raise self._error(len(self._text), f"the rule ends within its {what}; end each of its fields with {separator!r}")
        self._at = end + 1
        return start, self._text[start:end]

    def _skip_space(self) -> None:
        while self._at < len(self._text) and self._text[self._at].isspace():
            self._at += 1

    def _error(self, position: int, why: str) -> ConfigError:
        """Shows the text up to the fault; it may be long, and the log's lines are one line."""
        return ConfigError(f"at character {position + 1}: {why}: {_shown(self._text, position)}")


def _expand(key: bytes, prepend: bytes) -> list[Rule]:
    """`map`: what begins with KEY is kept under PREPEND, and neither side sees the other's own names of that kind."""
    if not key:
        return [Rule(_PREFIX, _ALL, b"", prepend), Rule(_BAD, _ALL, b"", b"")]
    return [
        Rule(_PREFIX, _ALL, key, prepend),
        Rule(_BAD, _SERVER, b"", key),
        Rule(_BAD, _CLIENT, prepend, b""),
        Rule(_OK, _ALL, b"", b""),
    ]


_SHOWN_BEFORE, _SHOWN_AFTER = 40, 20


def _shown(text: str, position: int) -> str:
    """The text around a position, with an arrow at it."""
    begin, end = max(0, position - _SHOWN_BEFORE), position + _SHOWN_AFTER
    text = "".join(" " if character.isspace() else character for character in text)
    before, after = text[begin:position], text[position:end]
    return f"{'...' if begin else ''}{before} >>>here>>> {after}{'...' if end < len(text) else ''}"
