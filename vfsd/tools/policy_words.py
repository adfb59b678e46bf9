"""What the policy commands have in common: their arguments, and rules in words."""

from __future__ import annotations

import argparse
import errno
import platform

from vfsd.errors import ConfigError
from vfsd.sandbox.seccomp import POLICY_FILE
from vfsd.sandbox.seccomp_policy import ARCHITECTURES, ROLES, Action, RolePolicy, Rule
from vfsd.tools.policy_findings import examine_file


def add_policy_argument(parser: argparse.ArgumentParser, name: str = "policy") -> None:
    parser.add_argument(name, nargs="?", default=POLICY_FILE, metavar="FILE", help="(default: the one that vfsd comes with)")


def add_policy_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--policy", default=POLICY_FILE, metavar="FILE", help="(default: the one that vfsd comes with)")


def add_role_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--role", choices=ROLES, help="(default: every role)")


def add_arch_option(parser: argparse.ArgumentParser) -> None:
    machine = platform.machine()
    if machine in ARCHITECTURES:
        parser.add_argument("--arch", choices=ARCHITECTURES, default=machine, help="(default: this machine's)")
    else:  # there is no policy for it, and yet one can look at those that there are
        parser.add_argument("--arch", choices=ARCHITECTURES, required=True)


def add_json_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON")


def readable_roles(path: str) -> dict[str, RolePolicy]:
    """The roles of a policy that is understood completely; it may be weak, or for other machines."""
    examined = examine_file(path)
    wrong = [finding for finding in examined.findings if finding.kind in ("schema", "role")]
    if wrong:
        more = f" (and {len(wrong) - 1} more: vfsdctl policy check lists them)" if len(wrong) > 1 else ""
        raise ConfigError(f"seccomp policy {path}: {wrong[0].text}{more}")
    return examined.roles


def chosen_roles(path: str, role: str | None) -> list[RolePolicy]:
    roles = readable_roles(path)
    return [roles[name] for name in ROLES if role in (None, name)]


def action_word(action: Action) -> str:
    """As a policy writes it."""
    if isinstance(action, str):
        return action
    return f"errno({errno.errorcode.get(action, action)})"


def outcome_words(action: Action) -> str:
    """What happens to the call."""
    match action:
        case "allow":
            return "allowed"
        case "kill":
            return "kills the process"
        case 0:
            return "not made: returns 0"
        case _:
            return f"not made: fails with {errno.errorcode.get(action, action)}"


def condition_words(rule: Rule) -> str:
    return " and ".join(rule.conditions) or "any arguments"


def counted_syscalls(role: RolePolicy, architecture: str) -> int:
    """How many calls a role may make; of one that may make all but some: how many it may not."""
    counts_denied = role.default == "allow"
    return len({rule.syscall for rule in role.rules_for(architecture) if (rule.action != "allow") == counts_denied})
