"""Where a run computes: processes, device, precision, seeds; how a command ends."""
import contextlib
import ctypes
import dataclasses
import datetime
import errno
import hashlib
import os
import random
import signal
import sys
import threading
import time

import numpy as np
import torch
import torch.distributed as dist

from support.files import UserError


def seed_all(*numbers):
    """Seed torch, random and numpy from any integers, for example (seed, epoch, index).

    The draws that follow depend on these numbers alone. So no generator state has to be saved.
    """
    digest = hashlib.blake2b(repr(numbers).encode(), digest_size=8).digest()
    value = int.from_bytes(digest, "little")
    # Not torch.manual_seed: it spends 100 us a call on a CUDA that is not in use, and this runs
    # once per image.
    torch.default_generator.manual_seed(value % 2**63)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(value % 2**63)
    random.seed(value)
    np.random.seed(value % 2**32)


# --- where a run computes -------------------------------------------------------------------------
@dataclasses.dataclass
class Process:
    """This process among all processes of the run, its device and its precision."""

    rank: int = 0
    world_size: int = 1
    device: torch.device = torch.device("cpu")
    amp: str = "no"
    lock = None              # files.Lock of the folder that this process writes into

    def leave_folder(self):
        """Another run may write there from now on."""
        if self.lock:
            self.lock.release()

    @property
    def is_main(self):
        return self.rank == 0

    def autocast(self):
        """bfloat16 matrix products if amp is "bf16", float32 otherwise."""
        # Differs from the recipe (float16 with a GradScaler): bf16 has the range of float32, so
        # the loss needs no scaling.
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.amp == "bf16")

    def sum(self, tensor):
        """Sum over all processes, in place."""
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    def broadcast(self, tensor):
        """All processes receive the numbers of rank 0, in place."""
        if self.world_size > 1:
            dist.broadcast(tensor, src=0)
        return tensor

    def wait(self):
        """Wait until all processes are here."""
        if self.world_size > 1:
            dist.barrier()

    def print(self, text):
        if self.is_main:
            print(text, flush=True)

    def warn(self, text):
        if self.is_main:
            print(f"warning: {text}", file=sys.stderr, flush=True)


def join_processes(device="auto", amp="no"):
    """-> Process, for `python STAGE.py` and `torchrun STAGE.py` alike. nccl on GPUs, else gloo.

    device: auto, cpu, cuda or mps. amp: auto, no or bf16. Raises UserError for a missing device.
    """
    available = {"cpu": True, "cuda": torch.cuda.is_available(),
                 "mps": torch.backends.mps.is_available()}
    if device == "auto":
        device = "cuda" if available["cuda"] else "cpu"
    if not available[device]:
        raise UserError(f"--device {device}: torch sees no such device here; use --device cpu")
    rank = int(os.environ.get("RANK", 0))
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    if device == "cuda":
        device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
        torch.cuda.set_device(device)
    device = torch.device(device)
    if world_size > 1 and not dist.is_initialized():
        # torchrun --max-restarts keeps its store, which still holds the addresses of processes
        # that are gone. So each start uses names of its own there.
        store, _, _ = next(dist.rendezvous("env://"))
        store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
        on_gpu = device.type == "cuda"
        dist.init_process_group("nccl" if on_gpu else "gloo", store=store, rank=rank,
                                world_size=world_size, device_id=device if on_gpu else None,
                                timeout=datetime.timedelta(minutes=30))
    return Process(rank, world_size, device, resolve_amp(amp, device))


def resolve_amp(amp, device):
    """--amp auto: bf16 on CUDA and on CPUs with bf16 matrix units (AMX), else float32.

    The choice depends on the processor alone, so equal commands compute in equal precision.
    """
    if amp != "auto":
        return amp
    has_matrix_units = torch.cpu._is_amx_tile_supported()
    if device.type == "cuda" or (device.type == "cpu" and has_matrix_units):
        return "bf16"
    return "no"


# --- how a command ends ---------------------------------------------------------------------------
# Ctrl-C, a scheduler's end of time, a closed terminal, a warning ahead of the end (SLURM).
STOP_SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1")
                if hasattr(signal, name)]    # Windows has the first two


class StopSignal:
    """The handler of the STOP_SIGNALS.

    Outside a training loop, the signal ends the process. In a loop, Run.check sees it and saves
    first. Launchers and shells often send a signal twice, so a second one changes nothing. Only a
    second Ctrl-C, after a second or more, ends the process at once, except under torchrun.
    """

    received = 0
    in_loop = False
    first = 0.0              # when the first signal came, in seconds

    def __call__(self, number, frame):
        impatient = number == signal.SIGINT and "RANK" not in os.environ
        again = self.received and time.monotonic() - self.first >= 1
        if not self.in_loop or (impatient and again):
            os._exit(128 + number)
        if not self.received:
            self.received = number
            self.first = time.monotonic()

    def handle(self, numbers):
        """Become the handler of these signals, but not of SIGHUP under nohup."""
        for number in numbers:
            ignored = signal.getsignal(number) == signal.SIG_IGN
            if not (ignored and number == getattr(signal, "SIGHUP", None)):
                signal.signal(number, self)


