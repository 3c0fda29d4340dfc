"""A program's output is taken only if it ended well; otherwise its end is told."""

import sys

import pytest

from benchmarks.programs import ProgramError, output


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def test_the_output_is_what_was_printed() -> None:
    assert output(python("print('one line')")) == "one line\n"


def test_the_environment_is_added_to() -> None:
    code = "import os; print(os.environ['ADDED'], 'PATH' in os.environ)"
    assert output(python(code), environment={"ADDED": "yes"}) == "yes True\n"


def test_a_failure_is_told_with_its_status_and_its_last_lines() -> None:
    code = "import sys; print('a\\nb\\nc\\nd', file=sys.stderr); sys.exit(3)"
    with pytest.raises(ProgramError, match=r"ended with status 3: b \| c \| d$"):
        output(python(code))


def test_an_abort_is_told_by_its_signal() -> None:
    with pytest.raises(ProgramError, match="SIGABRT"):
        output(python("import os; os.abort()"))


def test_a_missing_program_is_told() -> None:
    with pytest.raises(ProgramError, match="no-such-program is not there"):
        output(["/no-such-program"])
