"""The least path probability at which a drafter with a model expands a node."""

import pytest

from specserve_drafts.expansion import ExpansionThreshold


def test_without_step_times_the_threshold_is_the_option() -> None:
    threshold = ExpansionThreshold(0.1, lambda: None)
    threshold.record(1.0, 4)
    assert threshold.min_probability == 0.1


@pytest.mark.parametrize(("seconds", "expected"), [(0.0001, 0.1), (0.001, 0.45), (0.005, 2.25)])
def test_the_threshold_rises_with_the_time_of_an_expansion_step(
    seconds: float, expected: float
) -> None:
    """For a target whose steps take 10 ms; above 1, nothing but the root is expanded."""
    threshold = ExpansionThreshold(0.1, lambda: (0.01, 0.0))
    assert threshold.min_probability == 0.1
    for num_steps in (1, 2, 5):
        threshold.record(seconds * num_steps, num_steps)
    assert threshold.min_probability == pytest.approx(expected)


def test_the_time_of_one_more_step_counts_not_that_of_the_first() -> None:
    """The first step takes longer, as its weights are not in the CPU cache."""
    threshold = ExpansionThreshold(0.01, lambda: (0.01, 0.0))
    for num_steps in (1, 3, 2, 4, 1, 5) * 20:
        threshold.record(0.0004 + 0.0001 * num_steps, num_steps)
    assert threshold.min_probability == pytest.approx(0.05, abs=0.011)
    for _ in range(500):
        threshold.record(0.0006, 2)
    assert threshold.min_probability == pytest.approx(0.14, abs=0.011), "equal counts: the mean"


def test_the_threshold_rises_with_the_time_to_verify_a_node() -> None:
    threshold = ExpansionThreshold(0.01, lambda: (0.01, 0.001))
    threshold.record(1e-6, 1)
    assert threshold.min_probability == pytest.approx(0.3)
