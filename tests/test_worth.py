"""Which drafters are asked: those that earn their time, others now and then."""

from specserve.drafting.worth import Worth

STEP = 0.004  # seconds, for two tokens


def asked(worth: Worth, steps: int, seconds: float, gain: float, *, noisy: bool = False) -> int:
    """Steps of so many in which a drafter that takes and gives so much is asked."""
    count = 0
    for _ in range(steps):
        worth.begin_step()
        if worth.asks("head", noisy):
            count += 1
            worth.took("head", noisy, seconds)
            worth.judge("head", noisy, gain)
        worth.end_step(STEP, 2)
    return count


def test_a_drafter_that_earns_its_time_is_always_asked() -> None:
    assert asked(Worth(), 2000, 0.0005, 0.5) == 2000


def test_one_that_does_not_is_tried_ever_more_rarely() -> None:
    worth = Worth()
    first, later = asked(worth, 1000, 0.0005, 0.2), asked(worth, 10_000, 0.0005, 0.2)
    assert 12 <= first <= 80
    assert 0 < later <= 10_000 * 0.03


def test_it_is_back_once_the_text_suits_it() -> None:
    worth = Worth()
    asked(worth, 5000, 0.0005, 0.0)
    asked(worth, 600, 0.0005, 0.5)  # the longest pause is over
    assert asked(worth, 500, 0.0005, 0.5) == 500


def test_sampled_requests_are_judged_apart() -> None:
    worth = Worth()
    assert asked(worth, 200, 0.0005, 0.0) < 200
    assert asked(worth, 200, 0.0005, 0.5, noisy=True) == 200


def test_nothing_is_decided_before_a_trial() -> None:
    assert asked(Worth(), 11, 1.0, 0.0) == 11
