"""The rules of --xattrmap: what they mean, and that a mistake in them is shown where it is."""

import errno

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from vfsd.broker.xattr_map import CAPABILITY, parse
from vfsd.errors import ConfigError, ReplyErrno


def to_server(rules, name):
    """The host's name, or the errno."""
    try:
        return parse(rules).to_server(name)
    except ReplyErrno as error:
        return error.errno


@pytest.mark.parametrize(
    ("rules", "name", "expected"),
    [
        (":ok:all:user.:user.:", b"user.x", b"user.x"),
        (":ok:all:user.:user.:", b"trusted.x", errno.EPERM),  # no rule matches
        (":prefix:all:trusted.:user.virtiofs.:", b"trusted.x", b"user.virtiofs.trusted.x"),
        (":prefix:client:trusted.:user.virtiofs.:", b"trusted.x", b"user.virtiofs.trusted.x"),
        (":prefix:server:trusted.:user.virtiofs.:", b"trusted.x", errno.EPERM),
        (":prefix:all::user.virtiofs.:", b"anything", b"user.virtiofs.anything"),
        (":bad:all:trusted.::", b"trusted.x", errno.EPERM),
        (":unsupported:all:trusted.::", b"trusted.x", errno.ENOTSUP),
        (":unsupported:server:trusted.:: :ok:all:::", b"trusted.x", b"trusted.x"),
        (":bad:all:user.secret.:: :ok:all:::", b"user.secret.x", errno.EPERM),  # the first match wins
        (":ok:all::: :bad:all:user.secret.::", b"user.secret.x", b"user.secret.x"),
        (":map::user.virtiofs.:", b"security.selinux", b"user.virtiofs.security.selinux"),
        (":map:trusted.:user.virtiofs.:", b"trusted.x", b"user.virtiofs.trusted.x"),
        (":map:trusted.:user.virtiofs.:", b"user.virtiofs.trusted.x", errno.EPERM),
        (":map:trusted.:user.virtiofs.:", b"user.x", b"user.x"),
    ],
)
def test_the_hosts_name_of_a_guests_attribute(rules, name, expected):
    assert to_server(rules, name) == expected


@pytest.mark.parametrize(
    ("rules", "name", "expected"),
    [
        (":ok:all:user.:user.:", b"user.x", b"user.x"),
        (":ok:all:user.:user.:", b"trusted.x", None),
        (":ok:client:user.:user.:", b"user.x", None),
        (":prefix:all:trusted.:user.virtiofs.:", b"user.virtiofs.trusted.x", b"trusted.x"),
        (":prefix:server::user.virtiofs.:", b"user.virtiofs.trusted.x", b"trusted.x"),
        (":prefix:all:trusted.:user.virtiofs.:", b"user.virtiofs.", None),  # nothing is left of it
        (":bad:server::user.secret.: :ok:all:::", b"user.secret.x", None),
        (":unsupported:server::user.secret.: :ok:all:::", b"user.secret.x", None),
        (":bad:client::user.secret.: :ok:all:::", b"user.secret.x", b"user.secret.x"),
        (":map::user.virtiofs.:", b"user.virtiofs.security.selinux", b"security.selinux"),
        (":map::user.virtiofs.:", b"user.x", None),
        (":map:trusted.:user.virtiofs.:", b"user.virtiofs.trusted.x", b"trusted.x"),
        (":map:trusted.:user.virtiofs.:", b"trusted.x", None),
        (":map:trusted.:user.virtiofs.:", b"user.x", b"user.x"),
    ],
)
def test_the_guests_name_of_a_hosts_attribute(rules, name, expected):
    assert parse(rules).to_client(name) == expected


@pytest.mark.parametrize(
    ("rules", "same"),
    [
        ("/ok/all/user./user./", ":ok:all:user.:user.:"),
        (";ok;all;user.;user.;:bad:all:::", ":ok:all:user.:user.: :bad:all:::"),
        ("\n :ok:all:user.:user.:\t\n|bad|all||| ", ":ok:all:user.:user.::bad:all:::"),
        ("ookoallouser.ouser.o", None),
        ("☃ok☃all☃user.☃user.☃", ":ok:all:user.:user.:"),
        (":map:trusted.:u.:", ":prefix:all:trusted.:u.: :bad:server::trusted.: :bad:client:u.:: :ok:all:::"),
        (":map::u.:", ":prefix:all::u.: :bad:all:::"),
    ],
)
def test_a_rule_may_be_written_in_several_ways(rules, same):
    if same is None:  # a letter of a field as the separator ends that field
        with pytest.raises(ConfigError):
            parse(rules)
    else:
        assert parse(rules) == parse(same)


