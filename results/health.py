"""The table of results/health.md from the logs of results/health.sh: what perplexity did, and who was warned when.

    python results/health.py            # reads runs/*/vqkd.jsonl, writes results/health.md below its marker
"""
import json
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def row(path):
    """One line of the table for one run."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    codes, summary = lines[0]["args"]["codes"], next((x for x in lines if "summary" in x), None)
    if summary is None:                                      # not finished
        return f"| {path.parent.name} | not finished" + " |" * 10
    steps = [x for x in lines if "perplexity" in x and x.get("split") != "val" and "loss" in x]
    best = lowest = steps[0]
    fall = 1.0
    for x in steps:
        best = max(best, x, key=lambda y: y["perplexity"])
        lowest = min(lowest, x, key=lambda y: y["perplexity"])
        fall = min(fall, x["perplexity"] / best["perplexity"])
    seen = {x["step"]: x["perplexity"] for x in steps}
    warned = [x["step"] for x in lines if "warning" in x]
    at = seen[warned[0]] if warned else 0
    since = warned and f"step {warned[0]}, at perplexity {at:.1f} = {100 * at / codes:.0f} % of K"
    return (f"| {path.parent.name} | {steps[0]['step']} | {best['perplexity']:.1f} | {lowest['perplexity']:.1f} "
            f"(step {lowest['step']}) | {100 * fall:.0f} % | {since or 'never'} | {summary['codes_used']} of {codes} | "
            f"{summary['perplexity']:.1f} | {100 * summary['perplexity'] / codes:.0f} % | {summary['cosine']:.3f} | "
            f"{lines[0]['commit'][:7]} |")


def main():
    def order(path):
        name, seed = path.parent.name.rsplit("-", 1)
        return name, int(seed)

    wanted = re.compile(r"(hog|naive|pixel|norestart|cold|slow\d+)-\d+")
    logs = [p for p in (ROOT / "runs").glob("*/vqkd.jsonl") if wanted.fullmatch(p.parent.name)]
    resized = ["| K | | cosine | codes used | perplexity |", "|---|---|---|---|---|"]
    for codes in (128, 32):
        path = ROOT / "runs" / f"resized-{codes}" / "vqkd.jsonl"
        for x in map(json.loads, path.read_text().splitlines()) if path.exists() else []:
            if x.get("note") == "before" or "summary" in x:
                when = "resized" if "note" in x else "and one epoch more"
                resized.append(f"| {codes} | {when} | {x['cosine']:.3f} | {x['codes_used']} | {x['perplexity']:.1f} |")
    lines = ["| run | first step with codes | best | lowest of a step | lowest share of the best until then | warned | "
             "used, held-out set | perplexity, held-out set | share of K | cosine | commit |", "|---" * 11 + "|"]
    lines += [row(path) for path in sorted(logs, key=order)]
    page = ROOT / "results" / "health.md"
    head = page.read_text().split("<!-- resized -->")[0]
    page.write_text("\n".join([head + "<!-- resized -->", "", *resized, "", *lines, ""]))
    print("\n".join(resized + lines))


if __name__ == "__main__":
    main()
