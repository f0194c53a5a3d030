from specserve_evals.drafter_conformance import DrafterConformance


class TestRepeat(DrafterConformance):
    drafter = "repeat"
