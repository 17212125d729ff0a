"""The tables of results/health.md, from the logs of results/health.sh.

What did perplexity do, and which run was warned when?

    python -m results.health            # reads runs/*/vqkd.jsonl, writes results/health.md
"""
import re

from results.tables import RESULTS, RUNS, read_lines, write_below

HEADER = ("| run | first step with codes | best | lowest of a step | lowest share of the best "
          "until then | warned | used, held-out set | perplexity, held-out set | share of K | "
          "cosine | commit |")
MARKER = "<!-- resized -->"


def row(path):
    """One line of the table for one run."""
    lines = read_lines(path)
    name = path.parent.name
    summary = next((x for x in lines if "summary" in x), None)
    if summary is None:
        return f"| {name} | not finished" + " |" * 10
    codes = lines[0]["args"]["codes"]
    steps = [x for x in lines if "perplexity" in x and x.get("split") != "val" and "loss" in x]
    best = steps[0]["perplexity"]
    fall = 1.0                               # lowest share of the best value until then
    for x in steps:
        best = max(best, x["perplexity"])
        fall = min(fall, x["perplexity"] / best)
    lowest = min(steps, key=lambda x: x["perplexity"])
    cells = [
        name, steps[0]["step"], f"{best:.1f}",
        f"{lowest['perplexity']:.1f} (step {lowest['step']})", f"{100 * fall:.0f} %",
        first_warning(lines, steps, codes), f"{summary['codes_used']} of {codes}",
        f"{summary['perplexity']:.1f}", f"{100 * summary['perplexity'] / codes:.0f} %",
        f"{summary['cosine']:.3f}", lines[0]["commit"][:7]]
    return "| " + " | ".join(map(str, cells)) + " |"


def first_warning(lines, steps, codes):
    warned = [x["step"] for x in lines if "warning" in x]
    if not warned:
        return "never"
    perplexity = {x["step"]: x["perplexity"] for x in steps}[warned[0]]
    share = 100 * perplexity / codes
    return f"step {warned[0]}, at perplexity {perplexity:.1f} = {share:.0f} % of K"


def resized_rows():
    """What growing or shrinking a finished codebook did: before and after one epoch more."""
    rows = []
    for codes in (128, 32):
        for x in read_lines(RUNS / f"resized-{codes}" / "vqkd.jsonl"):
            if x.get("note") == "before" or "summary" in x:
                when = "resized" if "note" in x else "and one epoch more"
                rows.append(f"| {codes} | {when} | {x['cosine']:.3f} | {x['codes_used']} | "
                            f"{x['perplexity']:.1f} |")
    return rows


def main():
    def order(path):
        name, seed = path.parent.name.rsplit("-", 1)
        return name, int(seed)

    wanted = re.compile(r"(hog|naive|pixel|norestart|cold|slow\d+)-\d+")
    logs = [path for path in RUNS.glob("*/vqkd.jsonl") if wanted.fullmatch(path.parent.name)]
    lines = ["| K | | cosine | codes used | perplexity |", "|---|---|---|---|---|"]
    lines += [*resized_rows(), "", HEADER, "|---" * 11 + "|"]
    lines += [row(path) for path in sorted(logs, key=order)]
    write_below(RESULTS / "health.md", lines, MARKER)
    print("\n".join(lines))


if __name__ == "__main__":
    main()
