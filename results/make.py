"""Every page, table and picture of results/, and the tables of the README, from the records.

    python -m results.make [PAGE ...]        # write them; trains nothing
    python -m results.make --check           # is all as its records say? exit code 1 if not

A page's module has page(records), the text of the whole page, and, if there are pictures,
PICTURES: {file: function(records, path) that draws it}.
"""
import importlib
from collections import namedtuple

from results.check import digest, drawn_from, faults, label, lacking, records_of
from results.tables import RESULTS
from support.args import Parser
from support.files import UserError
from support.process import launch

# One page: its file, its records, its pictures, and the command that makes the records.
Page = namedtuple("Page", "file records pictures command")
PAGES = {                                    # by the module in results/ that makes it
    "tiny": Page("README.md", ["tiny.jsonl"],
                 ["curves.png", "codes.png", "tokens.png", "prediction.png", "segment.png"],
                 "python -m results.tiny"),
    "health": Page("health.md", ["health.jsonl"], ["health.png"], "python -m results.health"),
    "factors": Page("factors.md", ["factors.jsonl"], ["factors.png"], "python -m results.factors"),
    "ablate": Page("ablations.md", ["ablations.jsonl"], [], "python -m results.ablate"),
    "mistakes": Page("mistakes.md", ["mistakes.jsonl"], ["mistakes.png"],
                     "python -m results.mistakes"),
    "speed": Page("speed.md", ["speed.jsonl"], [], "python -m results.speed"),
    "gpu_page": Page("gpu.md", ["gpu/*.jsonl"], [], "python -m results.gpu"),
    "kills": Page("kills.md", ["kills.jsonl"], [], "python -m results.kills"),
    "homework": Page("homework.md", ["homework.jsonl"], [], "python -m results.homework --write"),
    "mutations": Page("mutations.md", ["mutations.jsonl"], [], "python tests/mutate.py --write"),
    "readme": Page("../README.md", ["first-screen.jsonl", "tiny.jsonl"], [],
                   "python -m results.tiny, then python -m results.first_screen"),
}


def maker(name):
    return importlib.import_module(f"results.{name}")


def write(page, module, folder=RESULTS):
    """The page and its pictures. UserError if records are missing"""
    records = records_of(page, folder)
    lacks = lacking(records)
    if lacks:
        raise UserError(f"{lacks}; {page.command} makes them anew")
    text = module.page(records)
    for name in page.pictures:
        draw(folder / name, module.PICTURES[name], records)
    (folder / page.file).write_text(text, encoding="utf-8")


def draw(path, function, records):
    """A picture, with the digest of its records among the texts of the PNG, if it is not there."""
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo
    if drawn_from(path) == digest(records):
        return
    function(records, path)
    info = PngInfo()
    info.add_text("records", digest(records))
    with Image.open(path) as image:
        image.load()
        image.save(path, pnginfo=info, optimize=True)


def main(argv=None):
    p = Parser(__doc__)
    p.add_argument("pages", nargs="*", metavar="PAGE", help=f"of {', '.join(PAGES)}; default: all")
    p.add_argument("--check", action="store_true", help="write nothing, name what is wrong")
    args = p.parse_args(argv)
    unknown = set(args.pages) - set(PAGES)
    if unknown:
        raise UserError(f"there is no page {min(unknown)}: choose of {', '.join(PAGES)}")
    if args.check:
        found, note = faults(PAGES, RESULTS, maker)
        print("\n".join([*found, note]).strip() or "all as the records say")
    else:
        found = []
        for name in args.pages or PAGES:
            try:
                write(PAGES[name], maker(name))
            except UserError as error:
                found.append(f"{label(PAGES[name].file)} is not made: {error}")
        print("\n".join(found))
    if found:
        raise SystemExit(1)


if __name__ == "__main__":
    launch(main)
