"""results/gpu.md from the records of results.gpu.

    python -m results.make gpu_page          # reads results/gpu/*.jsonl, writes results/gpu.md

Every figure of the tables stands in a record. A part without a record is "not run yet".
"""
from results.tables import table

HEAD = """# On a GPU

The records in [gpu/](gpu) are made by `python -m results.gpu --out DIR`, one command of under
eight minutes, which anybody with a GPU can repeat; `python -m results.make gpu_page` makes this
page from them. The newest record of a kind counts. "Limit" is the rate of the MLP's first layer
alone, measured before and after each step; the datasheet is that of the H100.
"""


def with_first_lines(records):
    """Records without those of small sizes, each with what the first line of its file says."""
    found = []
    for record in records:
        if record["part"] == "begin":
            begin = record
        elif not begin.get("smoke"):
            found.append(record | {name: begin[name] for name in ("commit", "torch", "date")})
    return found


def newest(found, *keys):
    """The newest record for each combination of these keys, failed and skipped ones left out."""
    kept = {}
    for record in found:
        if "failed" not in record and "skipped" not in record:
            kept[tuple(record.get(key) for key in keys)] = record
    return list(kept.values())


def of(found, *parts):
    return [record for record in found if record["part"] in parts]


def machines(found):
    lines = ["| record | date | GPU | cores | torch | large bf16 products | source |",
             "|---|---|---|---|---|---|---|"]
    for r in newest(of(found, "card"), "file"):
        lines.append(f"| [{r['file']}](gpu/{r['file']}) | {r['date']} | {r['gpu']} | {r['cores']} "
                     f"| {r['torch']} | {r['bf16_tflops']:.0f} TFLOP/s | {r['commit'][:7]} |")
    return lines


def goldens(found):
    lines = ["| tensors of the authors' code | precision | outputs | gradients |",
             "|---|---|---|---|"]
    for r in newest(of(found, "goldens"), "name", "amp"):
        name = {"no": "float32, TF32 off", "bf16": "bf16"}[r["amp"]]
        lines.append(f"| {r['name']} | {name} | {r['forward']:.1e} | {r['gradient']:.1e} |")
    return lines


def steps(found):
    lines = ["| step | model | batch | compiled | images/s | TFLOP/s | share of limit | "
             "share of datasheet | GiB beside weights | record |",
             "|---|---|---|---|---|---|---|---|---|---|"]
    rows = newest(of(found, "base_steps", "more_steps", "compiled", "more_compiled"),
                  "stage", "model", "batch_size", "compile")
    order = ("model", "stage", "batch_size", "compile")
    for r in sorted(rows, key=lambda r: [str(r[key]) for key in order]):
        compiled = {False: "no", True: "yes"}.get(r["compile"], r["compile"])
        memory = f"{r['peak_mib'] / 1024:.1f}" if "peak_mib" in r else "-"
        lines.append(
            f"| {r['stage']} | {r['model']} | {r['batch_size']} | "
            f"{compiled} | {r['images_per_s']:.0f} | {r['tflops']:.1f} | "
            f"{r['share']:.1%} | {r.get('share_of_datasheet', 0):.1%} | {memory} | {r['file']} |")
    return lines


def attention(found):
    lines = ["| kernel | keys padded by | forward and backward, ms | takes most |",
             "|---|---|---|---|"]
    for r in newest(of(found, "attention"), "kernel", "padded"):
        cost = f"{r['ms']:.2f}" if "ms" in r else f"refuses: {r['refused']}"
        kernel = r.get("kernels", [""])[0] if r.get("kernels") else ""
        lines.append(f"| {r['kernel']} | {r['padded']} | {cost} | {kernel} |")
    return lines


def profile(found):
    lines = ["| kernel | calls | ms | share |", "|---|---|---|---|"]
    rows = [r for r in of(found, "profile") if "kernel" in r]
    last = rows[-1]["file"] if rows else ""
    for r in rows:
        if r["file"] == last:
            name = r["kernel"].replace("|", "/")
            lines.append(f"| `{name}` | {r['calls']} | {r['ms']:.1f} | {r['share']:.1%} |")
    return lines


def compiled_profile(found):
    lines = ["| kernel | calls | ms | share |", "|---|---|---|---|"]
    for record in newest(of(found, "compiled"), "stage"):
        for r in record.get("kernels", []):
            name = r["kernel"].replace("|", "/")
            lines.append(f"| `{name}` | {r['calls']} | {r['ms']:.1f} | {r['share']:.1%} |")
    return lines


def waits(found):
    lines = ["| stage | places that wait in four steps (file:line: times) |", "|---|---|"]
    for r in newest(of(found, "waits"), "stage"):
        places = ", ".join(f"{place}: {n}" for place, n in r["places"].items()) or "none"
        lines.append(f"| {r['stage']} | {places} |")
    return lines


