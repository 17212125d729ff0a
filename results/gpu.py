"""What this project does on a GPU: one command, a record a part.

    python -m results.gpu --out DIR          # under eight minutes on an H100; DIR/gpu.jsonl
    python -m results.gpu --smoke            # the same code at small sizes, on a CPU

The most important part comes first. Each part is kept as soon as it is done. A part that fails
leaves its error in the record, and the others go on. The tensors of the authors' code are compared
only if BEIT2_GOLDEN names their folder; CLIP's tower runs only if open_clip is installed.

Read in this order: PARTS, then the parts.
"""
import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import pretrain
import vqkd
from extras.bench import Clock, Contestant, compare, matrix_rate, peak_memory
from extras.operations import operations, sizes
from extras.steps import STEPS, timm_step
from model import ViT
from results import tables
from results.runs import figures
from results.tables import RESULTS, ROOT, read_lines
from support.files import read_file
from support.process import Process, join_processes, launch, seed_all

DATASHEET = 989e12       # dense bf16 operations a second of an H100 or H200 (SXM)
SHORT = ["--continuous-steps", 1]            # stage 1 with its quantizer in a few steps


# --- the card and the numbers ---------------------------------------------------------------------
def card(args, device):
    """Which machine this is, and how fast its largest matrix products are."""
    facts = dict(gpu="none", cores=os.cpu_count(), python=sys.version.split()[0],
                 torchs_cuda=torch.version.cuda)
    if device.type == "cuda":
        facts |= dict(gpu=torch.cuda.get_device_name(device),
                      memory_gib=torch.cuda.get_device_properties(device).total_memory / 2**30,
                      tf32_matmul=torch.backends.cuda.matmul.allow_tf32,
                      tf32_cudnn=torch.backends.cudnn.allow_tf32)
    side = 512 if args.smoke else 8192
    a = torch.randn(side, side, device=device, dtype=torch.bfloat16)
    for _ in range(3):
        a @ a
    clock = Clock("wall", device)
    for _ in range(10):
        a @ a
    clock("products")
    yield facts | dict(bf16_tflops=10 * 2 * side**3 / clock.parts()["products"] / 1e12)


def goldens(args, device):
    """Outputs and gradients beside the authors' tensors: largest |a - b| / max |b| of each file."""
    folder = os.environ.get("BEIT2_GOLDEN")
    if not folder:
        yield dict(skipped="BEIT2_GOLDEN is not set")
        return
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    for amp in ("no", "bf16"):
        for name, compare_file in GOLDENS.items():
            g = torch.load(Path(folder) / f"{name}.pt", weights_only=True, map_location=device)
            forward, gradient = compare_file(g, Process(device=device, amp=amp))
            yield dict(name=name, amp=amp, forward=max(forward), gradient=max(gradient))


def relative(ours, theirs):
    return ((ours.double() - theirs.double()).abs().max() / theirs.double().abs().max()).item()


def filled(model, g, device):
    state = {name: tensor for name, tensor in g["state_dict"].items()
             if not name.endswith("relative_position_index")}
    own = model.state_dict()
    model.load_state_dict({name: t for name, t in state.items() if name in own})
    return model.to(device)


def gradients(model, g):
    ours = dict(model.named_parameters())
    return [relative(ours[name].grad, grad) for name, grad in g["grads"].items()]


def golden_classifier(g, run):
    c = g["config"]
    model = filled(ViT(c["img_size"], c["patch_size"], c["embed_dim"], c["depth"], c["num_heads"],
                       mlp_ratio=c["mlp_ratio"], layer_scale=c["init_values"],
                       num_classes=c["num_classes"]), g, run.device)
    with run.autocast():
        outputs = model.features(g["images"])
        logits = model(g["images"])
    F.cross_entropy(logits.float(), g["labels"]).backward()
    pairs = [*zip(outputs, g["block_outputs"], strict=True), (logits, g["logits"])]
    return [relative(a, b) for a, b in pairs], gradients(model, g)


