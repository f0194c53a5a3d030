"""Which processes of a server count as left over or missing."""

from specserve_evals.vitals import IDLE, TASKS, ProcessVitals, Vitals, leftovers, without_replaced


def vitals(*processes: tuple[str, int]) -> Vitals:
    """Vitals of an idle server with these processes, as (role, process id)."""
    return Vitals(
        tuple(ProcessVitals(role, pid, 5, 1, 0) for role, pid in processes),
        dict.fromkeys((*IDLE, TASKS), 0.0),
    )


THEN = vitals(("http", 1), ("engine", 2), ("tokenizer", 3), ("tokenizer", 4))


def test_a_process_that_ended_is_named() -> None:
    now = vitals(("http", 1), ("engine", 2), ("tokenizer", 3), ("tokenizer", 5))
    assert leftovers(now, THEN) == ["the tokenizer process of the baseline has ended"]


def test_a_replaced_process_may_be_left_out() -> None:
    now = vitals(("http", 1), ("engine", 2), ("tokenizer", 3), ("tokenizer", 5))
    assert leftovers(now, without_replaced(now, THEN, "tokenizer")) == []
    other = vitals(("http", 1), ("engine", 6), ("tokenizer", 3), ("tokenizer", 4))
    assert leftovers(other, without_replaced(other, THEN, "tokenizer")) == [
        "the engine process of the baseline has ended"
    ]


def test_a_process_that_was_not_replaced_is_named() -> None:
    now = vitals(("http", 1), ("engine", 2), ("tokenizer", 3))
    assert leftovers(now, without_replaced(now, THEN, "tokenizer")) == [
        "the tokenizer process of the baseline has ended"
    ]
