"""Runs inside the guest: answers requests that come as one line of JSON each over a second serial line.

Python's standard library only. Byte strings travel as str with surrogateescape, which JSON can carry. A request names an
operation and its arguments; the answer is {"id", "result"} or {"id", "error", "errno"}. Modules of probe functions are sent
over once and called by name afterwards, so a test's function runs here and on the host from the same source.
"""

import json
import os
import subprocess
import sys
import termios
import traceback
import tty
import types
from typing import Any

sys.path.append("/")  # isolated mode leaves out the script's own folder
from link import Link

MODULES: dict[str, types.ModuleType] = {}


def op_load(name: str, source: str) -> None:
    module = types.ModuleType(name)
    sys.modules[name] = module
    exec(compile(source, f"<{name}>", "exec"), module.__dict__)
    MODULES[name] = module


def op_call(module: str, function: str, arguments: list[Any]) -> Any:
    return getattr(MODULES[module], function)(*arguments)


def op_python(source: str, arguments: dict[str, Any]) -> Any:
    """Runs the source with the arguments as its names; its answer is what it assigned to `result`."""
    names: dict[str, Any] = dict(arguments)
    exec(compile(source, "<test>", "exec"), names)
    return names.get("result")


def op_run(argv: list[str], cwd: str | None, env: dict[str, str], stdin: str) -> tuple[int, str, str]:
    """Output goes through files: a background child that keeps a pipe open would otherwise be waited for."""
    with open("/dev/shm/stdout", "w+b") as out, open("/dev/shm/stderr", "w+b") as err:
        done = subprocess.run(argv, cwd=cwd, env={**os.environ, **env}, input=os.fsencode(stdin), stdout=out, stderr=err, check=False)
        out.seek(0)
        err.seek(0)
        return done.returncode, os.fsdecode(out.read()), os.fsdecode(err.read())


def op_shell(columns: int, lines: int) -> int:
    """An interactive shell on the console; the host joins the console to the user's terminal meanwhile."""
    with open("/proc/sys/kernel/printk", "w") as level:
        level.write("1")  # kernel messages would be printed across the shell's screen
    with open("/sys/class/tty/console/active") as active:
        console = "/dev/" + active.read().split()[-1]
    descriptor = os.open(console, os.O_RDWR | os.O_NOCTTY)
    try:
        termios.tcsetwinsize(descriptor, (lines, columns))
    finally:
        os.close(descriptor)
    start = f"cd /mnt 2>/dev/null; exec setsid -c sh -l <'{console}' >'{console}' 2>&1"
    return subprocess.run(["sh", "-c", start], env={**os.environ, "PS1": "guest:\\w# ", "TERM": "vt100"}, check=False).returncode


OPERATIONS = {"load": op_load, "call": op_call, "python": op_python, "run": op_run, "shell": op_shell}


def answer(request: dict[str, Any]) -> dict[str, Any]:
    try:
        result = OPERATIONS[request["op"]](**request["args"])
        json.dumps(result)  # what cannot be sent is the test's mistake, to be answered like any other
        return {"id": request["id"], "result": result}
    except BaseException as error:  # noqa: BLE001 - whatever it was, the host must hear of it
        number = error.errno if isinstance(error, OSError) else None
        return {"id": request["id"], "error": traceback.format_exc(), "errno": number}


def serve(descriptor: int) -> None:
    tty.setraw(descriptor)
    link = Link(descriptor)
    link.send({"id": 0, "result": list(os.uname())})
    while (request := link.receive())["op"] != "poweroff":
        link.send(answer(request))


def agent_device() -> str:
    with open("/proc/cmdline") as parameters:
        return next(word.removeprefix("agent=") for word in parameters.read().split() if word.startswith("agent="))


if __name__ == "__main__":
    serve(os.open(agent_device(), os.O_RDWR | os.O_NOCTTY))