def golden_mim(g, run):
    c = g["config"]
    model = filled(pretrain.BEiT(
        c["img_size"], c["patch_size"], c["embed_dim"], c["depth"], c["num_heads"], c["vocab_size"],
        layer_scale=c["init_values"], early_layer=c["early_layers"], head_depth=c["head_layers"],
        shared_head=bool(c["shared_lm_head"]), mlp_ratio=c["mlp_ratio"]), g, run.device)
    mask = g["bool_masked_pos"]
    with run.autocast():
        logits, logits_cls = model(g["images"], mask)
        loss, _ = pretrain.mim_loss(logits, logits_cls, g["token_ids"][mask])
    loss.backward()
    forward = [relative(logits, g["logits_1"]), relative(logits_cls, g["logits_2"])]
    return forward, gradients(model, g)


def golden_tokenizer(g, run):
    c = g["config"]
    model = filled(vqkd.VQKD(
        c["img_size"], c["patch_size"], c["embed_dim"], c["enc_depth"], c["num_heads"],
        c["dec_depth"], c["n_embed"], c["code_dim"], (c["decoder_out_dim"],),
        mlp_ratio=c["mlp_ratio"]), g, run.device)
    with run.autocast():
        o, h, v, z = model(g["images"])
        loss, _ = vqkd.vqkd_loss(o, g["target"], h, v, c["beta"])
    loss.backward()
    other_codes = (z != g["token_ids"]).float().mean().item()
    return [relative(o, g["reconstruction"]), other_codes], gradients(model, g)


GOLDENS = dict(encoder_forward=golden_classifier, mim_forward=golden_mim,
               mim_forward_separate_head=golden_mim, vqkd_encode_decode=golden_tokenizer)


# --- speed ----------------------------------------------------------------------------------------
def settings(model, batch_size, compiled=False, checkpoint=False):
    return SimpleNamespace(model=model, batch_size=batch_size, compile=compiled, repeats=5,
                           checkpoint_activations=checkpoint, clock="wall")


def step_record(stage, model, batch_size, device, compiled=False, kernels=False):
    """One stage's step: images/s, operations, share of the matrix rate, memory, GPU kernels."""
    args = settings(model, batch_size, compiled)
    c = sizes(model)
    kind = stage.removeprefix("timm ")
    if stage.startswith("timm"):
        def make(c, args, device):
            return timm_step(kind, c, args, device)
    else:
        make = STEPS[stage]
    counted_as = "finetune" if stage.startswith("timm") else stage
    ops = sum(operations(counted_as, c).values())
    begun = time.time()
    step = make(c, args, device)
    contestant = Contestant(step, "bf16", False, ops)
    facts = compare({stage: contestant}, c, args, device)[stage]
    facts["tflops"] = facts["images_per_s"] * ops / 1e12
    if device.type == "cuda":
        facts["share_of_datasheet"] = facts["images_per_s"] * ops / DATASHEET
        if not compiled:                     # compiling once more would take a minute
            facts["peak_mib"] = peak_memory(make, c, args, "bf16", False, device)
        if kernels:
            facts["kernels"] = list(kernels_of(step, Process(device=device, amp="bf16")))
    return dict(stage=stage, model=model, batch_size=batch_size, compile=compiled, **facts,
                took=time.time() - begun)


def base_steps(args, device):
    """The steps that a training run consists of, at the paper's sizes."""
    model, batches = ("tiny", [8]) if args.smoke else ("base", [128, 256])
    for batch_size in batches:
        yield step_record("pretrain", model, batch_size, device)
    yield step_record("timm BEiT", model, batches[0], device)
    yield step_record("timm ViT", model, batches[0], device)
    yield step_record("finetune", model, batches[0], device)


def compiled_step(args, device):
    """The same with --compile, which takes a minute or two to begin."""
    model, batch_size = ("tiny", 8) if args.smoke else ("base", 128)
    yield step_record("pretrain", model, batch_size, device, compiled=True, kernels=True)


def more_compiled(args, device):
    """Other networks compiled; and tiny, where starting the kernels takes longer than they do."""
    if args.smoke:
        yield dict(skipped="compiled before")
        return
    yield step_record("pretrain", "tiny", 32, device, compiled="reduce-overhead")
    yield step_record("pretrain", "tiny", 32, device, compiled=True)
    yield step_record("finetune", "base", 128, device, compiled=True)
    yield step_record("timm BEiT", "base", 128, device, compiled=True)


