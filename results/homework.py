"""Does the grader mark rightly? Every known mistake is handed in, and the table says what it got.

    python -m results.homework                    # all assignments: about a quarter of an hour
    python -m results.homework A1 A2              # some
    python -m results.homework --write [A1 ...]   # and write homework.md and homework.jsonl

For each assignment: the project itself, the untouched hand-out, each function written differently
and rightly, each known mistake, the same mistakes written in another way, and mistakes that are
not in the list. A hint is right if it is the sentence of the mistake handed in.
"""
import concurrent.futures
import tempfile
import time
from pathlib import Path

from assignments import homework, mistakes, rewritings, sources
from assignments.tasks import TASKS
from results import make
from results.tables import RESULTS, ROOT, about, fill, made_on, read_lines, table, write_lines
from support.args import Parser
from support.files import UserError
from support.process import launch


def submissions(assignment):
    """-> [(kind, function, source, the sentence that its author should read or None)]"""
    cases = []
    for name in TASKS[assignment]:
        cases.append(("right", name, mistakes.RIGHT[name].lstrip("\n"), None))
        cases += [("mistake", name, source, told) for source, told in mistakes.versions(name)]
        for kind, of, source, begin in rewritings.CASES:
            if of == name:
                told = [t for _, t in mistakes.versions(name) if begin and t.startswith(begin)]
                cases.append((kind, name, source.lstrip("\n"), told[0] if told else None))
    return cases


def handed_in(name, source):
    """The text of the project's file with this function in it."""
    file, _, function = name.partition("::")
    return sources.put((ROOT / file).read_text(), function, source)


def mark(assignment, case):
    """-> a line of the record: what a submission of one function got."""
    kind, name, source, told = case
    got = homework.grade_function(name, TASKS[assignment][name], handed_in(name, source))
    return dict(assignment=assignment, kind=kind, function=name, mistake=told,
                source=source, full=got.score == got.points, hint=got.hint, says=got.says,
                seconds=round(got.seconds, 1))


def check(assignment, jobs):
    """-> the lines of one assignment; the first tells of whole submissions."""
    with tempfile.TemporaryDirectory() as place:
        out = Path(place) / assignment
        homework.handout(assignment, out)
        untouched = homework.grade(out, assignment, jobs=jobs)
    begin = time.monotonic()
    itself = homework.grade(ROOT, assignment, jobs=jobs)
    whole = dict(assignment=assignment, kind="whole", points=sum(m.points for m in itself),
                 project=sum(m.score for m in itself), handout=sum(m.score for m in untouched),
                 seconds=round(time.monotonic() - begin, 1), jobs=jobs)
    whole |= about(f"python -m results.homework --write {assignment}")
    lines = [whole]
    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        for line in pool.map(lambda case: mark(assignment, case), submissions(assignment)):
            lines.append(line)
            result = "full marks" if line["full"] else "loses marks"
            print(f"{assignment} {line['kind']:9} {line['function']:40} {result:12} "
                  f"{verdict(line):14} {(line['mistake'] or '')[:60]}", flush=True)
    whole["all_seconds"] = round(time.monotonic() - begin, 1)
    return lines


def verdict(line):
    """What the hint is: named, wrong, none."""
    if line["hint"] is None:
        return "no hint"
    return "named" if line["hint"] == line["mistake"] else "WRONG HINT"


def recorded(without):
    """The lines of an earlier record, but for those of some assignments."""
    lines = read_lines(RESULTS / "homework.jsonl")
    return [line for line in lines if line["assignment"] not in without]


def row(assignment, lines):
    """One line of the table."""
    whole, *cases = [line for line in lines if line["assignment"] == assignment]
    mine = {kind: [line for line in cases if line["kind"] == kind]
            for kind in ("right", "mistake", "otherwise", "stranger")}
    lose = {kind: sum(not line["full"] for line in some) for kind, some in mine.items()}
    named = {kind: sum(verdict(line) == "named" for line in some) for kind, some in mine.items()}
    wrong = sum(verdict(line) == "WRONG HINT" for line in cases)
    right = len(mine["right"])
    return [assignment, f"{whole['project']} of {whole['points']}", whole["handout"],
            f"{right - lose['right']} of {right}", len(mine["mistake"]), lose["mistake"],
            named["mistake"],
            f"{lose['otherwise']}, {named['otherwise']} of {len(mine['otherwise'])}",
            f"{lose['stranger']} of {len(mine['stranger'])}", wrong, whole["seconds"]]


HEAD = ["", "project itself", "untouched hand-out", "right, written differently: full marks",
        "mistakes", "lose marks", "hint names them", "written otherwise: lose marks, named",
        "not in the list: lose marks", "wrong hints", "seconds to grade the project"]


def page(lines):
    """The text of results/homework.md."""
    wholes = [line for line in lines if line["kind"] == "whole"]
    rows = [row(line["assignment"], lines) for line in wholes]
    missed = [f"* {line['function']}: {line['mistake'] or line['source'].strip()}"
              for line in lines if line["kind"] in ("mistake", "otherwise", "stranger")
              and (line["full"] or (line["mistake"] and verdict(line) != "named"))]
    known = sum(line["kind"] == "mistake" for line in lines)
    return fill(TEXT, rows="\n".join(table(HEAD, rows)), known=known, jobs=wholes[-1]["jobs"],
                missed="\n".join(missed) or "None.", made_on=made_on(lines),
                minutes=round(sum(line["all_seconds"] for line in wholes) / 60))


TEXT = """# Does the grader mark rightly?

`python -m results.homework --write`: {minutes} minutes, {jobs} at a time. {made_on} Each of {known}
natural mistakes (assignments/mistakes.py) was handed in by itself in an otherwise right submission,
and marked as a student's would be.

{rows}

The mistakes of the list were written by us, as replacements in a right version of each function
(`RIGHT`), which is not the project's. Tests were added until all were noticed. So the columns "lose
marks" and "hint names them" show what is covered; they are no estimate for mistakes that we did
not think of. Closer to such an estimate are the two columns on submissions from
assignments/rewritings.py, which were written after the tests and probes: known mistakes in other
words, and mistakes that no sentence in the list describes, which must lose marks and must get no
hint.

Not noticed, or noticed without the hint that belongs to it:

{missed}

Every submission with what its author reads: [homework.jsonl](homework.jsonl).
"""


def main(argv=None):
    p = Parser(description=__doc__)
    p.add_argument("assignments", nargs="*", help="which, A1 to A6; default: all")
    p.add_argument("--jobs", type=int, default=2, help="functions marked at the same time")
    p.add_argument("--write", action="store_true", help="write results/homework.md and .jsonl")
    args = p.parse_args(argv)
    chosen = args.assignments or list(TASKS)
    unknown = set(chosen) - set(TASKS)
    if unknown:
        raise UserError(f"there is no assignment {min(unknown)}: choose of {', '.join(TASKS)}")
    lines = recorded(chosen) if args.write else []
    for assignment in chosen:
        lines += check(assignment, args.jobs)
    lines.sort(key=lambda line: line["assignment"])
    print(page(lines))
    if args.write:
        write_lines(RESULTS / "homework.jsonl", lines)
        make.main(["homework"])


if __name__ == "__main__":
    launch(main)
