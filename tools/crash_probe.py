"""What the crash demo runs in its guest: a copy, and a look at the share every few milliseconds. Sent over as source."""

import os
import subprocess
import time

LOOK_SECONDS = 0.005
NOTED_SECONDS = 0.02  # a look that takes longer is noted


def now() -> float:
    return time.time()


def copy_and_look(source: str, target: str) -> dict[str, object]:
    """`cp -a`, while statvfs(2), which no guest answers from its cache, is called again and again. Slow looks: [when begun, seconds]."""
    slow: list[list[float]] = []
    looks = 0
    began = time.monotonic()
    with open("/tmp/cp-said", "w+") as said:
        copying = subprocess.Popen(["cp", "-a", source, target], stderr=said)
        while copying.poll() is None:
            at, before = time.time(), time.monotonic()
            os.statvfs(os.path.dirname(target))
            took = time.monotonic() - before
            looks += 1
            if took > NOTED_SECONDS:
                slow.append([round(at, 4), round(took, 4)])
            time.sleep(LOOK_SECONDS)
        said.seek(0)
        text = said.read(2000)
    return {"code": copying.returncode, "said": text, "seconds": time.monotonic() - began, "looks": looks, "slow": slow}
