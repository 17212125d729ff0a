"""The classroom: hand-outs hold no answer, marks are right, nothing a student hands in gets out."""
import ast
import itertools
import json
import re
import subprocess
import sys
import threading
import time
import xml.etree.ElementTree as ET

import pytest
import torch

from assignments import homework, mistakes, probes, rewritings, sources
from assignments.tasks import TASKS
from conftest import ROOT
from support.files import UserError

EVERY = [(assignment, name) for assignment, tasks in TASKS.items() for name in tasks]
NAMES = [name for _, name in EVERY]
CODE = "vqkd.py::nearest_code"


def text_of(name):
    return (ROOT / name.partition("::")[0]).read_text()


def function_in(name):
    return name.partition("::")[2]


def squeezed(text):
    return "".join(text.split())


# --- functions in files ---------------------------------------------------------------------------
FILE = '''import torch


@torch.no_grad()
def first(x,
          y=(1, 2)):
    """Doc."""
    # a comment
    return x


class Thing:
    def second(self):
        return 2

    def third(self):
        """Doc
        of two lines."""
        return 3


LAST = 1
'''


def test_a_function_is_cut_out_with_its_decorators_and_put_back():
    for name in ("first", "Thing.second", "Thing.third"):
        assert sources.put(FILE, name, sources.cut(FILE, name)) == FILE
    assert sources.cut(FILE, "first").startswith("@torch.no_grad()\ndef first(x,")
    assert sources.cut(FILE, "Thing.third").startswith("def third")
    assert sources.cut(FILE, "Thing.first") is None


@pytest.mark.parametrize("name", ["first", "Thing.second", "Thing.third"])
def test_a_function_is_found_in_a_file_that_does_not_parse_elsewhere(name):
    broken = FILE.replace("LAST = 1", "LAST = = 1")
    assert ast.dump(ast.parse(sources.cut(broken, name))) == ast.dump(
        ast.parse(sources.cut(FILE, name)))


def test_a_blank_function_keeps_signature_decorators_and_docstring_and_nothing_else():
    text = sources.blank(FILE, sources.find(ast.parse(FILE), "first"), "A9: write first")
    source = sources.cut(text, "first")
    assert source == ('@torch.no_grad()\ndef first(x,\n          y=(1, 2)):\n    """Doc."""\n'
                      '    raise NotImplementedError("A9: write first")\n')
    assert not sources.is_written(source) and sources.is_written(sources.cut(FILE, "first"))
    assert sources.cut(text, "Thing.third") == sources.cut(FILE, "Thing.third")


def test_new_helpers_imports_and_constants_come_along_and_nothing_that_runs():
    text = "import math\nimport torch\nEPS = 1\ndef helper(x):\n    return x\nprint(1)\nfirst = 2\n"
    new = sources.new_names(text, FILE)
    assert "import math" in new and "EPS = 1" in new and "def helper" in new
    assert "torch" not in new and "print" not in new and "first" not in new


# --- the lists ------------------------------------------------------------------------------------
@pytest.mark.parametrize("assignment, name", EVERY, ids=NAMES)
def test_every_assigned_function_is_there_with_a_docstring_that_stays_and_tests(assignment, name):
    task = TASKS[assignment][name]
    node = sources.find(ast.parse(text_of(name)), function_in(name))
    assert ast.get_docstring(node)
    tests = "".join((ROOT / f"tests/test_{file}.py").read_text() for file in task.files.split())
    words = set(re.findall(r"\w+", task.only)) - {"or", "and", "not"}
    names = re.findall(r"^def (test_\w+)", tests, re.M)
    unused = [word for word in words if not any(word in f"{name}{task.files}" for name in names)]
    assert not unused
    page = (ROOT / f"assignments/{assignment}.md").read_text()
    assert f"`{function_in(name)}`" in page


def test_the_functions_of_an_assignment_are_worth_12_points_and_its_page_says_20():
    for assignment, tasks in TASKS.items():
        assert sum(task.points for task in tasks.values()) == 12
        page = (ROOT / f"assignments/{assignment}.md").read_text()
        assert page.startswith(f"# {assignment}: ") and "20 points: functions 12" in page
        for heading in ("## Read", "## Write", "## Look", "## Questions"):
            assert heading in page
        assert f"## {assignment}\n" in (ROOT / "assignments/key.md").read_text()


