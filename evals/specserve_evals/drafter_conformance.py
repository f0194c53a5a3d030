"""What every drafter must do, as a class of tests.

The test file of a drafter that is registered as `mine`:

    from specserve_evals.drafter_conformance import DrafterConformance

    class TestMine(DrafterConformance):
        drafter = "mine"

pytest runs the methods `test_*`, and so does `specserve eval conformance --draft mine`. They run
an engine over a tiny random model, with the drafter and without.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar, Final
from unittest import SkipTest

import msgspec

from specserve.engine.engine import Engine
from specserve.hub import resolve
from specserve.models.shape import ModelShape
from specserve.types import Request, SamplingParams, SpeculationParams, StepOutput
from specserve_evals.engines import open_engine, output_ids, run_requests
from specserve_evals.identity import first_difference
from specserve_evals.tiny_model import write_tiny_llama
from specserve_evals.watched_drafter import WatchedDrafter

CONTEXT: Final = 512  # tokens
SMALL: Final = {"kv_slots": 192, "max_num_batched_tokens": 48}  # sequences are preempted
PROMPTS: Final[Sequence[tuple[int, ...]]] = [
    (1, 2, 3, 4, 1, 2, 3, 4, 1, 2),
    tuple(range(20, 60)),
    (7,),
    tuple((11 * i) % 90 for i in range(150)),
]
EQUAL_PROMPTS: Final = [tuple(range(20, 60))] * 4
SAMPLING: Final = {
    "greedy": SamplingParams(temperature=0.0, max_tokens=32, seed=0),
    "sampled": SamplingParams(temperature=1.0, max_tokens=32, seed=11, ignore_eos=True),
    "nucleus": SamplingParams(temperature=0.7, top_p=0.9, top_k=20, max_tokens=32, seed=5),
    "everything": SamplingParams(
        temperature=0.9,
        min_p=0.02,
        presence_penalty=0.4,
        frequency_penalty=0.3,
        repetition_penalty=1.2,
        logit_bias={5: 3.0, 9: -20.0},
        min_tokens=6,
        stop_token_ids=(17, 40),
        max_tokens=32,
        seed=2**62,
    ),
}
ENGINES: Final[Sequence[Mapping[str, Any]]] = [
    {"max_nodes": 8},
    {"max_nodes": 3, "max_num_seqs": 1},
]

Ids = list[tuple[int, ...]]


class DrafterConformance:
    """A subclass names its drafter; one with a checkpoint also overrides `make_draft`."""

    drafter: ClassVar[str]  # the name of an installed drafter, or the directory of a draft
    options: ClassVar[Mapping[str, Mapping[str, Any]]] = {}  # by drafter, as for `LLM`
    target: ClassVar[str | None] = None  # None: a tiny random Llama of 2 layers and 97 tokens
    device: ClassVar[str] = "cpu"  # elsewhere near ties may be decided differently

    directory: ClassVar[Path]  # of the target
    draft: ClassVar[str]
    _folder: ClassVar[TemporaryDirectory[str]]
    _plain: ClassVar[dict[str, Ids]]  # what plain decoding emits, by case
    _beside_others: ClassVar[dict[int, Any] | None]  # `_trees(2)`

    @classmethod
    def make_draft(cls, target: Path, folder: Path) -> str:
        """What `draft` of the engine is. `folder` is empty, for a checkpoint made for `target`."""
        return cls.drafter

    @classmethod
    def setup_class(cls) -> None:
        given = None if cls.target is None else resolve(cls.target)
        cls._folder, cls._plain, cls._beside_others = TemporaryDirectory(), {}, None
        folder = Path(cls._folder.name)
        cls.directory = given or write_tiny_llama(folder / "target", seed=1)
        (folder / "draft").mkdir()
        cls.draft = cls.make_draft(cls.directory, folder / "draft")

    @classmethod
    def teardown_class(cls) -> None:
        cls._folder.cleanup()

    @classmethod
    def plain_engine(cls, **settings: Any) -> Engine:
        """An engine without a drafter."""
        return cls._engine("none", settings)

    @classmethod
    def watched_engine(cls, **settings: Any) -> tuple[Engine, WatchedDrafter]:
        """An engine with the drafter, which is watched."""
        engine = cls._engine(cls.draft, {"options": cls.options, **settings})
        if len(engine.parts.drafters) != 1:
            names = ", ".join(engine.parts.drafters)
            raise ValueError(f"draft: {cls.draft!r} stands for {names}; give one of them")
        ((name, drafter),) = engine.parts.drafters.items()
        watched = WatchedDrafter(drafter, engine.shape.vocab_size)
        return Engine(replace(engine.parts, drafters={name: watched})), watched

    @classmethod
    def _engine(cls, draft: str, settings: dict[str, Any]) -> Engine:
        context = min(CONTEXT, ModelShape.from_dir(cls.directory).max_position_embeddings)
        fixed = {"device": cls.device, "max_model_len": context, "max_num_seqs": 8}
        if cls.target is None:
            fixed["dtype"] = "float32"
        return open_engine(cls.directory, draft, **{**fixed, **settings})

    def plain_ids(
        self,
        case: str,
        prompts: Sequence[tuple[int, ...]],
        sampling: SamplingParams | Sequence[SamplingParams],
    ) -> Ids:
        """What plain decoding emits; run once for each `case`."""
        if case not in self._plain:
            self._plain[case] = _ids(run_requests(self.plain_engine(), prompts, sampling))
        return self._plain[case]

    def test_load(self) -> None:
        """It loads, and has every method that the engine calls."""
        self.watched_engine()

    def test_greedy(self) -> None:
        """At temperature 0 the output is that of plain decoding, alone and in batches."""
        self._compare("greedy")

    def test_sampled(self) -> None:
        """At temperature 1 it is too, for the same seed."""
        self._compare("sampled")

    def test_nucleus(self) -> None:
        """With top-k and top-p it is too."""
        self._compare("nucleus")

    def test_penalties(self) -> None:
        """With penalties, logit bias, min-p and stop tokens together it is too."""
        self._compare("everything")

    def test_tree_sizes(self) -> None:
        """Trees are valid and within the budget, from 1 to 64 nodes."""
        self._compare("sampled", [{"max_nodes": size} for size in (1, 2, 5, 64)])

    def test_odd_contexts(self) -> None:
        """It drafts after a single token, equal tokens and in a context that is full."""
        engine, watched = self.watched_engine(max_nodes=64, max_num_seqs=3)
        context, vocab_size = engine.limits.max_model_len, engine.limits.vocab_size
        prompts = [
            *((0,), (vocab_size - 1,), (5,) * 100),
            tuple(vocab_size - 1 - i % 3 for i in range(context - 9)),
            tuple(i * 7 % vocab_size for i in range(context - 1)),
        ]
        sampling = [
            SamplingParams(seed=seed, ignore_eos=True, max_tokens=min(16, context - len(prompt)))
            for seed, prompt in enumerate(prompts)
        ]
        expected = self.plain_ids("odd", prompts, sampling)
        for _ in range(2):  # the second time prompts come from the prefix cache
            _same(expected, _ids(run_requests(engine, prompts, sampling)), watched)

    def test_preemption_and_prefix_cache(self) -> None:
        """Preempted sequences and cached prompts do not change the output."""
        sampling = [
            msgspec.structs.replace(each, max_tokens=48, stop_token_ids=(), ignore_eos=True)
            for each in SAMPLING.values()
        ]
        engine, watched = self.watched_engine(max_nodes=17, **SMALL)
        expected = self.plain_ids("equal prompts", EQUAL_PROMPTS, sampling)
        for _ in range(2):
            outputs = run_requests(engine, EQUAL_PROMPTS, sampling)
            _same(expected, _ids(outputs), watched)
        _require(engine.scheduler.num_preemptions > 0, "this test is meant to preempt")
        cached = sum(output.num_cached_tokens for each in outputs for output in each)
        _require(cached > 0, "this test is meant to use the prefix cache")

    def test_aborts(self) -> None:
        """Aborted requests change no others, and their ids can be used again."""
        params = SAMPLING["sampled"]
        expected = self.plain_ids("sampled", PROMPTS, params)
        engine, watched = self.watched_engine(max_num_seqs=3)
        for index, prompt in enumerate([*PROMPTS[1:], PROMPTS[0]]):  # the last one has to wait
            engine.submit(Request(f"q{index}", prompt, params))
        for _ in range(4):
            engine.step()
        for index in (0, 1, 3):
            engine.abort(f"q{index}")
        while engine.has_work:
            engine.step()
        _same(expected, _ids(run_requests(engine, PROMPTS, params)), watched)

    def test_requests_without_drafts(self) -> None:
        """Requests beside it that are not drafted for do not change the output."""
        params = SAMPLING["sampled"]
        expected = self.plain_ids("sampled", PROMPTS, params)
        engine, watched = self.watched_engine()
        for index, prompt in enumerate(PROMPTS):
            engine.submit(Request(f"off{index}", prompt, params, SpeculationParams(enabled=False)))
            scored = SamplingParams(seed=0, max_tokens=0, prompt_logprobs=1)
            engine.submit(Request(f"scored{index}", prompt, scored))
        engine.step()
        _same(expected, _ids(run_requests(engine, PROMPTS, params)), watched)
        asked = {seq_id for seq_id, _ in watched.trees}
        _require(asked <= {f"q{index}" for index in range(len(PROMPTS))}, "it was asked for others")

    def test_repeated_calls(self) -> None:
        """A call that is made again, a sequence at a time, changes no trees."""
        once, again = self._trees_beside_others(), self._trees(2, repeats=True)
        wrong = "other trees if `propose` and `observe` are called again for each sequence alone"
        _require(once == again or self._is_random(), wrong)

    def test_cache_salts(self) -> None:
        """What it learned under one cache_salt changes no trees under another."""
        alone, beside = self._trees(0), self._trees_beside_others()
        wrong = "other trees if requests of another cache_salt ran before; what is kept beyond a "
        wrong += "request must be kept apart by `seq.cache_salt`"
        _require(alone == beside or self._is_random(), wrong)

    def test_private_attributes(self) -> None:
        """It reads public attributes of sequences only."""
        engine, watched = self.watched_engine()
        watched.hides_private = True
        prompts, params = PROMPTS[:1], SAMPLING["sampled"]
        expected = self.plain_ids("sampled", PROMPTS, params)[:1]
        _same(expected, _ids(run_requests(engine, prompts, params)), watched)

    def test_forget(self) -> None:
        """It keeps nothing of requests that finished, were aborted or preempted."""
        engine, watched = self.watched_engine(**SMALL)
        seq_ids = {f"request-{index}" for index in range(4)}
        for seed, seq_id in enumerate(sorted(seq_ids)):
            params = SamplingParams(seed=seed, max_tokens=64, ignore_eos=True)
            engine.submit(Request(seq_id, EQUAL_PROMPTS[0], params))
        for _ in range(6):
            engine.step()
        engine.abort("request-1")
        while engine.has_work:
            engine.step()
        _require(engine.scheduler.num_preemptions > 0, "this test is meant to preempt")
        engine.drafter.forget("of a request that was never drafted for")
        _no_errors(watched)
        kept = watched.kept_of(seq_ids)
        _require(kept is None, f"after all requests were forgotten, {kept}")

    def _compare(self, setting: str, engines: Sequence[Mapping[str, Any]] = ENGINES) -> None:
        """The output of engines with these settings is that of plain decoding."""
        expected = self.plain_ids(setting, PROMPTS, SAMPLING[setting])
        for settings in engines:
            engine, watched = self.watched_engine(**settings)
            outputs = run_requests(engine, PROMPTS, SAMPLING[setting])
            _same(expected, _ids(outputs), watched, f" with {settings}")

    def _is_random(self) -> bool:
        """False. Raises SkipTest if trees of different runs cannot be compared."""
        if self._trees(2) != self._trees_beside_others():
            raise SkipTest("two runs of the same requests get different trees")
        return False

    def _trees(self, num_others: int, *, repeats: bool = False) -> dict[int, Any]:
        """The trees for one request, by its number of tokens.

        Before it and beside it run requests for the same answer, under another salt.
        """
        engine, watched = self.watched_engine(cost_aware=False)
        params = SAMPLING["sampled"]
        for start in ("before", "beside"):
            if start == "beside":
                watched.repeats = repeats
                engine.submit(Request("it", PROMPTS[0], params, cache_salt="its own"))
            for index in range(num_others):
                seq_id = f"{start}{index}"
                engine.submit(Request(seq_id, PROMPTS[0], params, cache_salt="of others"))
            while engine.has_work:
                engine.step()
        _no_errors(watched)
        return {
            num_tokens: (tree.tokens.tolist(), tree.parents.tolist())
            for (seq_id, num_tokens), tree in watched.trees.items()
            if seq_id == "it"
        }

    def _trees_beside_others(self) -> dict[int, Any]:
        """The same for two others, from a run that several checks use."""
        found = self._beside_others
        if found is None:
            found = type(self)._beside_others = self._trees(2)
        return found


def _ids(outputs: Sequence[Sequence[StepOutput]]) -> Ids:
    return [output_ids(each) for each in outputs]


def _same(expected: Ids, found: Ids, watched: WatchedDrafter, where: str = "") -> None:
    """Raise AssertionError if token ids differ or a call of the drafter failed."""
    _no_errors(watched, where)
    for index, (left, right) in enumerate(zip(expected, found, strict=True)):
        if (difference := first_difference(str(index), left, right)) is not None:
            raise AssertionError(
                f"prompt {index}, output position {difference.position}: token "
                f"{difference.found} instead of {difference.expected}{where}"
            )


def _no_errors(watched: WatchedDrafter, where: str = "") -> None:
    if watched.errors:
        more = f"; {len(watched.errors)} errors in all" if len(watched.errors) > 1 else ""
        raise AssertionError(f"{watched.errors[0]}{where}{more}")


def _require(holds: bool, otherwise: str) -> None:
    if not holds:
        raise AssertionError(otherwise)
