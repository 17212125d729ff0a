"""results.make --check notices each kind of fault; results.runs keeps what logs say."""
import json
import subprocess
import types

import pytest

import vqkd
from results import check, first_screen, health, make, runs, tables, tiny
from support import inputs
from support.files import UserError, plain_args

COMMAND = "python vqkd.py --seed 3 --out runs/a-3"
FACTS = dict(command=COMMAND, commit="c" * 40, seed=3, machine="x86_64 AVX2", cpu="a CPU", cores=2,
             threads=1, amp="no", torch="2")


def record(**more):
    """A record of today's default recipe."""
    args = plain_args(vqkd.parse_args(COMMAND.split()[2:]))
    data = inputs.made_from(vqkd.parse_args([]), types.SimpleNamespace(is_main=True, world_size=1))
    return FACTS | dict(run="a-3", stage="vqkd", args=args, made_from=data, seconds=1.0,
                        result=dict(cosine=0.5)) | more


def page(records):
    return f"cosine {runs.find(records, 'a-3', 'vqkd')['result']['cosine']}\n"


def dot(records, path):
    from PIL import Image
    Image.new("L", (2, 2)).save(path)


MAKER = types.SimpleNamespace(page=page, PICTURES={"a.png": dot})
PAGE = make.Page("health.md", ["a.jsonl"], ["a.png"], "python -m results.a")


def written(folder, *records):
    """A folder results/ with a page, its records and its picture."""
    folder.mkdir(exist_ok=True)
    tables.write_lines(folder / "a.jsonl", records or [record()])
    (folder / "a.py").write_text("from results import tables\n")
    (folder / "tables.py").write_text("")
    (folder / "make.py").write_text("")
    (folder / "__init__.py").write_text("")
    make.write(PAGE, MAKER, folder)
    return folder


def faults(folder):
    found, _ = check.faults({"a": PAGE}, folder, lambda name: MAKER)
    return found


def only_fault(folder):
    found = faults(folder)
    assert len(found) == 1, found
    return found[0]


# --- the check ------------------------------------------------------------------------------------
def test_a_page_that_was_just_made_has_no_fault(tmp_path):
    assert faults(written(tmp_path / "results")) == []


def test_a_page_that_was_edited_by_hand_is_noticed(tmp_path):
    folder = written(tmp_path / "results")
    (folder / "health.md").write_text("cosine 0.6\n")
    assert only_fault(folder) == ("results/health.md is not what its records say: "
                                  "python -m results.make a")


def test_a_record_of_another_recipe_is_noticed_and_the_flag_named(tmp_path):
    old = record()
    old["args"] = old["args"] | dict(lr=0.123)
    text = only_fault(written(tmp_path / "results", old))
    assert COMMAND in text and "--lr 0.123 -> " in text and text.endswith(": python -m results.a")
    study = record(command="python -m results.b", recipes={COMMAND: old["args"]})
    del study["args"]
    assert "--lr 0.123 -> " in only_fault(written(tmp_path / "results", study))


def test_where_a_run_was_written_and_how_often_it_logged_is_no_recipe(tmp_path):
    elsewhere = record()
    elsewhere["args"] = elsewhere["args"] | dict(out="/elsewhere", log_every=1, amp="no")
    assert faults(written(tmp_path / "results", elsewhere)) == []


def test_a_record_of_other_pictures_is_noticed(tmp_path):
    text = only_fault(written(tmp_path / "results", record(made_from=dict(data="shapes, old"))))
    assert "pictures shapes, old -> shapes, levels" in text


@pytest.mark.parametrize("commit", ["unknown", "c" * 40 + "-dirty"])
def test_a_commit_that_nobody_can_look_up_is_noticed_without_git_too(tmp_path, commit):
    text = only_fault(written(tmp_path / "results", record(commit=commit)))
    assert "1 of 1 records are of commit" in text and "not in the history" in text


def test_a_commit_outside_of_the_history_is_noticed_where_there_is_one(tmp_path):
    def git(*words):
        return subprocess.run(["git", "-C", tmp_path, "-c", "user.name=a", "-c", "user.email=a@b",
                               *words], check=True, capture_output=True, text=True).stdout.strip()
    git("init", "-q")
    git("commit", "-q", "--allow-empty", "-m", "one")
    known = git("rev-parse", "HEAD")
    assert faults(written(tmp_path / "results", record(commit=known))) == []
    git("commit", "-q", "--allow-empty", "--amend", "-m", "another one")
    text = only_fault(tmp_path / "results")
    assert f"commit {known[:7]}, which is not in the history: python -m results.a" in text


def test_without_git_or_with_a_cut_history_a_note_says_what_was_not_looked_at(tmp_path):
    _, note = check.faults({}, written(tmp_path / "results"), None)
    assert "commits not looked up" in note


