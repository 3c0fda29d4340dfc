import pytest

from services.cli.restart_policy import RestartPolicy

POLICY = RestartPolicy(first_pause=0.5, longest_pause=10, most_deaths=5, window=60)


def test_pauses_double_until_there_were_too_many_deaths() -> None:
    deaths: list[float] = []
    pauses = []
    for death in (0.0, 1.0, 2.0, 3.0, 4.0):
        deaths.append(death)
        pauses.append(POLICY.pause_after(deaths, exit_status=1))
    assert pauses == [0.5, 1.0, 2.0, 4.0, None]


def test_a_pause_has_an_upper_limit() -> None:
    patient = RestartPolicy(first_pause=0.5, longest_pause=10, most_deaths=100)
    assert patient.pause_after([0.0] * 50, exit_status=1) == 10


def test_old_deaths_are_forgotten() -> None:
    assert POLICY.pause_after([0, 1, 2, 3, 60.5], exit_status=1) == 4.0
    assert POLICY.pause_after([0, 1, 2, 3, 1000], exit_status=1) == 0.5


@pytest.mark.parametrize("exit_status", [0, 1, -9])
def test_every_kind_of_end_is_a_death(exit_status: int) -> None:
    assert POLICY.pause_after([7], exit_status) == 0.5


def test_wrong_settings_are_given_up_at_once() -> None:
    assert POLICY.pause_after([0], exit_status=2) is None
