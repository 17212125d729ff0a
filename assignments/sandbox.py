"""A process for code that nobody has checked: limits on time, memory and output, no network."""
import contextlib
import functools
import os
import resource
import shutil
import signal
import subprocess
import sys

OUTPUT = 20 << 20        # bytes that one file of the process may have, its output included
MEMORY = 6 << 30         # bytes of data that it may hold


def run_child(folder, words, seconds):
    """Run a module of Python, `words`, in a folder.  -> exit code; None: stopped at the limit

    It writes its output to the file "output" beside the folder.
    """
    place = folder.parent
    environment = dict(PATH=os.environ["PATH"], HOME=str(place), TMPDIR=str(place),
                       OMP_NUM_THREADS="1", PYTHONDONTWRITEBYTECODE="1", PYTHONHASHSEED="0",
                       PYTEST_DISABLE_PLUGIN_AUTOLOAD="1")

    def limits():
        resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
        resource.setrlimit(resource.RLIMIT_FSIZE, (OUTPUT, OUTPUT))
        resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    command = [*own_namespace(), sys.executable, "-m", *words]
    with open(place / "output", "wb") as output:
        process = subprocess.Popen(command, cwd=folder, stdin=subprocess.DEVNULL, stdout=output,
                                   stderr=output, env=environment, preexec_fn=limits,
                                   start_new_session=True)
        try:
            return process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            return None
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


@functools.cache
def own_namespace():
    """The words before a command that take the network from it, where the system allows that.

    All that the command has started ends with it.
    """
    words = "unshare --user --map-root-user --net --pid --fork --kill-child --".split()
    if shutil.which("unshare") is None:
        return []
    return words if subprocess.run([*words, "true"], capture_output=True).returncode == 0 else []
