"""Whose files are made for a guest's user whose ids cannot be set here: vfsd's own, said once.

Without root only the ids mapped in vfsd's user namespace can be set, without one none but its own. Refusing would make
every creation fail (setresuid(2): EINVAL). Who controls the bytes: the ids are the guest's, the maps the administrator's.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence

from vfsd.broker.file_handles import Log
from vfsd.sandbox.id_maps import IdMap, is_mapped

_REMEDY = (
    "to keep owners start vfsd as root, or with --sandbox=namespace and ranges of /etc/subuid and /etc/subgid "
    "in --uid-map and --gid-map; this is said once"
)


class IdSquash:
    """`own`: uid and gid of the broker. An empty map: nothing else can be set. `may_set_groups`: setgroups(2) is not denied for good."""

    def __init__(self, own: tuple[int, int], uid_map: IdMap, gid_map: IdMap, log: Log, *, may_set_groups: bool = True) -> None:
        self._own_uid, self._own_gid = own
        self._uid_map = uid_map
        self._gid_map = gid_map
        self._log = log
        self._may_set_groups = may_set_groups
        self._not_said = threading.Lock()  # taken by who says it, and never given back

    def settable_groups(self, groups: Sequence[int]) -> Sequence[int]:
        """Those that can be set. A group that has no number here permits nothing here."""
        return [gid for gid in groups if is_mapped(self._gid_map, gid)] if self._may_set_groups else ()

    def settable(self, uid: int, gid: int) -> tuple[int, int]:
        """Each id as it is if it can be set, else vfsd's own."""
        as_uid = uid if uid == self._own_uid or is_mapped(self._uid_map, uid) else self._own_uid
        as_gid = gid if gid == self._own_gid or is_mapped(self._gid_map, gid) else self._own_gid
        if (as_uid, as_gid) != (uid, gid) and self._not_said.acquire(blocking=False):
            self._log.warning(
                f"uid {uid}, gid {gid} of the guest cannot be set here: what such users make belongs to uid {as_uid}, gid {as_gid}; {_REMEDY}"
            )
        return as_uid, as_gid