def test_there_are_over_100_mistakes_and_those_that_teachers_meet_are_among_them():
    told = [sentence for name in NAMES for _, sentence in mistakes.versions(name)]
    assert len(told) > 100 and min(len(mistakes.MISTAKES[name]) for name in NAMES) >= 6
    for words in ("soft-max is taken twice", "labels are smoothed", "patches are detached",
                  "[CLS] is detached", "VQ-VAE's mean", "9 rounds", "same mask"):
        assert any(words in sentence for sentence in told), words


@pytest.mark.parametrize("name", NAMES)
def test_mistakes_and_right_versions_keep_the_signature_and_each_has_a_sentence_of_its_own(name):
    def signature(source):
        return ast.dump(sources.find(ast.parse(source), function_in(name).split(".")[-1]).args)
    ours = ast.dump(sources.find(ast.parse(text_of(name)), function_in(name)).args)
    told = [sentence for _, sentence in mistakes.versions(name)]
    assert signature(mistakes.RIGHT[name]) == ours
    assert all(signature(source) == ours for source, _ in mistakes.versions(name))
    assert len(set(told)) == len(told)
    assert all(sentence.endswith(".") and len(sentence) < 200 for sentence in told)


@pytest.mark.parametrize("name", NAMES)
def test_the_probes_tell_every_mistake_from_the_others_and_from_what_is_right(name):
    right = probes.answers(name, probes.function_from(name, mistakes.RIGHT[name]))
    assert mistakes.diagnose(name, right) is None
    for source, sentence in mistakes.versions(name):
        found = probes.answers(name, probes.function_from(name, source))
        assert mistakes.diagnose(name, found) == sentence
    _, known = mistakes.known_answers(name)
    for (a, one), (b, other) in itertools.combinations(known, 2):
        assert not probes.same(a, b), f"{one} | {other}"


@pytest.mark.parametrize("kind, name, source, told", rewritings.CASES)
def test_a_mistake_in_other_words_gets_its_hint_and_an_unknown_one_gets_none(
        kind, name, source, told):
    hint = mistakes.diagnose(name, probes.answers(name, probes.function_from(name, source)))
    assert (hint is None) == (kind == "stranger")
    assert hint is None or hint.startswith(told)


def test_the_known_answers_are_computed_in_one_thread_at_a_time(monkeypatch):
    inside, most = [], []

    def answers(name, _):
        inside.append(name)
        most.append(len(inside))
        time.sleep(0.01)                     # another thread would come in now
        inside.remove(name)
        return []

    monkeypatch.setattr(probes, "answers", answers)
    mistakes.known_answers.cache_clear()
    threads = [threading.Thread(target=mistakes.diagnose, args=(name, [])) for name in NAMES[:2]]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    mistakes.known_answers.cache_clear()     # these were no answers
    assert len(most) > 10 and max(most) == 1


# --- hand-outs ------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def handouts(tmp_path_factory):
    place = tmp_path_factory.mktemp("handouts")
    for assignment in TASKS:
        homework.handout(assignment, place / assignment)
    return place


def telling(node):
    """Statements and expressions of a body that are long enough to give it away, squeezed."""
    body = node.body[1:] if ast.get_docstring(node) else node.body
    parts = [part for statement in body for part in ast.walk(statement)
             if isinstance(part, (ast.stmt, ast.expr))]
    return {text for part in parts if len(text := squeezed(ast.unparse(part))) >= 24}


# Short idioms that stand elsewhere in the project, too, and calls of functions.
IDIOMS = {"tokens[:,1:].mean(dim=1)", "hidden=hidden_patches(mask)", "len(self.cls_pt_layers)",
          "sample_block(mask,remaining,min_block)"}


@pytest.mark.parametrize("assignment", TASKS)
def test_a_hand_out_holds_the_answer_in_no_form(assignment, handouts):
    out = handouts / assignment
    files = [path for path in out.rglob("*") if path.is_file()]
    names = {path.name for path in files} | {path.parent.name for path in files}
    assert not names & {".git", "__pycache__", "assignments", "key.md", "mutate.py"}
    assert not [path for path in files if path.suffix in (".pyc", ".pt", ".ipynb")]
    texts = {}
    for path in files:
        if path.name == "ASSIGNMENT.md":     # names on purpose what is to be called
            continue
        if path.suffix in (".py", ".md", ".jsonl", ".sh", ".txt"):
            texts[path] = squeezed(path.read_text())
        if path.suffix == ".py":             # without comments, with other line breaks
            texts[path] += squeezed(ast.unparse(ast.parse(path.read_text())))
    for name in TASKS[assignment]:
        node = sources.find(ast.parse(text_of(name)), function_in(name))
        for part in telling(node) - IDIOMS:
            holds = [path.relative_to(out) for path, text in texts.items() if part in text]
            assert not holds, f"{part}: widen `tells` or `twins` of {name} in assignments/tasks.py"
        blank = sources.find(ast.parse((out / name.partition("::")[0]).read_text()),
                             function_in(name))
        assert ast.get_docstring(blank) == ast.get_docstring(node)


