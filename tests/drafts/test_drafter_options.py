"""Options of drafters that do not run are refused, because they would have no effect."""

from typing import Any

import pytest
from tiny import EngineFactory

from specserve.speculation.drafter import DraftError

MATCH = {"max_match": 3}


@pytest.mark.parametrize(
    ("draft", "options", "message"),
    [
        ("ngram", {"ngramm": MATCH}, "options.ngramm: 'ngramm' is no drafter.* mean 'ngram'"),
        ("ngram", {"suffix": {}}, "options.suffix: 'suffix' does not run here.*: ngram; remove"),
        ("none", {"ngram": MATCH}, "options.ngram: 'ngram' does not run here"),
        ("auto", {"eagle": {"beam": 2}}, "options.eagle: 'eagle' does not run here.*: recycle;"),
        ("auto", {"auto": {}}, "options.auto: 'auto' is no drafter"),
        ("ngram", {"ngram": {"max_mtch": 3}}, "options.ngram.max_mtch: unknown.* 'max_match'"),
        ("ngram", {"ngram": {"depth": 3}}, "options.ngram.depth: .*: min_match, max_match"),
        ("ngram", {"ngram": {"max_match": "x"}}, "options.ngram.max_match: 'x'; expected int"),
        ("ngram", {"ngram": MATCH, "": {}}, "options.: '' is no drafter"),
    ],
)
def test_options_of_others_are_refused(
    draft: str, options: dict[str, Any], message: str, make_engine: EngineFactory
) -> None:
    with pytest.raises(DraftError, match=rf"^draft\.{message}"):
        make_engine(draft, options=options)


def test_options_of_those_that_run_are_taken(make_engine: EngineFactory) -> None:
    make_engine(["ngram", "recycle"], options={"ngram": MATCH, "recycle": {"contexts": 2**12}})
    make_engine("auto", options={"recycle": {"contexts": 2**12}})
