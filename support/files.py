"""Files on disk: checkpoints that are whole or not there, and the log of a run. Knows no model.

    write_file, read_file    saving to a temporary name, then a rename; reading notices damage
    describe_run, Log        what a run says about itself; one JSON line per call
    refuse_unwritable, Lock, set_aside       the folder OUT; one run at a time in it; --fresh
"""
import argparse
import contextlib
import hashlib
import json
import os
import pickle
import platform
import re
import shlex
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

import torch

try:
    import fcntl
except ImportError:          # Windows
    fcntl = None
    import msvcrt

ROOT = Path(__file__).resolve().parent.parent


class UserError(Exception):
    """A mistake that the user can mend. `launch` prints its one sentence and exits with code 2."""


# --- checkpoints ----------------------------------------------------------------------------------
def write_file(path, contents, previous=None):
    """Save `contents` so that a reader never sees half a file.

    The file is written under a temporary name, flushed to disk and renamed. The old file stays
    until then, and longer under the name `previous` if that is given. Raises UserError.
    """
    path = Path(path)
    temporary = Path(f"{path}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as f:
            torch.save(contents, f)
            f.flush()
            os.fsync(f.fileno())
        if previous and path.exists():
            os.replace(path, previous)
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:
        if temporary.is_file():
            temporary.unlink()
        reason = " ".join(str(error).split())
        raise UserError(f"could not write {path} ({reason}): free some space or choose another "
                        f"--out; the file that was there before is untouched") from error


def read_file(path, kind=None, remedy=""):
    """Load a checkpoint on the CPU without running any code in it.  -> dict

    kind: what the file has to be ("vqkd", "pretrain", ...). remedy: how to get the file if it is
    missing. Raises UserError if the file is missing, damaged, hostile or of another kind.
    """
    path = Path(path)
    if not path.is_file():
        remedy = f"; {remedy}" if remedy else ""
        raise UserError(f"there is no file {path}{remedy}")
    check_archive(path)
    try:
        # Released files hold an argparse.Namespace. It is harmless; other objects are refused.
        with torch.serialization.safe_globals([argparse.Namespace]):
            contents = torch.load(path, map_location="cpu", weights_only=True)
        found = list(tensors(contents))
    except pickle.UnpicklingError as error:
        raise UserError(f"{path} holds objects other than tensors and numbers, or is damaged: "
                        f"not loaded") from error
    except Exception as error:               # a damaged file can raise any kind of exception
        raise UserError(f"{path} is truncated or no checkpoint at all: "
                        f"make or fetch it anew") from error
    if not isinstance(contents, dict):
        raise UserError(f"{path} holds a {type(contents).__name__}, not a checkpoint")
    check_tensors(path, found)
    if kind is not None and contents.get("kind") != kind:
        found = contents.get("kind", "foreign")
        raise UserError(f"{path} is a {found!r} file where a {kind!r} file is needed")
    return contents


def check_archive(path):
    """UserError if a part of the zip archive is damaged, or unpacks to more than the file holds.

    torch.save writes a zip archive without compression, with a CRC-32 for each tensor. torch.load
    does not check those sums, so a flipped bit would go unnoticed. Older formats have no sums.
    """
    if not zipfile.is_zipfile(path):
        return
    try:
        with zipfile.ZipFile(path) as archive:
            unpacked = sum(part.file_size for part in archive.infolist())
            if unpacked > path.stat().st_size:               # a "zip bomb" would fill the memory
                raise UserError(f"{path} unpacks to more than it holds, which no checkpoint does: "
                                f"not loaded")
            damaged = archive.testzip()
    except UserError:
        raise
    except Exception as error:               # a damaged archive can raise any kind of exception
        raise UserError(f"{path} is truncated or no checkpoint at all: "
                        f"make or fetch it anew") from error
    if damaged:
        raise UserError(f"{path} is damaged ({damaged} does not give its checksum): "
                        f"take an earlier copy, or make it anew")


def check_tensors(path, found):
    """UserError for tensors that state more numbers than the file can hold."""
    odd = [place for place, t in found
           if t.layout != torch.strided or t.device.type != "cpu" or t.is_quantized]
    stated = sum(t.numel() * t.element_size() for _, t in found)
    if odd:
        raise UserError(f"{path} holds a tensor of an odd kind ({odd[0]}) without the numbers "
                        f"that it would fill: not loaded")
    if stated > 4 * path.stat().st_size + 2**20:             # 4: several names may share a tensor
        raise UserError(f"{path} holds tensors without the numbers that they would fill: "
                        f"not loaded")


def tensors(contents, place=""):
    """Every tensor inside nested dicts, lists and tuples: ("model.norm.weight", tensor), ..."""
    if isinstance(contents, torch.Tensor):
        yield place, contents
        return
    pairs = ()
    if isinstance(contents, dict):
        pairs = contents.items()
    elif isinstance(contents, (list, tuple)):
        pairs = enumerate(contents)
    for key, value in pairs:
        yield from tensors(value, f"{place}.{key}" if place else str(key))


# --- what a run says about itself -----------------------------------------------------------------
def describe_run(kind, args):
    """What every file says beside its weights: arguments, commit, a hash of each source file."""
    sources = [*sorted(ROOT.glob("*.py")), *sorted(ROOT.glob("support/*.py"))]
    hashes = {f.name: hashlib.sha256(f.read_bytes()).hexdigest()[:12] for f in sources}
    return dict(kind=kind, preset=args.model, data=str(args.data), image_size=args.image_size,
                args=plain_args(args), commit=commit(),
                torch=str(torch.__version__), source_hash=hashes)


def commit():
    """The commit of the project; "-dirty" behind it: a Python file differs from it."""
    git = f"git -C {shlex.quote(str(ROOT))}"
    status, text = subprocess.getstatusoutput(f"{git} rev-parse HEAD")
    if status:
        return "unknown"
    # Records and pages may differ: they say what was computed, and compute nothing.
    differs, _ = subprocess.getstatusoutput(f"{git} diff --quiet HEAD -- '*.py'")
    return f"{text}-dirty" if differs else text


def plain_args(args):
    """The arguments as JSON and torch.save take them: paths become text, tuples become lists."""
    plain = {name: value for name, value in vars(args).items() if name != "typed"}
    for name, value in plain.items():
        if isinstance(value, Path):
            plain[name] = str(value)
        elif isinstance(value, tuple):
            plain[name] = list(value)
    return plain


# --- the folder OUT -------------------------------------------------------------------------------
def refuse_unwritable(folder):
    """UserError if a command could not write its result into a folder, before it computes that."""
    place = Path(folder)
    while not place.exists():                # it will be made there
        place = place.parent
    try:
        with tempfile.TemporaryFile(dir=place) as file:
            file.write(b"full?")             # a full disk says so when the file is closed
    except OSError as error:
        raise UserError(f"cannot write into {folder} ({error.strerror}): choose another "
                        f"--out") from error


class Lock:
    """OUT/STAGE.lock: only one process at a time writes the files of a stage into a folder.

    The system gives up the lock when the process ends, however it ends. Without write permission,
    or on a disk that knows no locks, there is none.
    """

    def __init__(self, path):
        """UserError if another process has the lock, or if the folder cannot be made."""
        self.path = Path(path)
        self.pid = os.getpid()               # a forked worker does not give the lock up
        self.file = None
        self.made = not self.path.parent.exists()
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot write {self.path} ({error.strerror}): "
                            f"choose another --out") from error
        is_the_one = False
        while not is_the_one:
            try:
                self.file = open(self.path, "a+", encoding="utf-8")
            except OSError:                  # only reading: whoever writes later will say so
                return
            if not is_free(self.file):
                self.file.seek(0)
                who = self.file.read() or "another run"
                self.file.close()
                raise UserError(f"{who} is writing there: {self.path} is locked; wait until it "
                                f"ends, stop it, or choose another --out")
            # The holder before may have removed the file in between.
            is_the_one = (self.path.exists()
                          and os.path.samestat(os.stat(self.path), os.fstat(self.file.fileno())))
        with contextlib.suppress(OSError):   # a full disk holds no text, and the lock all the same
            self.file.truncate(0)
            os.write(self.file.fileno(), f"process {self.pid} on {platform.node()}".encode())

    def release(self):
        if self.file is None or self.file.closed or os.getpid() != self.pid:
            return
        with contextlib.suppress(OSError):   # Windows removes no open file
            self.path.unlink()
            if self.made:
                self.path.parent.rmdir()     # if nothing was written
        self.file.close()

    __del__ = release


