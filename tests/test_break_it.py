"""The lab stays up to date: the text that each bug replaces is still there, and the code with the bug compiles."""

import pytest
from break_it import BREAKS, apply, copy_code


def test_every_bug_has_a_unique_name():
    assert len({mistake.name for mistake in BREAKS}) == len(BREAKS) > 15


@pytest.mark.parametrize("mistake", BREAKS, ids=lambda mistake: mistake.name)
def test_every_bug_can_be_planted_and_leaves_code_that_compiles(mistake, tmp_path):
    copy_code(tmp_path)
    before = (tmp_path / f"{mistake.file}.py").read_text()
    apply(mistake, tmp_path)
    after = (tmp_path / f"{mistake.file}.py").read_text()
    assert after != before
    compile(after, mistake.file, "exec")