@pytest.mark.parametrize("assignment", TASKS)
def test_a_hand_out_has_its_page_and_asks_assistants_to_explain(assignment, handouts):
    out = handouts / assignment
    assert homework.assignment_of(out) == assignment
    agents = (out / "AGENTS.md").read_text()
    assert "Explain" in agents
    assert all(function_in(name) in agents for name in TASKS[assignment])
    for path in out.rglob("*.py"):
        compile(path.read_text(), str(path), "exec")


def test_a_hand_out_goes_to_a_new_folder_only(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="not empty"):
        homework.handout("A1", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_an_untouched_hand_out_gets_no_points_and_a_sentence_for_each_function(handouts):
    for assignment in TASKS:
        marks = homework.grade(handouts / assignment, assignment)
        assert [mark.score for mark in marks] == [0] * len(TASKS[assignment])
        assert all(mark.says == ["It is not written yet."] for mark in marks)


@pytest.mark.slow
@pytest.mark.parametrize("assignment", ["A3"])
def test_in_a_hand_out_only_tests_that_need_an_assigned_function_fail(assignment, handouts):
    out = handouts / assignment
    subprocess.run([sys.executable, "-m", "pytest", "-q", "-m", "not slow", "--junitxml=tests.xml"],
                   cwd=out, capture_output=True)
    cases = ET.parse(out / "tests.xml").getroot().iter("testcase")
    failed = {case.get("name"): "".join(bad.itertext()) + bad.get("message", "")
              for case in cases for bad in case if bad.tag in ("failure", "error")}
    assert failed
    other = [name for name, text in failed.items() if f"{assignment}: write" not in text]
    assert not other


# --- marks ----------------------------------------------------------------------------------------
def submission(tmp_path, assignment, name, source):
    """A folder with the project's file in which one function is the student's."""
    file = tmp_path / name.partition("::")[0]
    file.write_text(sources.put(text_of(name), function_in(name), source))
    return tmp_path


def test_a_missing_file_a_missing_function_and_bad_syntax_are_sentences(tmp_path):
    marks = homework.grade(tmp_path, "A1")
    assert marks[0].says == ["vqkd.py is not in the submission."]
    text = text_of(CODE).replace("def nearest_code(", "def nearest_codes(")
    text = text.replace("    return h + (v - h).detach()\n", "    return h + (v - h.detach()\n")
    (tmp_path / "vqkd.py").write_text(text)
    nearest, straight = homework.grade(tmp_path, "A1")
    assert nearest.says == ["vqkd.py has no function nearest_code."]
    assert straight.says[0].startswith("It does not parse")
    assert nearest.score == straight.score == 0


def test_results_json_is_what_gradescope_reads():
    marks = [homework.Mark(CODE, 7, 7), homework.Mark("vqkd.py::straight_through", 5, 0, ["No."])]
    result = json.loads(json.dumps(homework.gradescope(marks)))
    assert result["score"] == 7 and result["stdout_visibility"] == "hidden"
    assert [(t["name"], t["score"], t["max_score"], t["status"]) for t in result["tests"]] == [
        ("nearest_code", 7, 7, "passed"), ("straight_through", 0, 5, "failed")]
    assert result["tests"][1]["output"] == "No."


@pytest.mark.parametrize("score, code", [(7, 0), (0, 1)])
def test_the_exit_code_is_what_github_classroom_reads(score, code, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(homework, "grade", lambda *_, **__: [homework.Mark(CODE, 7, score)])
    with pytest.raises(SystemExit) as end:
        homework.main(["grade", str(tmp_path), "--assignment", "A1", "--json",
                       str(tmp_path / "results.json")])
    assert end.value.code == code
    assert f"nearest_code: {score} of 7" in capsys.readouterr().out
    assert json.loads((tmp_path / "results.json").read_text())["score"] == score


@pytest.mark.parametrize("flags, words", [
    (["grade", "no/such/folder"], "no/such/folder"), (["grade", "."], "--assignment"),
    (["grade", ".", "--assignment", "A1", "--only", "kmeans"], "it has nearest_code")])
def test_what_cannot_be_marked_is_a_sentence(flags, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=words):
        homework.main(flags)


def test_a_report_of_the_child_that_does_not_end_gives_no_points(tmp_path):
    (tmp_path / "output").write_text("")
    mark = homework.Mark(CODE, 7)
    homework.judge(mark, tmp_path, 0, 9)     # exit code 0, and nothing said: os._exit(0)
    assert mark.score == 0 and "before its tests" in mark.says[0]
    (tmp_path / "report.jsonl").write_text('{"end": 0, "passed": 0}\n')
    homework.judge(mark, tmp_path, 0, 9)     # no test ran
    assert mark.score == 0
    (tmp_path / "report.jsonl").write_text('{"end": 0, "passed": 3}\n')
    homework.judge(mark, tmp_path, 0, 9)
    assert mark.score == 7


BAD = {
    "never ends": ("while True:\n        pass", "did not end within"),
    "exits": ("import os\n    os._exit(0)", "ended before its tests"),
    "leaves": ("raise SystemExit(0)", "SystemExit"),
    "prints": ("while True:\n        print('x' * 1000000)", "more than 20 MB"),
    "writes outside": ("try:\n        open('OUT', 'w').write('x')\n    except Exception:\n"
                       "        pass\n    return h", "writes outside its folder"),
    "removes": ("import os\n    os.remove('OUT')", "changes files outside its folder"),
    "calls": ("import subprocess\n    subprocess.run(['true'])", "another program"),
    "network": ("import socket\n    socket.create_connection(('127.0.0.1', 9))",
                "uses the network"),
    "memory": ("torch.ones(1 << 33)", "allocate"),
    "recursion": ("return straight_through(h, v)", "RecursionError"),
}


@pytest.mark.slow
@pytest.mark.parametrize("what", BAD)
def test_a_bad_submission_gets_a_sentence_and_the_rest_is_marked(what, tmp_path):
    body, sentence = BAD[what]
    outside = tmp_path / "kept"
    outside.write_text("mine")
    source = f"def straight_through(h, v):\n    {body.replace('OUT', str(outside))}\n"
    folder = submission(tmp_path, "A1", "vqkd.py::straight_through", source)
    begin = time.monotonic()
    nearest, straight = homework.grade(folder, "A1", seconds=60)
    assert time.monotonic() - begin < 150
    assert nearest.score == 7 and straight.score == 0
    assert any(sentence in said for said in straight.says), straight.says
    assert outside.read_text() == "mine"


@pytest.mark.slow
def test_a_mistake_costs_its_function_and_no_other_and_is_named(tmp_path):
    source, told = mistakes.versions("vqkd.py::ema_update")[1]
    folder = submission(tmp_path, "A2", "vqkd.py::ema_update", source)
    scores = {function_in(mark.name): mark for mark in homework.grade(folder, "A2")}
    assert [scores[name].score for name in ("vqkd_loss", "code_sums", "ema_update")] == [5, 3, 0]
    assert scores["ema_update"].hint == told
    assert scores["ema_update"].says[0] == told
    assert any(said.startswith("Not true yet: ") for said in scores["ema_update"].says[1:])


@pytest.mark.slow
def test_helpers_of_a_student_come_along(tmp_path):
    source = "def straight_through(h, v):\n    return h + constant(v - h)\n"
    folder = submission(tmp_path, "A1", "vqkd.py::straight_through", source)
    with open(folder / "vqkd.py", "a") as file:
        file.write("\n\ndef constant(x):\n    return x.detach()\n")
    assert homework.grade(folder, "A1", only="straight_through")[0].score == 5


@pytest.mark.slow
@pytest.mark.parametrize("assignment", TASKS)
def test_the_project_itself_gets_full_marks_in_under_two_minutes(assignment):
    begin = time.monotonic()
    marks = homework.grade(ROOT, assignment)
    assert [mark.score for mark in marks] == [mark.points for mark in marks]
    assert time.monotonic() - begin < 120


def test_answers_of_a_submission_are_read_without_running_its_code(tmp_path):
    class Evil:
        def __reduce__(self):
            return print, ("ran",)

    torch.save([Evil()], tmp_path / "probed.pt")
    assert homework.hint(CODE, tmp_path / "probed.pt") is None
    assert homework.hint(CODE, tmp_path / "missing.pt") is None