def is_free(file):
    """Lock an open file for this process.  -> False if another process has locked it"""
    try:
        if fcntl:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        else:
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
    except (BlockingIOError, PermissionError):
        return False
    except OSError:                          # this disk knows no locks
        pass
    return True


STAGES = "vqkd", "pretrain", "finetune", "linprobe", "segment"
# What the commands of this project write into OUT.
OURS = re.compile(rf"({'|'.join(STAGES)})(_[a-z0-9]+)?\.(resume\.)?(pt|jsonl|png|features)"
                  r"(\.prev|\.tmp)?|bad_images\.txt|(tokens|features)\.npz")


def set_aside(stage, out):
    """--fresh: earlier results move to the first free name of OUT.1, OUT.2, ...

    A new tokenizer moves those of all stages, because they stand on it. A later stage moves only
    its own, because it needs the others. What this project did not write stays. UserError if
    another stage is just writing.
    """
    found = sorted(f for f in out.glob("*") if OURS.fullmatch(f.name))
    locks = []                               # held until all files are moved
    if stage == "vqkd":
        locks = [Lock(f) for f in out.glob("*.lock") if f.stem != stage and f.stem in STAGES]
    else:
        found = [f for f in found if f.name.startswith(f"{stage}.")]
    n = 1
    while Path(f"{out}.{n}").exists():
        n += 1
    aside = Path(f"{out}.{n}")
    try:
        for f in found:
            aside.mkdir(exist_ok=True)
            f.rename(aside / f.name)
    except OSError as error:
        raise UserError(f"--fresh cannot move {out} to {aside} ({error.strerror}): "
                        f"choose another --out") from error
    for lock in locks:
        lock.release()
    with contextlib.suppress(OSError):       # it holds other things
        out.rmdir()


