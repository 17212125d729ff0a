"""The file that fine-tuning or segmentation starts from: which one, is it fit, what was used of it.

    start_file       its name, as --init, --eval and --checkpoint say
    read_start       its contents, compared with the flags
    start_backbone   the network
    describe_start   one sentence for the screen
"""
from pathlib import Path

from model import PRESETS, ViT
from support import weights
from support.files import UserError


def start_file(args, stage):
    """The file to start from, or with --eval to measure; None for random weights.

    stage: how this stage calls its own file.
    """
    if args.init == "scratch" and not args.eval:
        if args.checkpoint:
            raise UserError(f"--init scratch starts from random weights: "
                            f"leave out --checkpoint {args.checkpoint}")
        return None
    name = "finetune_21k" if args.init == "21k" else "pretrain"
    if args.eval:
        name = stage
    folder = args.out or Path("runs") / args.model
    return args.checkpoint or folder / f"{name}.pt"


def read_start(args):
    """The file --checkpoint.  -> Checkpoint; None for random weights, or a dry run without the file

    UserError if the file is missing, of another kind, or of other sizes than the flags say.
    """
    path = args.checkpoint
    if path is None or (args.dry_run and not path.is_file()):
        return None
    classifier = args.eval or args.init == "21k"
    script = "finetune.py" if classifier else "pretrain.py"
    if path.stem == "finetune_21k":
        script += " --intermediate"
    command = f"python {script} --model {args.model} --out {path.parent}"
    checkpoint = weights.read(path, f"make it with {command}, or give --checkpoint FILE, ours or "
                                    f"released")
    refuse_other_sizes(args, checkpoint)
    if checkpoint.kind == "finetune" and not classifier:
        raise UserError(f"{path} is a classifier already: use --init 21k to go on from it")
    if checkpoint.kind != "finetune" and classifier:
        raise UserError(f"{path} is no classifier: use --init pretrain, or make one with "
                        f"python finetune.py")
    return checkpoint


def refuse_other_sizes(args, checkpoint):
    """UserError if --model or --patch-size differ from the file, or --image-size is needed."""
    path = checkpoint.name
    sizes = checkpoint.backbone
    width = PRESETS[args.model]["width"]
    if sizes["width"] != width:
        raise UserError(f"{path} has width {sizes['width']}, --model {args.model} has {width}: "
                        f"give the --model it was made with")
    if args.patch_size not in (None, sizes["patch_size"]):
        raise UserError(f"--patch-size {args.patch_size}: the weights in {path} have "
                        f"{sizes['patch_size']}; leave the flag out")
    if args.image_size is None and not isinstance(sizes["image_size"], int):
        raise UserError(f"{path} was trained on images of {sizes['image_size']}: choose one "
                        f"--image-size")


def start_backbone(args, checkpoint, **options):
    """-> ViT, Report of the names loaded.  checkpoint: from read_start

    None: random weights, and then the report is None, too. options: of ViT (pool, drop_path, ...).
    """
    if checkpoint is None:
        patch_size = args.patch_size or PRESETS[args.model]["patch_size"]
        sizes = PRESETS[args.model] | dict(image_size=args.image_size, patch_size=patch_size)
        return ViT(**sizes, **options), None
    model, _, report = weights.load_backbone(checkpoint, image_size=args.image_size, **options)
    return model, report


def describe_start(args, report):
    """Where the weights come from, and which parts start afresh or are not used."""
    if report is None:
        return "random weights"
    fresh = sorted({name.split(".")[0] for name in report.missing})
    unused = sorted({name.split(".")[0] for name in report.unexpected})
    return (f"weights from {args.checkpoint} ({len(report.loaded)} tensors; "
            f"fresh: {', '.join(fresh)}; unused: {', '.join(unused)})")
