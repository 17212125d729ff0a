"""Files on disk: checkpoints that are whole or not there, what a run says of itself, its log. Knows no model.

    write_file, read_file    torch.save under another name, then a rename; a checksum that every reader verifies
    describe_run, Log        arguments, commit and hashes of the sources; one JSON line per call
"""
import argparse
import contextlib
import hashlib
import json
import os
import pickle
import platform
import shlex
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent



class UserError(Exception):
    """A mistake the user can mend: one sentence that names the thing and the remedy. engine.run exits 2 with it."""


def tensors(contents, place=""):
    """Every tensor inside nested dicts, lists and tuples, with its place: ("model.norm.weight", tensor), ..."""
    if isinstance(contents, torch.Tensor):
        yield place, contents
    elif isinstance(contents, (dict, list, tuple)):
        pairs = contents.items() if isinstance(contents, dict) else enumerate(contents)
        for key, value in pairs:
            yield from tensors(value, f"{place}.{key}" if place else str(key))


def checksum(contents):
    """SHA-256 over place, kind, shape and bytes of every tensor: torch.load itself would not notice a flipped bit."""
    digest = hashlib.sha256()
    for place, t in tensors(contents):
        digest.update(f"{place} {t.dtype} {tuple(t.shape)}\n".encode())
        digest.update(t.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def write_file(path, contents, previous=None):
    """torch.save to a temporary name beside `path`, flush to disk, then rename: a reader never sees half a file, and
    what was there stays until the new file is complete (under the name `previous`, where one is given)."""
    path, temporary = Path(path), Path(f"{path}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as f:
            # A file of tensors alone, as timm reads it, has no room for one.
            bare = all(isinstance(v, torch.Tensor) for v in contents.values())
            torch.save(contents if bare else contents | dict(checksum=checksum(contents)), f)
            f.flush()
            os.fsync(f.fileno())
        if previous and path.exists():
            os.replace(path, previous)
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:
        if temporary.is_file():
            temporary.unlink()
        raise UserError(f"could not write {path} ({' '.join(str(error).split())}): free some space or choose another "
                        f"--out; the file that was there before is untouched") from error


def read_file(path, kind=None, remedy=""):
    """Load a checkpoint on the CPU without running any code in it; UserError for what is none, or not what was written.
    An argparse.Namespace, which released files hold, is harmless and allowed; any other object is refused."""
    if not Path(path).is_file():
        raise UserError(f"there is no file {path}" + (f"; {remedy}" if remedy else ""))
    size = os.path.getsize(path)
    try:
        # torch.save does not compress. A file that states more bytes than it has would fill the memory (a zip bomb).
        if zipfile.is_zipfile(path) and sum(part.file_size for part in zipfile.ZipFile(path).infolist()) > size:
            raise UserError(f"{path} unpacks to more than it holds, which no checkpoint does: not loaded")
        with torch.serialization.safe_globals([argparse.Namespace]):
            contents = torch.load(path, map_location="cpu", weights_only=True)
        found = list(tensors(contents))
    except UserError:
        raise
    except pickle.UnpicklingError as error:
        raise UserError(f"{path} holds objects other than tensors and numbers, or is damaged: not loaded") from error
    except Exception as error:               # a damaged file raises whatever its reader stumbles over
        raise UserError(f"{path} is truncated or no checkpoint at all: make or fetch it anew") from error
    if not isinstance(contents, dict):
        raise UserError(f"{path} holds a {type(contents).__name__}, not a checkpoint")
    odd = [place for place, t in found if t.layout != torch.strided or t.device.type != "cpu" or t.is_quantized]
    if odd or sum(t.numel() * t.element_size() for _, t in found) > 4 * size + 2**20:        # 4: weights may be shared
        what = f"a tensor of an odd kind ({odd[0]})" if odd else "tensors"
        raise UserError(f"{path} holds {what} without the numbers that it would fill: not loaded")
    if "checksum" in contents and contents["checksum"] != checksum(contents):
        raise UserError(f"{path} is damaged (its tensors do not give its checksum): take an earlier copy, or make it "
                        f"anew")
    if kind is not None and contents.get("kind") != kind:
        raise UserError(f"{path} is a {contents.get('kind', 'foreign')!r} file where a {kind!r} file is needed")
    return contents


def describe_run(kind, args):
    """What every file says about itself, beside its weights: arguments, commit, and a hash of each source file."""
    status, commit = subprocess.getstatusoutput(f"git -C {shlex.quote(str(ROOT))} rev-parse HEAD")
    return dict(kind=kind, preset=args.model, data=str(args.data), image_size=args.image_size, args=plain_args(args),
                commit="unknown" if status else commit, torch=str(torch.__version__), source_hash={
                    f.name: hashlib.sha256(f.read_bytes()).hexdigest()[:12] for f in [*sorted(ROOT.glob("*.py")), *sorted(ROOT.glob("support/*.py"))]})


def plain_args(args):
    return {k: str(v) if isinstance(v, Path) else list(v) if isinstance(v, tuple) else v for k, v in vars(args).items()}


def set_aside(stage, out):
    """--fresh: earlier results move to OUT.1 (or .2 ...). With the tokenizer goes the whole folder, which stands on it;
    a later stage moves only its own files, for it needs the others."""
    aside = Path(next(f"{out}.{n}" for n in range(1, 10**6) if not Path(f"{out}.{n}").exists()))
    if stage == "vqkd" and out.exists():
        out.rename(aside)
    for f in sorted(out.glob(f"{stage}.*")):
        aside.mkdir(exist_ok=True)
        f.rename(aside / f.name)


class Log:
    """One JSON line per call on rank 0, appended to STAGE.jsonl; the first line says what the run is. On resuming,
    lines of steps that the resume file does not know are cut off, so that no step stands there twice. With `append`
    (measurements, which are no runs) all lines stay, and another first line follows them."""

    def __init__(self, path, args, process, start_step=0, append=False, **facts):
        self.path, self.active, self.begin = Path(path), process.rank == 0, time.time()
        if not self.active:
            return
        place = dict(machine=f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}",
                     device=str(process.device),
                     threads=torch.get_num_threads(), processes=process.world_size, torch=str(torch.__version__))
        with self.writing():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            lines = self.path.read_text().splitlines(keepends=True) if self.path.exists() else []
            lines = [x for x in lines if x.endswith("}\n") and (
                append or start_step and json.loads(x).get("step", -1) < start_step)]
            temporary = Path(f"{self.path}.tmp")             # a kill between two lines must not cost the log
            temporary.write_text("".join(lines))
            os.replace(temporary, self.path)
        if append or not lines:
            self(**describe_run(self.path.stem, args) | place, python=platform.python_version(), cores=os.cpu_count(),
                 **facts)
            return
        first = json.loads(lines[0])
        if changed := [f"{k} {first[k]} -> {v}" for k, v in facts.items() if k in first and first[k] != round(v, 6)]:
            raise UserError(f"{args.data} is not what it was when this run began ({', '.join(changed)}): restore it, "
                            f"or add --fresh")
        if moved := ", ".join(f"{k} {first.get(k)} -> {v}" for k, v in place.items() if first.get(k) != v):
            print(f"note: the run goes on in another place ({moved}): its end will be close, not equal to the last "
                  f"bit, to that of a run without a break", file=sys.stderr)

    @contextlib.contextmanager
    def writing(self):
        try:
            yield
        except OSError as error:
            raise UserError(f"cannot write {self.path} ({error.strerror}): free some space, or put the folder back if "
                            f"it was moved, or choose another --out; the last resume file is untouched") from error

    def __call__(self, **facts):
        if self.active:
            facts = {k: round(v, 6) if isinstance(v, float) else v for k, v in facts.items()}
            with self.writing(), open(self.path, "a") as f:
                f.write(json.dumps(facts | dict(time=round(time.time() - self.begin, 2))) + "\n")