@contextlib.contextmanager
def signals_wait():
    """A process started meanwhile gets no stop signal until it calls ignore_stop_signals."""
    if not hasattr(signal, "pthread_sigmask"):               # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def ignore_stop_signals(worker=None):
    """In a loader's worker: a signal to all processes of a job is the training loop's to handle.

    SIGTERM is also how the loader ends a worker. So it counts if the parent sent it.
    """
    others = [number for number in STOP_SIGNALS if number != signal.SIGTERM]
    for number in others:
        signal.signal(number, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):                       # Linux; it tells the sender
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
        threading.Thread(target=end_if_parent_says, daemon=True).start()
    elif hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)


def end_if_parent_says():
    """Take every SIGTERM and leave at that of the parent."""
    while signal.sigwaitinfo([signal.SIGTERM]).si_pid != os.getppid():
        pass
    os._exit(0)


def launch(main):
    """Call a stage's main() and choose the exit code of the command.

    A UserError becomes one sentence on stderr and exit code 2, under torchrun only once. A process
    that lost another process says so and exits 1. A stop signal ends a run with its state saved
    and with exit code 128 + signal: 143 for SIGTERM, 130 for Ctrl-C.
    """
    keep_freed_memory()
    handler = StopSignal()
    signal.signal(signal.SIGINT, handler)
    if "RANK" not in os.environ:             # torchrun needs SIGTERM's default until the loop
        handler.handle(STOP_SIGNALS)
    with (contextlib.redirect_stdout(Stream(sys.stdout)),
          contextlib.redirect_stderr(Stream(sys.stderr))):
        try:
            main()
        except Exception as error:
            handler.in_loop = False                          # from here on a signal just ends it
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            rank = int(os.environ.get("RANK", 0))
            if rank > 0:
                time.sleep(5)                # rank 0 most likely met the same error and reports it
            text, code = explain(error, rank)
            print(f"error: {' '.join(text.splitlines())}", file=sys.stderr, flush=True)
            if dist.is_initialized():
                os._exit(code)               # other processes may hang: do not wait for them
            sys.exit(code)
        finally:
            if dist.is_initialized():
                leave_group()


class Stream:
    """Standard output or error as a run needs it: it outlives whoever reads it.

    After `| head`, or when the terminal is closed, what is printed is lost and the run goes on.
    """

    def __init__(self, stream):
        # A command started without the stream (`>&-`) has None. A notebook's has no reconfigure.
        self.stream = stream or open(os.devnull, "w", encoding="utf-8")
        if hasattr(stream, "reconfigure"):
            # os._exit drops what is in the buffer. No text is too much for any locale.
            stream.reconfigure(line_buffering=True, errors="backslashreplace")

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def write(self, text):
        try:
            return self.stream.write(text)
        except (OSError, ValueError):        # ValueError: it was closed
            self.go_nowhere()
            return len(text)

    def flush(self):
        try:
            self.stream.flush()
        except (OSError, ValueError):
            self.go_nowhere()

    def go_nowhere(self):
        """What is still in the buffer goes there, too, so that the end of Python finds no error."""
        old = self.stream
        self.stream = open(os.devnull, "w", encoding="utf-8")
        with contextlib.suppress(OSError, ValueError, AttributeError):
            os.dup2(self.stream.fileno(), old.fileno())


def leave_group():
    """End the process group, and then the process if nothing went wrong."""
    dist.destroy_process_group()
    ended = sys.exc_info()[1]
    if ended is None:
        ended = SystemExit(0)
    if isinstance(ended, SystemExit):
        # Not the interpreter's own end. A thread of gloo that then drops its last tensor asks for
        # the interpreter's lock, which aborts the process (torch 2.14).
        os._exit(ended.code or 0)


def explain(error, rank):
    """-> (sentence, exit code) of an error that has one; any other error is raised again."""
    if isinstance(error, UserError):
        text = str(error)
        if text.startswith("Caught "):       # a loader's worker: its traceback, then the sentence
            text = text.splitlines()[-1].rpartition("UserError: ")[2]
        return text, 2
    text = str(error)
    if isinstance(error, RuntimeError) and ("shared memory" in text or "Bus error" in text):
        return ("the loader's workers need more shared memory than /dev/shm has: give --workers 0, "
                "or make it larger (docker run --shm-size 8g)"), 2
    if isinstance(error, RuntimeError) and text.startswith("DataLoader worker"):
        return (f"{text.splitlines()[0].rstrip('. ')}: if memory is short, lower --workers. The "
                f"same command goes on from the last resume file"), 1
    if type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
        reason = " ".join(text.split())[:160]
        return (f"--compile failed ({reason}): it needs a C++ compiler, and Triton on a GPU; "
                f"install them, or leave out --compile"), 2
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"cannot write ({error.strerror}): free some space, or choose another --out", 2
    if isinstance(error, OSError) and error.filename is not None:
        return (f"cannot read or write {error.filename} ({error.strerror}): check the name, or "
                f"choose another --out"), 2
    if isinstance(error, dist.DistError) or "gloo" in text:
        return (f"rank {rank} lost another process; that process or the launcher says why. "
                f"The same command goes on from the last resume file"), 1
    raise error


def keep_freed_memory(keep=True):
    """Linux: memory that a step frees stays with the process for the next step.

    Otherwise glibc returns large blocks to the kernel, and the kernel clears each page when it is
    asked again. That takes up to a third of a step on a CPU.
    """
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if hasattr(libc, "mallopt"):             # glibc, not musl
        M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -3, -4
        libc.mallopt(M_MMAP_MAX, 0 if keep else 65536)
        libc.mallopt(M_MMAP_THRESHOLD, 2**25)
        libc.mallopt(M_TRIM_THRESHOLD, -1 if keep else 2**26)
