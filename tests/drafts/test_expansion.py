"""When a draft that runs a model goes on looking."""

import pytest

from specserve_drafts.expansion import LookPrice


def test_where_time_does_not_count_the_option_says() -> None:
    price = LookPrice(0.1, lambda: None)
    price.took(1.0, 4)
    assert price.min_probability == 0.1


@pytest.mark.parametrize(("seconds", "expected"), [(0.0001, 0.1), (0.001, 0.45), (0.005, 2.25)])
def test_a_look_has_to_be_worth_its_pass(seconds: float, expected: float) -> None:
    """Of a target whose steps take 10 ms; above 1, nothing but the root is looked at."""
    price = LookPrice(0.1, lambda: (0.01, 0.0))
    assert price.min_probability == 0.1
    for num_passes in (1, 2, 5):
        price.took(seconds * num_passes, num_passes)
    assert price.min_probability == pytest.approx(expected)


def test_the_first_pass_is_dearer_than_another() -> None:
    """It finds no weights in the cache: what counts is what one more takes."""
    price = LookPrice(0.01, lambda: (0.01, 0.0))
    for num_passes in (1, 3, 2, 4, 1, 5) * 20:
        price.took(0.0004 + 0.0001 * num_passes, num_passes)
    assert price.min_probability == pytest.approx(0.05, abs=0.011)
    for _ in range(500):
        price.took(0.0006, 2)
    assert price.min_probability == pytest.approx(0.14, abs=0.011), "all alike: their mean"


def test_a_look_is_for_nodes_whose_successors_are_worth_a_row() -> None:
    price = LookPrice(0.01, lambda: (0.01, 0.001))
    price.took(1e-6, 1)
    assert price.min_probability == pytest.approx(0.3)
