"""The check of a store at the start of a run: its log line and warnings, from sums over all ranks."""

import pytest

from megatron_slm.training.reference_check import report

TRUSTED = {
    **{"samples": 8.0, "valid": 1000.0, "student": 2500.0, "stored": 2000.0, "live": 2100.0},
    **{"competing": 800.0, "selected": 480.0, "both": 432.0, "competing_first": 100.0, "selected_first": 65.0},
}
UNTRUSTED = {
    "losses no lower than the student's": ({"stored": 2500.0}, "no lower than the student's"),
    "beginnings of samples": ({"selected_first": 80.0}, "beginnings of samples"),
    "other tokens than the model": ({"both": 360.0}, "other tokens than the model"),
}


def log_of(caplog: pytest.LogCaptureFixture, sums: dict[str, float]) -> tuple[str, list[str]]:
    caplog.clear()
    with caplog.at_level("INFO"):
        report(sums)
    line, *warnings = caplog.records
    assert line.levelname == "INFO" and all(warning.levelname == "WARNING" for warning in warnings)
    return line.getMessage(), [warning.getMessage() for warning in warnings]


def test_the_line_has_means_and_shares(caplog: pytest.LogCaptureFixture) -> None:
    line, warnings = log_of(caplog, TRUSTED)
    assert not warnings
    for figure in ("8 samples", "2.0000 stored", "2.5000 of the student", "60%", "65%", "2.1000", "90%"):
        assert figure in line


def test_figures_that_are_unknown_are_not_in_the_line(caplog: pytest.LogCaptureFixture) -> None:
    sums = {name: value for name, value in TRUSTED.items() if name not in ("live", "both")}
    line, warnings = log_of(caplog, sums | {"competing_first": 0.0, "selected_first": 0.0})
    assert "live" not in line and "middle of a document" not in line and not warnings


@pytest.mark.parametrize("reason", UNTRUSTED)
def test_a_warning_names_why_a_store_cannot_be_trusted(caplog: pytest.LogCaptureFixture, reason: str) -> None:
    changes, expected = UNTRUSTED[reason]
    _, warnings = log_of(caplog, TRUSTED | changes)
    assert len(warnings) == 1 and expected in warnings[0]