def more_steps(args, device):
    """Tokenizer (with CLIP's tower, if open_clip is here) and the large backbone."""
    model, batch_size = ("tiny", 8) if args.smoke else ("base", 64)
    if importlib.util.find_spec("open_clip"):
        yield step_record("vqkd", model, batch_size, device)
    else:
        yield dict(stage="vqkd", skipped="open_clip is not installed")
    if not args.smoke:
        yield step_record("pretrain", "large", 64, device)
        yield step_record("pretrain", "tiny", 32, device)


def attention(args, device):
    """Which kernel takes attention with a position bias that learns, and what each one costs."""
    B, H, T, d = (2, 2, 17, 16) if args.smoke else (128, 12, 197, 64)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    q, k, v = (torch.randn(B, H, T, d, device=device, dtype=dtype, requires_grad=True)
               for _ in range(3))
    for padded in (0, -T % 8):
        bias = torch.randn(1, H, T, T + padded, device=device, requires_grad=True)
        for kernel in ("default", "EFFICIENT_ATTENTION", "CUDNN_ATTENTION", "MATH"):
            yield dict(kernel=kernel, padded=padded, **time_attention(kernel, q, k, v, bias))
    yield dict(kernel="FlexAttention", padded=0, **time_flex(q, k, v, bias[..., :T]))


def time_attention(kernel, q, k, v, bias):
    """-> milliseconds of forward and backward, names of the GPU's kernels; or why it refused"""
    def once():
        mask = bias.to(q.dtype)[..., :k.shape[2]].expand(len(q), -1, -1, -1)
        F.scaled_dot_product_attention(q, k, v, attn_mask=mask).sum().backward()
    backends = list(SDPBackend.__members__.values())
    if kernel == "default":
        chosen = [b for b in backends if b != SDPBackend.ERROR]
    else:
        chosen = [SDPBackend.__members__[kernel]]
    with sdpa_kernel(chosen):
        return time_once(once, q.device)


def time_flex(q, k, v, bias):
    """The same as a program that torch compiles: the bias is read where it is added."""
    from torch.nn.attention.flex_attention import flex_attention
    bias = bias[0].detach().contiguous().requires_grad_()

    def add_bias(score, b, h, i, j):
        return score + bias[h, i, j]

    flex = torch.compile(flex_attention)

    def once():
        flex(q, k, v, score_mod=add_bias).sum().backward()
    return time_once(once, q.device)


def time_once(once, device):
    """-> milliseconds, kernels; or why it was refused"""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            for _ in range(3):
                once()
            clock = Clock("wall", device)
            for _ in range(10):
                once()
            clock("attention")
            return dict(ms=100 * clock.parts()["attention"], kernels=kernel_names(once))
        except Exception as error:           # what torch raises has many classes
            return dict(refused=" ".join(str(error).split())[:120])


def kernel_names(once):
    """The GPU kernels of one call that take the most time."""
    if not torch.cuda.is_available():
        return []
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        once()
    events = sorted(profile.key_averages(), key=lambda e: -e.self_device_time_total)
    return [f"{event.key[:60]} {event.self_device_time_total:.0f} us" for event in events[:4]]


def profile_step(args, device):
    """Where the time of a base pre-training step goes: the kernels that take the most."""
    if device.type != "cuda":
        yield dict(skipped="no GPU")
        return
    options = settings("base", 128)
    step = STEPS["pretrain"](sizes("base"), options, device)
    run = Process(device=device, amp="bf16")
    for _ in range(3):
        step(run, lambda part: None)
    yield from kernels_of(step, run)


