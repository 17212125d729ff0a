"""The list of bugs in mutate.py follows the code: each changes one place and still compiles."""
import pytest

import mutate


@pytest.mark.parametrize("file", mutate.BUGS)
def test_every_bug_changes_one_place_of_its_file_which_still_compiles(file):
    for name, bug, old, new, tests in mutate.selected():
        if name == file:
            assert old != new, bug
            compile(mutate.with_bug(file, old, new), f"{file} ({bug})", "exec")
            for test in tests:
                path, _, function = test.partition("::")
                assert f"def {function}" in (mutate.ROOT / path).read_text(), bug


def test_no_two_bugs_of_a_file_have_the_same_name_or_the_same_effect():
    for bugs in mutate.BUGS.values():
        assert len({bug for bug, *_ in bugs}) == len(bugs)
        assert len({(old, new) for _, old, new, *_ in bugs}) == len(bugs)


def test_a_text_that_stands_there_twice_or_never_is_refused():
    for text in ("import torch", "no such text"):
        with pytest.raises(SystemExit, match="let the list follow the code"):
            mutate.with_bug("model.py", text, "")
