"""The page of tests/mutate.py, which puts bugs into the project and sees which test notices them.

    python tests/mutate.py --write           # makes the records, then results/mutations.md
"""
from results.tables import fill, made_on, table

PAGE = """# Would the tests notice?

One-line bugs in the method, put into a copy of the project one at a time. {noticed} of {bugs} are
noticed without the authors' tensors, by the test beside them, which passes without the bug. If a
bug survived, the missing test was written. So this page shows what is guarded; it is no estimate of
how many other bugs the tests would find.

`python tests/mutate.py --write`: {seconds} s, {jobs} at a time. {made_on} The changed lines are in
[mutations.jsonl](mutations.jsonl).

{rows}
"""


def page(records):
    """The text of results/mutations.md. The first record is about all of them."""
    about, *bugs = records
    rows = [[x["file"], x["bug"], x["by"] or "**survives**"] for x in bugs]
    return fill(PAGE, noticed=sum(x["noticed"] for x in bugs), bugs=len(bugs),
                seconds=about["seconds"], jobs=about["jobs"], made_on=made_on(records),
                rows="\n".join(table(["file", "bug", "noticed by"], rows)))
