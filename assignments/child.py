"""The child process of a grading: tests of one function, with writing and network fenced off.

    python -m assignments.child FILE::FUNCTION WORDS_FOR_PYTEST ...    # in a copy of the project

The copy lies in a folder of its own, and report.jsonl is written beside it: a line per test that
failed, a line if the fence was touched, and a line at the end. If that last line is missing, the
process ended early. After a failure, what the function returns on the probes goes to probed.pt.

The fence holds back accidents and simple tricks. It does not hold back an attack on the machine.
"""
import io
import json
import os
import sys
from pathlib import Path

import hypothesis  # noqa: F401  imported here, because imports may write and start programs
import numpy  # noqa: F401
import pytest
import torch
import torch.utils.data
import torchvision.transforms.v2  # noqa: F401

from assignments import probes

WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
CHANGES = ("os.remove", "os.rename", "os.mkdir", "os.rmdir", "os.link", "os.symlink", "os.chmod",
           "os.chown", "os.truncate", "os.utime")
NETWORK = "socket.connect", "socket.bind", "socket.sendto", "socket.getaddrinfo"
PROGRAMS = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork",
            "os.forkpty", "os.kill", "os.killpg")


class Fenced(Exception):
    """The function did what a graded function may not do."""


class Report:
    """Writes report.jsonl. Also a plugin of pytest."""

    def __init__(self, path):
        self.file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        self.failed = self.passed = self.broken = 0

    def __call__(self, **facts):
        os.write(self.file, (json.dumps(facts) + "\n").encode())

    @pytest.hookimpl(hookwrapper=True)
    def pytest_runtest_makereport(self, item, call):
        report = (yield).get_result()
        if report.failed:
            self.failed += 1
            error = call.excinfo
            self(test=item.nodeid, error=error.typename, text=str(error.value)[-2000:])
        elif report.when == "call" and report.passed:
            self.passed += 1

    def pytest_collectreport(self, report):
        if report.failed:
            self.broken += 1
            self(broken=str(report.longrepr).strip().splitlines()[-1][-500:])


def fence(folder, report):
    """From now on: no writing outside `folder`, no network, no other program. It never opens."""
    def inside(path):
        if isinstance(path, bytes):
            path = path.decode()
        path = os.path.realpath(path)
        return path == "/dev/null" or Path(path).is_relative_to(folder)

    def refuse(what):
        report(fenced=what)
        raise Fenced(what)

    def watch(event, args):
        if event == "open":
            path, _, flags = args
            if isinstance(path, (str, bytes)) and flags & WRITES and not inside(path):
                refuse("writes outside its folder")
        elif event in CHANGES:
            paths = args[:2] if event in ("os.rename", "os.link", "os.symlink") else args[:1]
            if any(isinstance(p, (str, bytes)) and not inside(p) for p in paths):
                refuse("changes files outside its folder")
        elif event in NETWORK:
            refuse("uses the network")
        elif event in PROGRAMS:
            refuse("starts or ends another program")
    sys.addaudithook(watch)


def main(name, words):
    project = Path.cwd()
    folder = Path(os.path.realpath(project.parent))
    report = Report(folder / "report.jsonl")
    fence(folder, report)
    code = pytest.main(["-q", "--tb=no", "-p", "no:cacheprovider", "--maxfail=4", *words],
                       plugins=[report])
    if report.failed:
        answers = io.BytesIO()
        torch.save(probes.answers(name, probes.function_of(name)), answers)
        (folder / "probed.pt").write_bytes(answers.getvalue())
    report(end=int(code), passed=report.passed)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