@pytest.mark.parametrize(
    ("rules", "position", "named"),
    [
        ("", 1, "no rules"),
        ("  \n", 4, "no rules"),
        (":", 2, "ends within its type"),
        (":ok", 4, "ends within its type"),
        (":okay:all:::", 2, "'okay' is no type; write prefix, ok, bad, unsupported or map"),
        ("::all:::", 2, "'' is no type"),
        (":ok:both:::", 5, "'both' is no scope; write client, server or all"),
        (":ok:all", 8, "ends within its scope"),
        (":ok:all:user.", 14, "ends within its key"),
        (":ok:all:user.:user.", 20, "ends within its prepend; end each of its fields with ':'"),
        (":ok:all:a:b: x", 15, "ends within its type"),
        (":ok:all:a:b: /nope/all///", 15, "'nope' is no type"),
        (":map:a:b", 9, "ends within its prepend"),
        (":map::b: :ok:all:::", 10, "nothing may follow a map rule"),
        (":map::b: :map::c:", 10, "nothing may follow a map rule"),
        (":ok:all:a\udcffb::", 10, "not UTF-8"),
        (":ok:all:a\0b::", 10, "not UTF-8"),
    ],
)
def test_a_mistake_is_shown_where_it_is(rules, position, named):
    with pytest.raises(ConfigError) as raised:
        parse(rules)
    text = str(raised.value)
    assert text.startswith(f"at character {position}: ")
    assert named in text
    assert "\n" not in text


def test_the_rule_is_shown_up_to_the_mistake():
    with pytest.raises(ConfigError, match=r": \.\.\.a+:a+: / >>>here>>> nope/all///$"):
        parse(":ok:all:" + "a" * 50 + ":aaa: /nope/all///")


def test_file_capabilities_under_another_name_are_noticed():
    assert parse(":map::user.virtiofs.:").server_capability == b"user.virtiofs.security.capability"
    assert parse(":prefix:all:security.:user.virtiofs.: :ok:all:::").remaps_capability
    for rules in (":ok:all:::", ":bad:all:::", ":unsupported:all:::", ":prefix:all:security.selinux:user.: :ok:all:::", ":prefix:all:::"):
        assert not parse(rules).remaps_capability, rules
    assert CAPABILITY == b"security.capability"


fields = st.text(alphabet="ab.", max_size=4)
rule = st.one_of(
    st.builds(":{}:{}:{}:{}:".format, st.sampled_from(["prefix", "ok", "bad", "unsupported"]), st.sampled_from(["client", "server", "all"]), fields, fields),
    st.builds("/map/{}/{}/".format, fields, fields),
)  # fmt: skip


@given(st.one_of(st.text(max_size=30), st.text(alphabet=":/ maplokbdc.\udc80\0", max_size=40), st.lists(rule, max_size=4).map(" ".join)))
@example(":ok:all::" * 100)
def test_any_text_is_rules_or_a_mistake(text):
    try:
        rules = parse(text)
    except ConfigError:
        return
    for name in (b"", b"a", b"user.x", CAPABILITY):
        rules.to_client(name)
        to_server(text, name)


@given(st.lists(rule, min_size=1, max_size=3).map(" ".join), st.text(alphabet="ab.", min_size=1, max_size=5).map(str.encode))
def test_what_is_prefixed_both_ways_comes_back(text, name):
    """Where a name goes to the host by its only rule, and that rule works both ways, the guest sees it under the same name."""
    try:
        rules = parse(text)
    except ConfigError:
        return
    if len(rules.rules) == 1 and rules.rules[0].scope == "all":
        host = to_server(text, name)
        if isinstance(host, bytes) and rules.rules[0].kind == "prefix":
            assert rules.to_client(host) == name
