"""The roles: what a process of vfsd can be. What a policy lets one do is a `RolePolicy`, how one confines itself a `Confinement`."""

from __future__ import annotations

from typing import Literal, get_args

RoleName = Literal["broker", "control", "worker", "supervisor"]
ROLES: tuple[RoleName, ...] = get_args(RoleName)
