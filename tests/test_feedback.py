"""What drafters get of a forward pass: tokens, hidden states and logits that belong together."""

import torch
from tiny import EngineFactory

from specserve.engine.engine import Engine
from specserve.speculation.drafter import Feedback
from specserve.types import Request, SamplingParams

PROMPTS = [(1, 2, 3, 4, 1, 2, 3, 4, 1, 2), tuple(range(20, 60)), (7,), tuple(range(50))]


def check_feedback(engine: Engine) -> int:
    """Run PROMPTS and check every feedback. Returns how many accepted paths were no first nodes."""
    texts: dict[str, list[int]] = {}
    num_moved = 0
    model = engine.runner.model

    def check(feedback: Feedback) -> None:
        nonlocal num_moved
        for seq in feedback.seqs:
            committed = feedback.committed(seq)
            num_moved += committed.rows[-1] - committed.rows[0] >= len(committed.rows)
            text = texts.setdefault(seq.id, [])
            del text[committed.start :]  # what was computed again after a preemption
            assert len(text) == committed.start
            text += committed.tokens
            states = feedback.hidden_states([0], committed.rows)
            assert states is not None
            # The residual stream before layer 0 is the embedding.
            assert torch.equal(states, model.embed(torch.tensor(committed.tokens)))
            if seq.id in feedback.results:
                result, logits = feedback.results[seq.id], feedback.output.logits
                best = logits[feedback.node_rows(seq)].argmax(-1)[list(result.path)]
                assert best.tolist() == list(result.emitted)

    engine.observe((0, 2), check)
    for index, prompt in enumerate(PROMPTS):
        params = SamplingParams(temperature=0.0, max_tokens=64, seed=0, ignore_eos=True)
        engine.submit(Request(f"q{index}", prompt, params))
    outputs: dict[str, list[int]] = {f"q{index}": [*p] for index, p in enumerate(PROMPTS)}
    while engine.has_work:
        for output in engine.step():
            outputs[output.id] += output.ids
    assert len(texts) == len(PROMPTS)
    for seq_id, text in texts.items():
        assert text == outputs[seq_id][: len(text)]
        assert len(outputs[seq_id]) - len(text) <= 1, "all but the last token are committed"
    return num_moved


def test_committed_tokens_have_their_own_hidden_states(make_engine: EngineFactory) -> None:
    """Of prompts in chunks, of accepted branches anywhere in a tree, and after a preemption."""
    engine = make_engine("recycle", max_nodes=12, kv_slots=192, max_num_batched_tokens=48)
    assert check_feedback(engine) > 0, "the test is meant to accept branches"
    assert engine.scheduler.num_preemptions > 0, "the test is meant to preempt"


def test_hidden_states_of_chosen_layers_and_sequences(make_engine: EngineFactory) -> None:
    engine = make_engine("none")
    seen = 0

    def check(feedback: Feedback) -> None:
        nonlocal seen
        whole = feedback.output.aux_hidden_states
        assert whole is not None
        size = whole.shape[1] // 3
        parts = torch.split(whole, size, dim=1)
        last = feedback.seqs[-1]
        alone = feedback.only([last.id])
        assert [seq.id for seq in alone.seqs] == [last.id]
        assert set(alone.results) == {last.id} & set(feedback.results)
        rows = alone.committed(last).rows
        assert rows[-1] == len(whole) - 1
        states = alone.hidden_states([2, 0], rows)
        assert states is not None
        assert torch.equal(states, torch.cat([parts[2], parts[0]], dim=1)[list(rows)])
        seen += 1

    engine.observe((0, 1, 2), check)
    for index, prompt in enumerate(PROMPTS):
        engine.submit(Request(f"q{index}", prompt, SamplingParams(max_tokens=4, seed=0)))
    while engine.has_work:
        engine.step()
    assert seen >= 4
