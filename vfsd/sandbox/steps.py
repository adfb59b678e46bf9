"""How a step of confinement fails: with an error that names the step, the kernel's answer and what to do about it."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager

from vfsd.errors import ConfigError


@contextmanager
def step(name: str, remedy: str) -> Iterator[None]:
    """Turn an OSError (or python-prctl's way of saying one) into a ConfigError about this step."""
    try:
        yield
    except OSError as error:
        code = errno.errorcode.get(error.errno or 0, "no errno")
        raise ConfigError(f"sandbox: cannot {name}: {error.strerror or error} ({code}); {remedy}") from error