def test_a_record_that_does_not_say_where_it_comes_from_is_noticed(tmp_path):
    folder = written(tmp_path / "results")
    bare = record()
    del bare["machine"], bare["torch"]
    tables.write_lines(folder / "a.jsonl", [record(), bare | dict(command="another")])
    assert "1 of 2 records lack machine, torch" in only_fault(folder)
    old = dict(torch="2"), dict(figure=1)    # a head without the facts, and what belongs to it
    tables.write_lines(folder / "a.jsonl", [record(), dict(figure=1), *old])
    assert "2 of 4 records lack command, commit, " in only_fault(folder)
    (folder / "a.jsonl").write_text("")
    assert "there are no records" in only_fault(folder)


def test_a_missing_run_is_named(tmp_path):
    folder = written(tmp_path / "results")
    tables.write_lines(folder / "a.jsonl", [record(run="b-3")])
    assert "there is no record of runs/a-3, vqkd: python -m results.a" in only_fault(folder)


def test_a_picture_of_other_records_is_noticed_by_what_it_says_of_itself(tmp_path):
    folder = written(tmp_path / "results")
    before = (folder / "a.png").read_bytes()
    make.write(PAGE, MAKER, folder)
    assert (folder / "a.png").read_bytes() == before         # drawn once for the same records
    tables.write_lines(folder / "a.jsonl", [record(seconds=2.0)])
    assert "results/a.png was not drawn from the records" in only_fault(folder)
    (folder / "a.png").unlink()
    assert "results/a.png was not drawn" in only_fault(folder)


@pytest.mark.parametrize("name", ["README.md", "b.jsonl", "b.png", "b.py", "more/b.jsonl"])
def test_a_file_that_is_made_by_nothing_is_named(tmp_path, name):
    folder = written(tmp_path / "results")
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text("")
    assert only_fault(folder).endswith(f"git rm results/{name}")


def test_nothing_is_written_from_records_that_do_not_say_where_they_come_from(tmp_path):
    folder = written(tmp_path / "results")
    tables.write_lines(folder / "a.jsonl", [dict(run="a-3")])
    with pytest.raises(UserError, match="lack command.*python -m results.a makes them"):
        make.write(PAGE, MAKER, folder)
    assert (folder / "health.md").read_text() == "cosine 0.5\n"


# --- commands and records -------------------------------------------------------------------------
def log(folder, *lines):
    folder.mkdir(parents=True, exist_ok=True)
    args = plain_args(vqkd.parse_args([]))
    first = dict(kind="vqkd", args=args, commit="c" * 40, machine="m", torch="2", threads=1)
    tables.write_lines(folder / "vqkd.jsonl", [first, *lines])


def test_a_record_holds_facts_recipe_and_figures_and_no_name_twice(tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "RUNS", tmp_path)
    log(tmp_path / "a-3", dict(step=0, perplexity=9.12345, time=12.0),
        dict(step=1, warning="falls", time=1.0), dict(step=1, split="val", cosine=0.4, time=2.0),
        dict(summary=1, step=2, cosine=0.5, commit=0.01, time=18.0))
    found = runs.record_of(COMMAND, curves=["perplexity", "cosine"])
    assert found["commit"] == "c" * 40 and found["result"]["commitment"] == 0.01
    assert found["seconds"] == 12 + 18       # the clock began anew where the run was resumed
    assert found["warned"] == [1] and found["args"]["lr"] == vqkd.parse_args([]).lr
    assert found["curves"] == dict(train=[dict(step=0, perplexity=9.1235)],
                                   val=[dict(step=1, cosine=0.4)])
    assert not json.loads(json.dumps(found)).keys() & found["result"].keys()


def test_a_run_without_a_result_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "RUNS", tmp_path)
    log(tmp_path / "a-3", dict(step=0))
    with pytest.raises(UserError, match="runs/a-3/vqkd.jsonl has no result"):
        runs.record_of(COMMAND)


def test_a_probe_has_a_result_for_each_source():
    lines = [dict(summary=1, source="pretrain", top1=90), dict(summary=1, source="pixels", top1=9)]
    assert runs.result_of(lines) == dict(pretrain=dict(top1=90), pixels=dict(top1=9))


def test_a_command_waits_for_the_runs_that_it_reads(monkeypatch):
    order = []
    monkeypatch.setattr(runs, "run", lambda command, threads: order.append(command))
    commands = ["python vqkd.py --out runs/a", "python vqkd.py --out runs/b",
                "python pretrain.py --tokenizer runs/a/vqkd.pt --out runs/c",
                "python linprobe.py --out runs/c"]
    runs.run_all(commands, jobs=3, threads=1)
    assert order.index(commands[0]) < order.index(commands[2]) < order.index(commands[3])
    assert sorted(order) == sorted(commands)