def kernels_of(step, run):
    """The GPU kernels of one step that take the most time, one after the other."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        step(run, lambda part: None)
        torch.cuda.synchronize()
    events = sorted(profile.key_averages(), key=lambda e: -e.self_device_time_total)
    total = sum(event.self_device_time_total for event in events)
    for event in events[:16]:
        yield dict(kernel=event.key[:90], calls=event.count, ms=event.self_device_time_total / 1e3,
                   share=event.self_device_time_total / total)


# --- whole commands -------------------------------------------------------------------------------
def waits(args, device):
    """Places where a step that is no log step waits for the GPU, in each training loop."""
    if device.type != "cuda":
        yield dict(skipped="no GPU")
        return
    import finetune
    import segment
    short = ["--limit", "256", "--batch-size", "32", "--log-every", "1000", "--workers", "2"]
    with tempfile.TemporaryDirectory() as out:
        for stage in (vqkd, pretrain, finetune, segment):
            flags = [*short, "--steps", "8", "--out", out]
            flags += ["--continuous-steps", "1"] if stage is vqkd else []
            found = count_waits(stage, flags)
            yield dict(stage=stage.__name__, places=found)


def count_waits(stage, flags):
    """-> {file:line: times} of waits between the third and the sixth step."""
    seen = {}
    steps = stage.Run.steps

    def watched(run):
        for step in steps(run):
            torch.cuda.set_sync_debug_mode("warn" if 2 <= step <= 5 else "default")
            yield step
        torch.cuda.set_sync_debug_mode("default")

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        stage.Run.steps = watched
        try:
            stage.main(flags)
        finally:
            stage.Run.steps = steps
            torch.cuda.set_sync_debug_mode("default")
    for warning in caught:
        if "called a synchronizing" in str(warning.message):
            place = f"{Path(warning.filename).name}:{warning.lineno}"
            seen[place] = seen.get(place, 0) + 1
    return seen


def command(*words, **environment):
    """-> (seconds, last line of the output) of a command in the project's folder."""
    begun = time.time()
    done = subprocess.run([sys.executable, *map(str, words)], cwd=ROOT, text=True,
                          capture_output=True, env=os.environ | environment)
    text = (done.stdout.strip() or done.stderr.strip()).splitlines() or [""]
    if done.returncode:
        raise RuntimeError(f"{' '.join(map(str, words))}: {done.stderr[-1500:]}")
    return time.time() - begun, text[-1]


def pipeline(args, device):
    """Tokenizer, pre-training and probe of tiny, as a user runs them."""
    with tempfile.TemporaryDirectory() as out:
        for script in ("vqkd.py", "pretrain.py", "linprobe.py"):
            flags = ["--limit", 256, "--steps", 4] if args.smoke else []
            flags += SHORT if args.smoke and script == "vqkd.py" else []
            seconds, _ = command(script, "--out", out, *flags)
            log = read_lines(Path(out) / script.replace(".py", ".jsonl"))
            # The first summary is of the network; raw pixels follow.
            summary = figures(next(x for x in log if x.get("summary")))
            kept = {k: v for k, v in summary.items() if isinstance(v, int | float)}
            yield dict(script=script, took=seconds, **kept)


def same_seed_twice(args, device):
    """Largest difference after equal commands: a GPU is close, not equal.

    Weights and usage counts apart: one vector that takes another code changes a count by one.
    """
    steps = 4 if args.smoke else 60
    flags = [*SHORT, "--limit", 2048, "--steps", steps, "--seed", 3]
    with tempfile.TemporaryDirectory() as folder:
        files = []
        for name in ("one", "two"):
            out = Path(folder) / name
            command("vqkd.py", "--out", out, *flags)
            files.append(read_file(out / "vqkd.pt"))
        one, two = (file["model"] for file in files)
        gaps = {k: (one[k].float() - two[k].float()).abs().max().item() for k in one}
        of_counts = gaps.pop("quantize.cluster_size")
        yield dict(steps=steps, largest_difference=max(gaps.values()), of_counts=of_counts,
                   cosines=[file["result"]["cosine"] for file in files])


