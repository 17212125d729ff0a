"""The README's first commands, timed as a newcomer would see them: alone, on all cores.

    python -m results.first_screen           # ten minutes of a machine with nothing else to do
"""
import functools

from results.runs import find, study
from results.tables import made_on, table
from results.tiny import FINETUNE_RATES, SEEDS, SEGMENT_RATES, best_scratch, over_seeds
from support.process import launch

COMMANDS = ["python vqkd.py", "python pretrain.py", "python linprobe.py",
            "python finetune.py --labels-per-class 100", "python segment.py"]


def screen(records):
    """Lines of the README: command, time, result over three seeds, what stands beside it."""
    of = functools.partial(over_seeds, records)

    def scratch(stage, key, rates):
        return of(best_scratch(records, stage, key, rates), stage, key)

    def probed(key, source):
        few = find(records, "hog-0", "linprobe")["args"]["labels_per_class"]
        return (f"{of('hog', 'linprobe', key, source)} (from {few} labels a class "
                f"{of('hog', 'linprobe', f'{key}_{few}', source)})")
    stages = [
        ("vqkd", "images -> `vqkd.pt`",
         f"{of('hog', 'vqkd', 'codes_used')} of {find(records, 'hog-0', 'vqkd')['args']['codes']} "
         f"codes in use, perplexity {of('hog', 'vqkd', 'perplexity')}, cosine to the teacher "
         f"{of('hog', 'vqkd', 'cosine', digits=3)}", ""),
        ("pretrain", "`vqkd.pt` -> `pretrain.pt`",
         f"{of('hog', 'pretrain', 'mask_acc')} % of the hidden patches named right",
         f"guessers: {of('hog', 'pretrain', 'guess_position')}, "
         f"{of('hog', 'pretrain', 'guess_nearest')}"),
        ("linprobe", "`pretrain.pt` -> `linprobe.pt`",
         f"top-1 in %: {probed('top1', 'pretrain')}", f"raw pixels, nearest image: "
         f"{probed('knn1', 'pixels')}; untrained: {probed('top1', 'random')}; tokenizer: "
         f"{probed('top1', 'tokenizer')}"),
        ("finetune", "`pretrain.pt` -> `finetune.pt`",
         f"{of('hog', 'finetune', 'top1')} % top-1",
         f"scratch: {scratch('finetune', 'top1', FINETUNE_RATES)}"),
        ("segment", "`pretrain.pt` -> `segment.pt`", f"{of('hog', 'segment', 'miou')} % mIoU",
         f"scratch: {scratch('segment', 'miou', SEGMENT_RATES)}")]
    rows = []
    for stage, files, result, beside in stages:
        once = find(records, "tiny", stage)
        rows.append([f"`{once['command']}`", files, f"{once['seconds']:.0f} s", result, beside])
    alone = [x for x in records if x["run"] == "tiny"]
    return [*table(["command", "reads -> writes", "time", "result", "beside it"], rows), "",
            f"Times: one run of these commands, alone. {made_on(alone)} Results: mean ± standard "
            f"error of seeds {', '.join(map(str, SEEDS))}; scratch: the best of three rates "
            f"([all runs](results/README.md))."]


def main(argv=None):
    study("first_screen", __doc__, COMMANDS, jobs=1, threads=None, argv=argv)


if __name__ == "__main__":
    launch(main)
