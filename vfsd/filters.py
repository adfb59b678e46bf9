"""The seccomp filters of this start: from which policy, whether it may be used, and which filters they are.

Only the supervisor does this; roles get BPF. Who controls the bytes: the command line and the policy, both the administrator's.
"""

from __future__ import annotations

import hashlib
import platform

from vfsd.config import Options
from vfsd.errors import ConfigError
from vfsd.log import WARNING, Logger
from vfsd.sandbox.role_names import ROLES, RoleName
from vfsd.sandbox.seccomp import Policy, load_policy
from vfsd.sandbox.seccomp_forbidden import find_weaknesses


def make_filters(options: Options, log: Logger) -> dict[RoleName, bytes]:
    """Every role's BPF, empty for --seccomp=none. Raises ConfigError for a policy that cannot be or may not be used."""
    if options.seccomp == "none":
        return dict.fromkeys(ROLES, b"")
    policy = load_policy(options.seccomp_policy)
    if options.seccomp_policy is not None:
        _check_strength(policy, options, log)
    mode = options.seccomp
    filters = {role: policy.compile(role, mode) for role in ROLES}
    origin = "own" if options.seccomp_policy is None else options.seccomp_policy
    hashes = ", ".join(f"{role} {hashlib.sha256(program).hexdigest()}" for role, program in filters.items())
    log.info(f"seccomp={mode}; sha256 of policy ({origin}) {policy.sha256}, of filters: {hashes}")
    return filters


def _check_strength(policy: Policy, options: Options, log: Logger) -> None:
    """Somebody else's policy must not allow what is forbidden, unless that is what is asked for."""
    weaknesses = [each for role in policy.roles.values() for each in find_weaknesses(role, platform.machine())]
    if weaknesses and not options.allow_weak_policy:
        more = f" (and {len(weaknesses) - 1} more: vfsdctl policy check {policy.path} lists them)" if len(weaknesses) > 1 else ""
        raise ConfigError(f"--seccomp-policy={policy.path}: {weaknesses[0]}{more}; mend it, or use --allow-weak-policy")
    for weakness in weaknesses:
        log.log(WARNING, f"weak seccomp policy {policy.path}: {weakness}")