def test_a_command_that_fails_ends_the_study_with_its_own_words():
    with pytest.raises(UserError, match="python -c .* ended with exit code 1: .*no such thing"):
        runs.run_all(["python -c 'raise SystemExit(\"no such thing\")' --out runs/a"], 1, 1)


@pytest.mark.parametrize("study", [tiny, health])
def test_every_command_of_a_study_is_one_that_its_stage_takes(study):
    logs = set()
    for command in study.COMMANDS:
        stage = command.split()[1].removesuffix(".py")
        if stage != "-m":
            args = check.today(command)
            assert args.out.parent.name == "runs" and args.batch_size and args.data == "shapes"
        logs.add(runs.place(command))
    assert len(logs) == len(study.COMMANDS)  # no two write the same log


def test_the_default_runs_are_todays_default_recipe():
    for command in (c for c in tiny.COMMANDS if "runs/hog-" in c and "robustness" not in c):
        flags = {word for word in command.split() if word.startswith("--")}
        assert flags <= {"--seed", "--out", "--source", "--labels-per-class"} | (
            {"--tokenizer", "--no-aggregation"} if "noagg" in command else set())


def test_what_a_run_is_said_to_have_run_on_is_said_once():
    found = tables.made_on([FACTS, FACTS | dict(commit="d" * 40), dict(cosine=1)])
    assert found == ("Commits ccccccc, ddddddd; a CPU, x86_64 AVX2, cores: 2, threads of a "
                     "process: 1; float32; torch 2.")


# --- the pages of this project --------------------------------------------------------------------
FIGURES = {
    "vqkd": "codes_used perplexity cosine", "segment": "miou miou_objects m_acc a_acc",
    "pretrain": "mask_acc mask_acc_cls guess_position guess_nearest", "finetune": "top1",
    "linprobe": "top1 paper_top1 knn1 knn20 top1_10 paper_top1_10 knn1_10 draws images"}


def made_up(command):
    """A record of a command whose figures are 10, 11, 12 for the seeds 0, 1, 2."""
    name, stage = runs.place(command)
    seed = int(name[-1]) if name[-1].isdigit() else 0
    figures = {key: 10 + seed for key in FIGURES.get(stage, "").split()}
    if stage == "linprobe":
        figures = dict.fromkeys(("pretrain", "pixels", "random", "tokenizer"), figures)
    if stage == "finetune_eval":
        figures = dict(restricted_top1=dict.fromkeys(tiny.SHIFTS.split(), 10 + seed))
    return FACTS | dict(run=name, stage=stage, command=command, seed=seed, seconds=7.0, warned=[],
                        args=dict(codes=64, labels_per_class=10), result=figures)


def test_the_page_of_the_whole_method_has_every_run_and_no_empty_cell():
    records = [made_up(command) for command in tiny.COMMANDS]
    text = tiny.page(records)
    assert "--" not in {cell.strip() for cell in text.split("|")}
    assert "| pre-trained | 11.0 ± 0.6 |" in text and "Pre-training is worth 0.0 points" in text
    assert text.count("| 11.0 ± 0.6 | 11.0 ± 0.6 | 11.0 ± 0.6 | 11.0 ± 0.6 |") > 10
    with pytest.raises(UserError, match="no record of runs/beit-2, linprobe"):
        tiny.page([x for x in records if (x["run"], x["stage"]) != ("beit-2", "linprobe")])


def test_the_first_screen_takes_times_of_one_run_and_results_of_three_seeds():
    alone = [made_up(command) for command in first_screen.COMMANDS]
    lines = first_screen.screen([*alone, *[made_up(command) for command in tiny.COMMANDS]])
    assert lines[2].startswith("| `python vqkd.py` | images -> `vqkd.pt` | 7 s | 11.0 ± 0.6 of 64")
    assert "top-1 in %: 11.0 ± 0.6 (from 10 labels a class 11.0 ± 0.6)" in lines[4]


def test_the_page_on_health_tells_how_far_a_codebook_fell_and_who_was_warned():
    def lived(command, *perplexities):
        curves = [dict(step=i, perplexity=p) for i, p in enumerate(perplexities)]
        return made_up(command) | dict(curves=dict(train=curves, val=[]))
    records = [lived(command, 50.0, 30.0, 60.0) for command in health.COMMANDS]
    records[4] = lived(health.COMMANDS[4], 50.0, 20.0, 60.0)
    records[-1] |= dict(warned=[1])
    text = health.page(records).replace("\n", " ")
    assert "in the worst healthy seed to 40 % of its best" in text
    assert "0 of 10 healthy seeds were warned of, and 0 of the 3 naive ones" in text
    assert "the collapse on purpose was." in text and "step 1, at 30.0 = 47 % of K" in text
    assert "| healthy-4 | 0 | 60.0 | 20.0 (step 1) | 40 % | never | 14 of 64 | 14.0 |" in text