def pipeline(found):
    lines = ["| command | seconds | result |", "|---|---|---|"]
    shown = ("cosine", "codes_used", "perplexity", "mask_acc", "guess_position", "top1",
             "paper_top1")
    for r in newest(of(found, "pipeline"), "script"):
        facts = ", ".join(f"{k} {r[k]:.4g}" for k in shown if k in r)
        lines.append(f"| `python {r['script']}` | {r['took']:.0f} | {facts} |")
    return lines


def others(found):
    """What is said in a line each."""
    lines = []
    for r in newest(of(found, "nccl"), "ddp", "command"):
        if "ddp" in r:
            lines.append(f"* DDP and SyncBatchNorm with one process: {r['ddp']}.")
    for r in newest(of(found, "same_seed_twice")):
        counted = "usage counts among them" if "of_counts" not in r else "without usage counts"
        lines.append(f"* The same seed twice, {r['steps']} steps of tiny's tokenizer: numbers in "
                     f"the file ({counted}) differ by up to {r['largest_difference']:.2g}, "
                     f"cosines to the teacher are {r['cosines'][0]:.4f} and "
                     f"{r['cosines'][1]:.4f}.")
    for r in newest(of(found, "loader"), "ends", "step_at_full_matrix_rate"):
        if "ends" not in r:
            lines.append(f"* A step of base pre-training at the full matrix rate would take "
                         f"{r['step_at_full_matrix_rate']:.0f} images/s from the loader.")
    for r in [r for r in of(found, "tests") if "ends" in r][-1:]:
        lines.append(f"* Quick tests on that machine: {r['ends']}")
    for i, r in enumerate(found):
        later = {x["part"] for x in found[i + 1:] if "failed" not in x and "skipped" not in x}
        if "failed" in r and r["part"] not in later | {"tests"}:
            lines.append(f"* {r['file']}: {r['part']} failed: {r['failed'][:160]}")
    return lines


SECTIONS = {
    "Machines": machines, "Number for number": goldens, "Steps": steps,
    "Attention with a position bias that learns (batch 128, 12 heads, 197 tokens, bf16)": attention,
    "A base pre-training step, batch 128, by kernel": profile,
    "The same with --compile": compiled_profile,
    "Does a step wait for the GPU?": waits, "Tiny from start to end": pipeline,
    "And": others}


FINDINGS = [  # where, finding, remedy, how sure
    ["`model.imagenet_normalize`", "copied two lists to the GPU at every call, and waited",
     "kept per device", "measured: no wait"],
    ["`vqkd.code_sums`", "`torch.bincount` reads its largest number back, and waits",
     "`index_add` of ones", "measured: no wait"],
    ["labels of finetune.py, segment.py", "copied with a wait", "`non_blocking`",
     "measured: no wait"],
    ["`Run.wrap`", "the network was compiled inside DDP, so that no gradient travelled before the "
     "last was there", "compiled around DDP", "by reading; one GPU shows no overlap"],
    ["`pretrain.train`", "`--compile` left out the tokenizer", "`encode` is compiled, too",
     "measured"],
    ["`model.position_bias`", "rows of odd length: the fused kernel copied them in every block, "
     "and compiled code stopped with an error", "padded rows; the added keys are hidden by -inf",
     "measured: table of attention"],
    ["attention", "with a bias that learns it takes the memory-efficient kernel", "none: cuDNN "
     "refuses it, and FlexAttention finds no configuration that fits on the chip", "measured"],
    ["`commonest_codes`", "a one-hot of all codes", "`scatter_add_`", "measured on a CPU"],
    ["`support/process.py`", "nccl began without `device_id`", "given",
     "measured: runs with one process"],
    ["tiny", "launches of kernels take longer than the kernels",
     "a larger `--batch-size`; `--compile`", "measured"],
    ["goldens", "TF32 is off for matrix products unless torch is told otherwise; cuDNN's "
     "convolution has it on", "goldens turn both off; training is bf16", "measured"],
]
CLOSING = """\
Why a compiled step of base stays under half of the datasheet's peak: matrix products of these sizes
do not reach that peak themselves ("limit"), attention with its bias takes a part, and GELU, norms,
residual sums and casts most of the rest, as the table of kernels shows.

In the table of waits, the place of vqkd is torch's own note that it now counts, and those of
segment lie in an evaluation, which fell into the four steps. Of the tests that failed on that
machine, most read README lines that were being rewritten that hour; the others are mended.

Not run: two GPUs, the compiled steps of other networks, `reduce-overhead`.
"""


def page(records):
    """The text of results/gpu.md."""
    found = with_first_lines(records)
    lines = [HEAD]
    for title, section in SECTIONS.items():
        rows = section(found)
        empty = len(rows) <= 2 and section is not others
        lines += [f"## {title}", "", *(["not run yet"] if empty or not rows else rows), ""]
    lines += ["## What was found, and what became of it", "",
              *table(["where", "finding", "remedy", "how sure"], FINDINGS), "", CLOSING]
    return "\n".join(lines)
