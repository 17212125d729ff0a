"""results.kills: which trials are made, what counts, and what the page says of them."""
import argparse
import itertools
import json
import os
import subprocess

import pytest
import torch

import vqkd
from results import kills
from support.files import Log
from support.process import Process
from support.run import Run


def test_any_two_of_stage_signal_and_way_to_run_meet_in_the_stop_trials():
    cases = [(x["stage"], x["signal"], (x["workers"], x["processes"])) for x in kills.stop_cases()]
    assert len(set(cases)) == len(cases) == 25
    values = [kills.STAGES, kills.SIGNALS, kills.WAYS]
    for (i, some), (j, others) in itertools.combinations(enumerate(values), 2):
        assert {(x[i], x[j]) for x in cases} == set(itertools.product(some, others))


def test_killed_runs_take_every_moment_stage_and_way():
    cases = list(itertools.islice(kills.kill_cases(), 20))
    assert {(x["aim"], x["stage"]) for x in cases} == set(
        itertools.product(kills.MOMENTS, kills.STAGES))
    assert {(x["workers"], x["processes"]) for x in cases} == set(kills.WAYS)
    assert [x["number"] for x in cases] == list(range(25, 45))


def test_trials_that_left_no_resume_file_are_made_up_for_and_none_is_made_twice():
    records = []
    for case in kills.missing(records, each=2):
        first = case["aim"] == "in a step" and case["number"] < 30
        records.append(case | dict(met=None if first else case["aim"]))
    numbers = [x["number"] for x in records]
    assert len(set(numbers)) == len(numbers)
    killed = [x["met"] for x in records if x["signal"] == "SIGKILL"]
    assert [killed.count(moment) for moment in kills.MOMENTS] == [2, 2, 2, 2]
    assert killed.count(None) == 2
    assert not list(kills.missing(records, each=2))


TRAINING = dict(step=6, lr=0.1)
LEFT = {  # moment: the last line of the log, the files
    "in a step": (TRAINING, ["resume.pt"]),
    "writing a checkpoint": (TRAINING, ["resume.pt", "resume.pt.tmp"]),
    "between epochs": (TRAINING | dict(step=7), ["resume.pt", "resume.pt.prev"]),
    "after an evaluation": (dict(step=7, split="val"), ["resume.pt"])}


@pytest.mark.parametrize("moment", LEFT)
def test_the_moment_of_a_kill_is_read_from_what_it_left(tmp_path, moment):
    last, files = LEFT[moment]
    half = '{"step": 7, "lo'
    log = tmp_path / "vqkd.jsonl"
    log.write_text(f"{json.dumps(dict(step=5))}\n{json.dumps(last)}\n{half}")
    assert kills.moment_met(tmp_path, "vqkd") is None        # nothing to resume
    for name in files:
        (tmp_path / f"vqkd.{name}").touch()
    assert kills.moment_met(tmp_path, "vqkd") == moment
    (tmp_path / "vqkd.pt").touch()           # it came to its end
    assert kills.moment_met(tmp_path, "vqkd") is None


def test_what_a_stop_must_not_do_is_named(tmp_path):
    case = dict(stage="vqkd", signal="SIGTERM", processes=1)
    assert kills.stopped_badly(143, case, "SIGTERM: saved") == []
    assert kills.stopped_badly(1, case, "Traceback (most recent") == [
        "exit code 1, not 143", "traceback"]
    assert kills.stopped_badly(0, case | dict(processes=2), "") == ["exit code 0"]
    assert kills.lost(tmp_path / "vqkd.resume.pt", 4) == ["no resume file"]
    torch.save(dict(step=3), tmp_path / "vqkd.resume.pt")
    assert kills.lost(tmp_path / "vqkd.resume.pt", 3) == []
    assert kills.lost(tmp_path / "vqkd.resume.pt", 4) == ["4 steps done, 3 saved"]


def test_steps_are_counted_without_the_line_about_the_run_and_those_of_evaluations(tmp_path):
    class Optimizer:
        param_groups = [dict(lr=0.1)]

    log = Log(tmp_path / "vqkd.jsonl", vqkd.parse_args([]), Process())
    run = argparse.Namespace(
        log_file=log, clock=0, clock_step=0, steps_per_epoch=1, total_steps=9, print=print,
        args=vqkd.parse_args([]), parts=dict(optimizer=Optimizer), check=lambda now: 0)
    for run.step in range(3):
        Run.log(run, loss=1.0)
    Run.log_evaluation(run, dict(cosine=0.1))
    assert kills.steps_logged(log.path) == 3
    assert kills.steps_logged(tmp_path / "no log yet") == 0


def test_processes_of_a_run_are_found_with_their_children():
    child = subprocess.Popen(["sleep", "60"])
    assert {os.getpid(), child.pid} <= set(kills.family(os.getpid()))
    child.kill()
    child.wait()
    assert not kills.is_running(child.pid)
    assert kills.is_running(os.getpid())
    assert not kills.is_running(2**22 + 1)                   # no Linux has so many