def nccl(args, device):
    """One process of torchrun: DDP, compiled around it, and synchronised BatchNorm."""
    code = """
import os, torch, torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
backend = "nccl" if torch.cuda.is_available() else "gloo"
device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
dist.init_process_group(backend, device_id=device if device.type == "cuda" else None)
net = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8)).to(device)
if device.type == "cuda":
    net = torch.nn.SyncBatchNorm.convert_sync_batchnorm(net)
ddp = DistributedDataParallel(net, device_ids=[0] if device.type == "cuda" else None)
ddp(torch.randn(4, 3, 8, 8, device=device)).square().mean().backward()
print(backend, float(sum(p.grad.abs().sum() for p in net.parameters())) > 0)
dist.destroy_process_group()
"""
    with tempfile.TemporaryDirectory() as folder:
        script = Path(folder) / "ddp.py"
        script.write_text(code)
        _, text = command("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=1",
                          script)
        yield dict(ddp=text)
        flags = [*SHORT, "--limit", 64, "--steps", 4, "--out", Path(folder) / "run"]
        seconds, text = command("-m", "torch.distributed.run", "--standalone",
                                "--nproc-per-node=1", "vqkd.py", *flags)
        yield dict(command="torchrun --nproc-per-node=1 vqkd.py", seconds=seconds, ends=text[:200])


def loader(args, device):
    """What the loader of pre-training gives a second on a core, of ordinary JPEGs."""
    _, text = command("-m", "extras.bench", "--stage", "loader", "--model",
                      "tiny" if args.smoke else "base", "--device", "cpu", "--threads", 1)
    yield dict(ends=text[:300])
    c = sizes("tiny" if args.smoke else "base")
    rate = matrix_rate(c, settings(c.preset, 8 if args.smoke else 128), device, "bf16")
    yield dict(step_at_full_matrix_rate=rate / sum(operations("pretrain", c).values()))


def tests(args, device):
    """The quick tests, on this machine."""
    if args.smoke:
        yield dict(skipped="they run this")
        return
    words = ["-m", "pytest", "-q", "-m", "not slow", "-p", "no:cacheprovider"]
    done = subprocess.run([sys.executable, *words, "-n", "12"], cwd=ROOT, text=True, timeout=240,
                          capture_output=True, env=os.environ | dict(OMP_NUM_THREADS="1"))
    lines = done.stdout.strip().splitlines()
    failed = [line[:160] for line in lines if line.startswith(("FAILED", "ERROR"))]
    yield dict(ends=lines[-1] if lines else done.stderr[-300:], failed=failed[:40])


PARTS = dict(card=card, goldens=goldens, base_steps=base_steps, compiled=compiled_step,
             attention=attention, waits=waits, more_steps=more_steps, nccl=nccl,
             same_seed_twice=same_seed_twice, profile=profile_step, pipeline=pipeline,
             loader=loader, more_compiled=more_compiled, tests=tests)


# --- the command ----------------------------------------------------------------------------------
def measure(args):
    """Run the parts one after the other; each record is a line of OUT/gpu.jsonl at once."""
    process = join_processes(args.device)
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / "gpu.jsonl"
    begun = time.time()

    def tell(**facts):
        line = json.dumps(facts | dict(at=round(time.time() - begun, 1)))
        with open(path, "a") as f:
            f.write(line + "\n")
        print(line[:600], flush=True)

    tell(part="begin", **tables.about("python -m results.gpu", amp="bf16"), parts=args.parts,
         smoke=args.smoke, date=time.strftime("%Y-%m-%d"))
    for name in args.parts or PARTS:
        if time.time() - begun > 60 * args.minutes:
            tell(part=name, skipped="no time left")
            continue
        seed_all(0)
        try:
            for record in PARTS[name](args, process.device):
                tell(part=name, **record)
        except Exception as error:           # one part that fails must not cost the others
            place = traceback.format_exc().strip().splitlines()[-3:]
            tell(part=name, failed=f"{type(error).__name__}: {error}"[:1500], place=place)
        if process.device.type == "cuda":
            torch.cuda.empty_cache()


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--out", type=Path, default=RESULTS / "gpu", help="folder of the records")
    p.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    p.add_argument("--smoke", action="store_true", help="small sizes, for a test on a CPU")
    p.add_argument("--parts", nargs="+", choices=list(PARTS), help="only these; default: all")
    p.add_argument("--minutes", type=float, default=8, help="begin no part later than this")
    args = p.parse_args(argv)
    measure(args)


if __name__ == "__main__":
    launch(main)