# --- the log --------------------------------------------------------------------------------------
class Log:
    """STAGE.jsonl: one JSON line per call, written by rank 0. The first line describes the run.

    On resuming, lines of steps that the resume file does not know are removed, so that no step
    stands there twice. A run that begins at step 0 begins its log anew: what stood there is of a
    run that saved nothing. With `append` (measurements, which have no steps) all lines stay.
    """

    def __init__(self, path, args, process, start_step=0, append=False, **facts):
        self.path = Path(path)
        self.active = process.is_main
        self.begin = time.time()
        if not self.active:
            return
        lines = self.cut(start_step, append)
        place = where(process)
        if append or not lines:
            about = describe_run(self.path.stem, args) | processor() | place
            self(**about, python=platform.python_version(), **facts)
        else:
            self.compare(json.loads(lines[0]), facts, place, args)

    def cut(self, start_step, append):
        """Keep the lines that are still true.  -> those lines"""
        with self.writing():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            lines = []
            if self.path.exists():
                lines = self.path.read_text(encoding="utf-8").splitlines(keepends=True)
            whole = [line for line in lines if line.endswith("}\n")]         # a kill can cut a line
            if not append:
                whole = [x for x in whole if json.loads(x).get("step", -1) < start_step]
            if not append and start_step == 0:
                whole = []
            temporary = Path(f"{self.path}.tmp")             # a kill must not cost the log
            temporary.write_text("".join(whole), encoding="utf-8")
            os.replace(temporary, self.path)
        return whole

    def compare(self, first, facts, place, args):
        """UserError if the data changed since the run began; a note if the machine changed."""
        known = {name: value for name, value in rounded(facts).items() if name in first}
        known.pop("made_from", None)         # compared where the resume file was read
        changed = [f"{name} {first[name]} -> {value}" for name, value in known.items()
                   if first[name] != value]
        if changed:
            raise UserError(f"{args.data} is not what it was when this run began "
                            f"({', '.join(changed)}): restore it, or add --fresh")
        moved = [f"{name} {first.get(name)} -> {value}" for name, value in place.items()
                 if first.get(name) != value]
        if moved:
            print(f"note: the run goes on in another place ({', '.join(moved)}): its end will be "
                  f"close, not equal to the last bit, to that of a run without a break",
                  file=sys.stderr)

    @contextlib.contextmanager
    def writing(self):
        try:
            yield
        except OSError as error:
            raise UserError(f"cannot write {self.path} ({error.strerror}): free some space, or "
                            f"put the folder back if it was moved, or choose another --out; the "
                            f"last resume file is untouched") from error

    def __call__(self, **facts):
        if not self.active:
            return
        facts["time"] = time.time() - self.begin
        with self.writing(), open(self.path, "a", encoding="utf-8") as f:
            f.write(json.dumps(rounded(facts)) + "\n")


def where(process):
    """The place of a computation: on another one, the last bits of a result can differ."""
    return dict(machine=instructions(), device=str(process.device),
                threads=torch.get_num_threads(), processes=process.world_size,
                torch=str(torch.__version__))


def instructions():
    """For example x86_64 AVX2."""
    return f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"


def processor():
    """The machine: its CPU, how many cores, and its GPU if torch sees one."""
    cpu = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):       # only Linux has this file
        names = re.findall(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
        cpu = names[0] if names else cpu
    found = dict(machine=instructions(), cpu=cpu, cores=os.cpu_count())
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
    return found


def rounded(facts):
    """Floats with six decimals, as the log holds them."""
    return {name: round(value, 6) if isinstance(value, float) else value
            for name, value in facts.items()}
