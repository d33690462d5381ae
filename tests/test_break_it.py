"""The lab cannot rot: every mistake that it makes still finds its text, and what it leaves is still Python."""

import pytest
from break_it import BREAKS, apply, copy_code


def test_every_mistake_has_a_name_of_its_own():
    assert len({mistake.name for mistake in BREAKS}) == len(BREAKS) > 15


@pytest.mark.parametrize("mistake", BREAKS, ids=lambda mistake: mistake.name)
def test_every_mistake_can_be_made_and_leaves_code_that_compiles(mistake, tmp_path):
    copy_code(tmp_path)
    before = (tmp_path / f"{mistake.file}.py").read_text()
    apply(mistake, tmp_path)
    after = (tmp_path / f"{mistake.file}.py").read_text()
    assert after != before
    compile(after, mistake.file, "exec")
