"""Where a run computes: processes, device, precision, seeds, stop signals.
"""
import ctypes
import dataclasses
import datetime
import os
import random
import signal
import sys
import time
import timeit
import hashlib

import numpy as np
import torch
import torch.distributed as dist

from support.files import UserError


def seed_all(*numbers):
    """Seed torch, random and numpy from any integers, say (seed, epoch, index): the draws that follow are a function of
    these numbers alone, so that no generator state has to be saved."""
    value = int.from_bytes(hashlib.blake2b(repr(numbers).encode(), digest_size=8).digest(), "little")
    # Not torch.manual_seed, which spends 100 us a call on a CUDA that is not in use: this runs once per image.
    torch.default_generator.manual_seed(value % 2**63)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(value % 2**63)
    random.seed(value)
    np.random.seed(value % 2**32)


# --- where a run computes -------------------------------------------------------------------------
@dataclasses.dataclass
class Process:
    """This process among all of the run, its device and its precision."""

    rank: int = 0
    world_size: int = 1
    device: torch.device = torch.device("cpu")
    amp: str = "no"

    @property
    def is_main(self):
        return self.rank == 0

    def autocast(self):
        """bfloat16 matrix products where amp is "bf16"; float32 otherwise."""
        # Differs from the recipe (float16, GradScaler): bf16 has float32's range, no loss scaling.
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.amp == "bf16")

    def sum(self, tensor):
        """Sum over all processes, in place."""
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    def broadcast(self, tensor):
        """All processes receive rank 0's numbers, in place."""
        if self.world_size > 1:
            dist.broadcast(tensor, src=0)
        return tensor

    def print(self, text):
        if self.is_main:
            print(text, flush=True)

    def warn(self, text):
        if self.is_main:
            print(f"warning: {text}", file=sys.stderr, flush=True)


def join_processes(device="auto"):
    """-> Process, for `python STAGE.py` and `torchrun STAGE.py` alike. nccl on GPUs, else gloo."""
    available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if device == "auto":
        device = "cuda" if available["cuda"] else "cpu"
    if not available[device]:
        raise UserError(f"--device {device}: torch sees no such device here; use --device cpu")
    rank = int(os.environ.get("RANK", 0))
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    if device == "cuda":
        device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
        torch.cuda.set_device(device)
    if world_size > 1 and not dist.is_initialized():
        # torchrun --max-restarts keeps its store, where processes that are gone left their
        # addresses: so each start has a name of its own there.
        store, _, _ = next(dist.rendezvous("env://"))
        store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
        backend = "nccl" if device.startswith("cuda") else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size,
                                timeout=datetime.timedelta(minutes=30))
    return Process(rank, world_size, torch.device(device))


def resolve_amp(amp, process):
    """auto: bf16 on CUDA; on a CPU with bf16 instructions if a product is 1.5 times faster."""
    if amp != "auto":
        return amp
    if process.device.type == "cuda":
        return "bf16"
    has_bf16 = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    if process.device.type != "cpu" or not has_bf16:
        return "no"
    seconds = torch.zeros(2)
    for i, dtype in enumerate([torch.float32, torch.bfloat16]):
        a = torch.ones(768, 768, dtype=dtype)
        seconds[i] = min(timeit.repeat(lambda: a @ a, number=1, repeat=8))
    float32, bf16 = process.sum(seconds).tolist()            # one answer for all processes
    return "bf16" if 1.5 * bf16 < float32 else "no"


# --- the process around a run ---------------------------------------------------------------------
class StopSignal:
    """SIGTERM and Ctrl-C. Outside a training loop they end the process; in one Run.check sees them.
    A second one ends the process at once (not under torchrun, which passes on one of its own)."""

    received, in_loop = 0, False

    def __call__(self, number, frame):
        again = self.received and "RANK" not in os.environ
        if not self.in_loop or again:
            os._exit(128 + number)
        self.received = number


def launch(main):
    """Call a stage's main(). A UserError becomes one sentence on stderr and exit code 2, under
    torchrun only once; a process that lost another one says so and exits 1; SIGTERM and Ctrl-C end
    a run with its state saved (143, 130)."""
    # Unbuffered lines, for os._exit drops what is in the buffer; file names may be no valid UTF-8.
    sys.stdout.reconfigure(line_buffering=True, errors="backslashreplace")
    keep_freed_memory()
    signal.signal(signal.SIGINT, StopSignal())
    if "RANK" not in os.environ:             # torchrun needs SIGTERM's default until the loop
        signal.signal(signal.SIGTERM, signal.getsignal(signal.SIGINT))
    try:
        main()
    except Exception as error:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)        # nothing is worth waiting for now
        rank = int(os.environ.get("RANK", 0))
        if rank > 0:
            time.sleep(5)                    # rank 0 most likely met the same: then torchrun ends us
        text, code = explain(error, rank)
        print(f"error: {' '.join(text.splitlines())}", file=sys.stderr, flush=True)
        if dist.is_initialized():
            os._exit(code)                   # others may hang: do not wait for them
        sys.exit(code)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
            ended = sys.exc_info()[1]
            if ended is None or isinstance(ended, SystemExit):
                # Not the interpreter's own end: a thread of gloo that then drops its last tensor
                # asks for the interpreter's lock, which aborts the process (torch 2.14).
                os._exit((ended.code or 0) if ended else 0)


def explain(error, rank):
    """-> (sentence, exit code) of an error that has one; any other is raised again."""
    if isinstance(error, UserError):
        text = str(error)
        if text.startswith("Caught "):       # a loader's worker: its traceback, then the sentence
            text = text.splitlines()[-1].rpartition("UserError: ")[2]
        return text, 2
    if isinstance(error, dist.DistError) or "gloo" in str(error):
        return (f"rank {rank} lost another process, whose own words or the launcher's say why; the same "
                f"command goes on from the last resume file"), 1
    raise error


def keep_freed_memory(keep=True):
    """Linux: what a step frees stays with the process for the next. glibc would hand large blocks
    back, and the kernel clears each page when it is asked again: up to a third of a CPU's step."""
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if hasattr(libc, "mallopt"):             # glibc, not musl
        M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -3, -4
        libc.mallopt(M_MMAP_MAX, 0 if keep else 65536)
        libc.mallopt(M_MMAP_THRESHOLD, 2**25)
        libc.mallopt(M_TRIM_THRESHOLD, -1 if keep else 2**26)
