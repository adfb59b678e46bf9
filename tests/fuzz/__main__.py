"""`make fuzz`: atheris over the targets, coverage-guided, each in a process of its own.

What is found goes to .cache/fuzz: TARGET/corpus what reaches new code, TARGET/findings what broke an oracle, with the command that
repeats it. A target begins with its corpus in the tree and with what earlier runs found.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

from tests.fuzz.targets import CORPUS, TARGETS, load

WORK = Path(".cache/fuzz").absolute()
_INPUT_SECONDS = 60  # an input that takes longer hangs
_MIB = 4096
_MAX_INPUT_BYTES = 2048


def main() -> int:
    parser = argparse.ArgumentParser(prog="make fuzz")
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=f"default: all of them in turn: {', '.join(TARGETS)}")
    parser.add_argument("--seconds", type=int, default=60, help="for each target")
    parser.add_argument("--input", type=Path, help="run one target on this file only")
    parser.add_argument("--write-seeds", action="store_true", help="write the seeds into the tree's corpus")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    targets = asked.targets or TARGETS
    if unknown := sorted(set(targets) - set(TARGETS)):
        parser.error(f"there is no target {unknown[0]}; there are {', '.join(TARGETS)}")
    if asked.write_seeds:
        return write_seeds(targets)
    if asked.input is not None:
        if len(asked.targets) != 1:
            parser.error("--input needs one target; make fuzz TARGET=NAME INPUT=FILE")
        return replay(asked.targets[0], asked.input)
    if asked.inside:
        return fuzz(asked.targets[0], asked.seconds)
    return max([supervise(name, asked.seconds) for name in targets])


def write_seeds(targets: list[str] | tuple[str, ...]) -> int:
    for name in targets:
        folder = CORPUS / name
        folder.mkdir(parents=True, exist_ok=True)
        for seed, data in load(name).seeds().items():
            (folder / seed).write_bytes(data)
    return 0


def replay(name: str, path: Path) -> int:
    """One input, without atheris; its exception is shown as it is."""
    target = load(name)
    with TemporaryDirectory() as folder:
        if hasattr(target, "open_rig"):
            target.open_rig(Path(folder))
        target.one_input(path.read_bytes())
        if hasattr(target, "close_rig"):
            target.close_rig()
    print(f"{path}: nothing is wrong")
    return 0


def supervise(name: str, seconds: int) -> int:
    """Run one target in a process, in a mount namespace of its own where that can be: what it mounts goes with it."""
    if getattr(load(name), "NEEDS_ROOT", False) and os.geteuid() != 0:
        print(f"{name}: skipped, it needs uid 0")
        return 0
    findings = WORK / name / "findings"
    findings.mkdir(parents=True, exist_ok=True)
    before = set(findings.iterdir())
    private = ["unshare", "--mount", "--propagation", "private"] if os.geteuid() == 0 else []
    command = [*private, sys.executable, "-m", "tests.fuzz", name, "--inside", "--seconds", str(seconds)]
    log = WORK / name / "log"
    began = time.monotonic()
    with log.open("wb") as output:
        status = subprocess.run(command, stdout=output, stderr=subprocess.STDOUT, check=False).returncode
    text = log.read_text(errors="replace")
    print(f"{name}: {_figures(text)}, {time.monotonic() - began:.0f} s, exit status {status}; log: {log}", flush=True)
    found = sorted(path for path in set(findings.iterdir()) - before if not path.name.startswith("slow-unit"))
    for path in found:
        print(f"  found: make fuzz TARGET={name} INPUT={path}", flush=True)
    if status and not found:
        print("".join(f"  | {line}\n" for line in text.splitlines()[-20:]), flush=True)
    return int(bool(found or status))


def _figures(text: str) -> str:
    """Executions, coverage and corpus, as libFuzzer's last line with each of them has it."""
    lines = re.findall(r"^#(\d+)\s+\w+\s+cov: (\d+) ft: (\d+) corp: (\d+)", text, re.MULTILINE)
    if not lines:
        return "no execution"
    executions, blocks, features, inputs = lines[-1]
    return f"{executions} executions, coverage {blocks}, features {features}, corpus {inputs}"


def fuzz(name: str, seconds: int) -> int:
    """Does not return."""
    import atheris  # noqa: PLC0415  # an extra, which replaying does without

    with atheris.instrument_imports(include=["vfsd"]):
        target = load(name)
    own = WORK / name / "corpus"
    own.mkdir(parents=True, exist_ok=True)
    folder = TemporaryDirectory()
    if hasattr(target, "open_rig"):
        target.open_rig(Path(folder.name))
    arguments = [
        sys.argv[0], f"-max_total_time={seconds}", f"-artifact_prefix={WORK}/{name}/findings/", f"-timeout={_INPUT_SECONDS}",
        f"-rss_limit_mb={_MIB}", f"-max_len={_MAX_INPUT_BYTES}", "-len_control=0", "-keep_seed=1", str(own), str(CORPUS / name),
    ]  # fmt: skip
    atheris.Setup(arguments, target.one_input)
    atheris.Fuzz()
    return 0


if __name__ == "__main__":
    sys.exit(main())
