"""How a codebook lives and dies: results/health.md. Perplexity of tiny tokenizers, every step.

    python -m results.health                 # runs what has not run: a quarter of an hour
    python -m results.health --list          # the commands
"""
from extras.panels import panels, save
from results.runs import find, study
from results.tables import cell, fill, made_on, table
from support.process import launch

SEEDS = range(10)
BAD_SEEDS = range(3)
# As base starts: quantizer from the first step, slow codes, no restarts; and no warm-up.
NAIVE = "--continuous-steps 0 --restart-dead-codes 0 --decay 0.99 --warmup-epochs 0"
COLLAPSE = f"{NAIVE} --lr 3e-2"              # on purpose
COMMANDS = [f"python vqkd.py --log-every 1 --seed {seed} --out runs/healthy-{seed}"
            for seed in SEEDS]
COMMANDS += [f"python vqkd.py {NAIVE} --log-every 1 --seed {seed} --out runs/naive-{seed}"
             for seed in BAD_SEEDS]
COMMANDS += [f"python vqkd.py {COLLAPSE} --log-every 1 --seed 0 --out runs/collapsed-0"]

PAGE = """# Codebook health

What perplexity (how many codes the codebook is worth) does in the tiny tokenizer, step by step:
{healthy} seeds of today's default recipe, {bad} *naive* ones, and one collapse on purpose.

![perplexity](health.png)

Naive is how base starts (quantizer from the first step, slow codes, no restarts), and without a
warm-up of the rate: `python vqkd.py {naive}`. On purpose: `python vqkd.py {collapse}`.

A warning comes when perplexity falls to a small share of its best so far or of K (`collapsing` in
support/codebook.py). {warned_healthy} of {healthy} healthy seeds were warned of, and {warned_bad}
of the {bad} naive ones; the collapse on purpose {warned_collapse}. Just after its
k-means start, when the decoder meets codes for the first time, a healthy codebook dips for a step
or two: in the worst healthy seed to {worst:.0f} % of its best. At the end healthy codebooks have
{used} codes in use and a perplexity of {perplexity}, {share:.0f} % of K in the worst seed.

{rows}

`python -m results.health` ran these commands and kept a record of each in
[health.jsonl](health.jsonl). {made_on}
"""


def facts(record):
    """What the perplexity of a run did.  -> dict"""
    steps = record["curves"]["train"]
    codes = record["args"]["codes"]
    best = 0.0
    fall = 1.0                               # lowest share of the best value until then
    for x in steps:
        best = max(best, x["perplexity"])
        fall = min(fall, x["perplexity"] / best)
    lowest = min(steps, key=lambda x: x["perplexity"])
    warned = "never"
    if record["warned"]:
        step = record["warned"][0]
        then = next(x["perplexity"] for x in steps if x["step"] == step)
        warned = f"step {step}, at {then:.1f} = {100 * then / codes:.0f} % of K"
    return dict(best=best, fall=100 * fall, lowest=lowest, warned=warned, first=steps[0]["step"])


def row(record):
    """One line of the table."""
    x = facts(record)
    result = record["result"]
    return [record["run"], x["first"], f"{x['best']:.1f}",
            f"{x['lowest']['perplexity']:.1f} (step {x['lowest']['step']})", f"{x['fall']:.0f} %",
            x["warned"], f"{result['codes_used']} of {record['args']['codes']}",
            f"{result['perplexity']:.1f}", f"{result['cosine']:.3f}"]


TITLES = ["run", "first step with codes", "best perplexity", "lowest", "lowest share of the best "
          "until then", "warned", "used, held-out images", "perplexity, held-out images", "cosine"]


def page(records):
    """The text of results/health.md."""
    healthy = [find(records, f"healthy-{seed}", "vqkd") for seed in SEEDS]
    naive = [find(records, f"naive-{seed}", "vqkd") for seed in BAD_SEEDS]
    collapsed = find(records, "collapsed-0", "vqkd")
    ends = [x["result"]["perplexity"] for x in healthy]
    return fill(
        PAGE, healthy=len(healthy), bad=len(naive), naive=NAIVE, collapse=COLLAPSE,
        warned_healthy=sum(bool(x["warned"]) for x in healthy),
        warned_bad=sum(bool(x["warned"]) for x in naive),
        warned_collapse="was" if collapsed["warned"] else "was not",
        worst=min(facts(x)["fall"] for x in healthy),
        used=cell([x["result"]["codes_used"] for x in healthy]), perplexity=cell(ends),
        share=100 * min(ends) / healthy[0]["args"]["codes"], made_on=made_on(records),
        rows="\n".join(table(TITLES, [row(x) for x in [*healthy, *naive, collapsed]])))


def draw(records, path):
    """Perplexity by step: healthy seeds grey, naive ones orange, the collapse red."""
    figure, axes = panels(1, 1, 9, 3.6, "Perplexity of each training batch", left=0.06,
                          right=0.99, bottom=0.13)
    axis = axes[0, 0]
    axis.axis("on")
    colours = {"healthy": "#888888", "naive": "#e39b54", "collapsed": "#d7301f"}
    for record in records:
        name = record["run"].partition("-")[0]
        steps = record["curves"]["train"]
        label = name if record["run"].endswith("-0") else None
        axis.plot([x["step"] for x in steps], [x["perplexity"] for x in steps], lw=0.8,
                  color=colours[name], label=label)
        for step in record["warned"][:1]:
            axis.axvline(step, color=colours[name], ls="--", lw=0.8)
    axis.set_xlabel("step (dashed: the first warning)", fontsize=9)
    axis.legend(fontsize=8)
    save(figure, path)


PICTURES = {"health.png": draw}


def main(argv=None):
    kept = {command.split("runs/")[1]: ("perplexity",) for command in COMMANDS}
    study("health", __doc__, COMMANDS, kept, argv=argv)


if __name__ == "__main__":
    launch(main)
