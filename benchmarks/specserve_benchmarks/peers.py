"""Compares the speed of specserve and of other inference engines on the same prompts.

python -m specserve_benchmarks.peers --prompts spec_bench.jsonl --llama-cpp PYTHON --vllm PYTHON

Every engine runs in a process of its own; while one works, the others wait. They take turns prompt
by prompt, with the same token ids, number of threads and number of new tokens. See PEERS.md.
"""

import argparse
import os
import statistics
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from itertools import chain, cycle, islice
from pathlib import Path
from typing import Any, Final

import msgspec
import torch
from msgspec import Struct

import specserve_benchmarks
from specserve.cli.parser import OPTIONAL_TARGET_HELP, PROMPTS_HELP
from specserve.cli.progress import show_progress
from specserve.config import TargetConfig
from specserve.hub import resolve
from specserve.hub.gguf_file import WEIGHTS_NAME
from specserve.llm import LLM
from specserve_benchmarks.bandwidth import read_bandwidth
from specserve_benchmarks.dense_weights import write_dense
from specserve_benchmarks.flags import add_repeats, add_results
from specserve_benchmarks.peer_process import Peer
from specserve_benchmarks.peers_report import Report, Roofline, Run, markdown, table
from specserve_evals import provenance
from specserve_evals.progress import stdout_console, track
from specserve_evals.prompts import Prompt, load_prompts, select
from specserve_evals.runs import PLAIN as NO_DRAFT
from specserve_evals.runs import at_least_one, parse_variants

PEERS: Final = {  # flag -> name, child program, whether it can run several requests together
    "llama_cpp": ("llama.cpp", "llama_cpp", False),
    "openvino": ("OpenVINO", "openvino", False),
    "vllm": ("vLLM", "vllm", True),
    "transformers": ("transformers", "transformers", False),
}
OURS: Final = "specserve"
PLAIN: Final = f"{OURS} none"  # specserve with plain decoding


class Chosen(Struct, frozen=True):
    prompt: Prompt
    ids: tuple[int, ...]


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code: 0 measured and written; 2 wrong usage, or an engine does not run."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    args = build_parser().parse_args(arguments)
    try:
        run(args, arguments)
    except ValueError as error:
        print(f"peers: error: {error}", file=sys.stderr)
        return 2
    return 0


def run(args: argparse.Namespace, arguments: Sequence[str]) -> None:
    torch.set_num_threads(args.threads)
    console = stdout_console()
    with show_progress() as progress:
        model = resolve(args.target, progress=progress)
        llm = LLM(str(model), draft="none", max_model_len=args.max_prompt)
    chosen = choose(llm, args)
    origin = provenance.collect(
        "specserve_benchmarks.peers", arguments, llm.engine.platform, args.prompts
    )
    del llm
    with ExitStack() as stack:
        work = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        peers = start(args, model, work, stack)
        baseline = args.against or next(
            (name for name in peers if not name.startswith(OURS)), PLAIN
        )
        for flag, name in (("--against", baseline), ("--batch-against", args.batch_against)):
            if name not in peers:
                raise ValueError(f"{flag} {name}: not among {', '.join(peers)}")
        for peer in peers.values():
            peer.generate([chosen[0].ids], 8)
        single, starts = one_at_a_time(peers, chosen, args)
        ttft = first_tokens(peers, chosen, args)
        batch = together(peers, chosen, args)
        report = Report(
            provenance=origin,
            versions={name: peer.ready.version for name, peer in peers.items()},
            load_s={name: peer.ready.load_s for name, peer in peers.items()},
            same_start=starts,
            single=table(single, baseline),
            drafts=table([run for run in single if run.engine.startswith(OURS)], PLAIN),
            ttft=table(ttft, baseline),
            batch=table(batch, args.batch_against),
            roofline=roofline(peers[PLAIN], chosen[0].ids, model, args.max_tokens),
            runs=[*single, *ttft, *batch],
        )
    text = markdown(report)
    console.print(text, markup=False)
    args.out.mkdir(parents=True, exist_ok=True)
    stem = args.out / f"{origin.date[:10]}-cpu-{args.name}"
    stem.with_suffix(".json").write_bytes(
        msgspec.json.format(msgspec.json.encode(report), indent=2)
    )
    stem.with_suffix(".md").write_text(text, encoding="utf-8")
    console.print(f"written: {stem}.json and {stem}.md")


def choose(llm: LLM, args: argparse.Namespace) -> list[Chosen]:
    """Select prompts, and encode them with specserve's tokenizer and the target's chat template."""
    prompts = select(
        load_prompts(args.prompts),
        per_category=args.per_category,
        fits=lambda prompt: len(llm.encode(prompt.messages)) + args.max_tokens <= args.max_prompt,
    ).prompts
    return [Chosen(prompt, llm.encode(prompt.messages)) for prompt in prompts]


def start(args: argparse.Namespace, model: Path, work: Path, stack: ExitStack) -> dict[str, Peer]:
    """Start every requested engine, those of specserve first; `stack` closes them.

    `work` is a temporary directory. Raises PeerError if an engine does not start.
    """
    longest = max(args.max_prompt, (args.ttft or 0) + 1)
    settings: dict[str, Any] = {
        "target": str(model),
        "gguf": str((model / WEIGHTS_NAME).resolve()),
        "dense": str(work / "dense"),
        "threads": args.threads,
        "context": longest,
        "batch": max(args.batch or [1]),
        "lookup": False,
        "engine": {},
    }
    if args.quantization is not None:
        settings["engine"]["quantization"] = args.quantization
    threads = {"OMP_NUM_THREADS": str(args.threads), "GOMP_SPINCOUNT": "20000"}
    alone = {
        **threads,
        "PYTHONPATH": str(Path(specserve_benchmarks.__file__).parents[1]),
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_KVCACHE_SPACE": "2",
        "HF_HUB_OFFLINE": "1",
    }
    peers: dict[str, Peer] = {}

    def add(
        name: str, program: str, python: Path, own: dict[str, Any], env: dict[str, str]
    ) -> None:
        peer = Peer(name, program, python, {**settings, **own}, env)
        peers[name] = stack.enter_context(peer)

    for variant in (NO_DRAFT, *parse_variants(args.draft or ["none"])):
        add(f"{OURS} {variant.name}", OURS, Path(sys.executable), {"draft": variant.draft}, threads)
    for flag, (name, program, _) in PEERS.items():
        python = getattr(args, flag)
        if python is None:
            continue
        if flag in ("vllm", "transformers") and not (work / "dense").exists():
            write_dense(model, work / "dense")
        add(name, program, python, {}, alone)
        if args.lookup:
            add(f"{name} lookup", program, python, {"lookup": True}, alone)
    return peers


def one_at_a_time(
    peers: dict[str, Peer], chosen: Sequence[Chosen], args: argparse.Namespace
) -> tuple[list[Run], dict[str, float]]:
    """Run every prompt on every engine, one request at a time.

    Also returns, by engine, the median number of first tokens that agree with `PLAIN`.
    """
    runs: list[Run] = []
    same: dict[str, list[int]] = {}
    for repeat, one, names in turns(peers, chosen, args.repeats, "one at a time"):
        ours: tuple[int, ...] = ()
        for name in names:
            answer = peers[name].generate([one.ids], args.max_tokens)
            tokens = answer.tokens[0]
            ours = tokens if name == PLAIN else ours
            same.setdefault(name, []).append(common_start(tokens, ours))
            category, prompt = one.prompt.category, one.prompt.id
            runs.append(Run(name, category, prompt, repeat, 1, len(tokens), answer.seconds))
    return runs, {name: statistics.median(lengths) for name, lengths in same.items()}


def first_tokens(
    peers: dict[str, Peer], chosen: Sequence[Chosen], args: argparse.Namespace
) -> list[Run]:
    """Time the first token after prompts of `--ttft` tokens, cut from the chosen prompts' ids."""
    if args.ttft is None:
        return []
    runs = []
    stream = cycle(chain.from_iterable(one.ids for one in chosen))
    for repeat in range(args.repeats):
        ids = list(islice(stream, args.ttft))
        for name, peer in peers.items():
            answer = peer.generate([ids], 1)
            runs.append(Run(name, f"{args.ttft} tokens", "", repeat, 1, 1, answer.seconds))
    return runs


def together(
    peers: dict[str, Peer], chosen: Sequence[Chosen], args: argparse.Namespace
) -> list[Run]:
    """Time batches of requests submitted at once, on the engines that can run them together."""
    able = {name for name, _, batches in PEERS.values() if batches}
    names = [name for name in peers if name.startswith(OURS) or name.split(" lookup")[0] in able]
    runs = []
    for repeat in range(args.repeats):
        for size in args.batch or []:
            ids = [one.ids for one in islice(cycle(chosen), size)]
            for name in names:
                answer = peers[name].generate(ids, args.max_tokens)
                count = sum(map(len, answer.tokens))
                runs.append(Run(name, f"batch {size}", "", repeat, size, count, answer.seconds))
    return runs


def turns(
    peers: dict[str, Peer], chosen: Sequence[Chosen], repeats: int, label: str
) -> Iterator[tuple[int, Chosen, list[str]]]:
    """Yield each prompt once per repeat, with the engines in the order in which they run.

    `PLAIN` is first; the order of the others is reversed in every second repeat.
    """
    others = [name for name in peers if name != PLAIN]
    with track(len(chosen) * repeats) as advance:
        for repeat in range(repeats):
            for one in chosen:
                yield repeat, one, [PLAIN, *(others[::-1] if repeat % 2 else others)]
                advance(1, label)


def common_start(a: Sequence[int], b: Sequence[int]) -> int:
    """The number of first tokens that two answers share."""
    return next(
        (i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b))
    )


def roofline(plain: Peer, ids: Sequence[int], model: Path, max_tokens: int) -> Roofline:
    """Measure plain decoding in a short context, for comparison with reading all weights once.

    The time per token comes from the difference between a long answer and one of a single token, so
    that the time of the prompt cancels out.
    """
    short = list(ids)[:64]
    per_token = []
    for _ in range(7):
        long = plain.generate([short], max_tokens).seconds
        per_token.append((long - plain.generate([short], 1).seconds) / (max_tokens - 1))
    files = (
        [model / WEIGHTS_NAME] if (model / WEIGHTS_NAME).exists() else model.glob("*.safetensors")
    )
    return Roofline(
        sum(file.stat().st_size for file in files), read_bandwidth(), statistics.median(per_token)
    )


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m specserve_benchmarks.peers",
        description="Run specserve and other engines on the same prompts, in turn.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--prompts", type=Path, required=True, metavar="FILE.jsonl", help=PROMPTS_HELP
    )
    parser.add_argument("--target", default=TargetConfig().target, help=OPTIONAL_TARGET_HELP)
    for flag, (name, _, _) in PEERS.items():
        parser.add_argument(
            f"--{flag.replace('_', '-')}",
            type=Path,
            metavar="PYTHON",
            help=f"Python of an environment with {name}; without this flag {name} is left out",
        )
    parser.add_argument(
        "--draft",
        action="append",
        default=[],
        metavar="NAME[,NAME]",
        help="also run specserve with these drafters, as of `specserve serve`; repeatable, each is "
        "an engine of its own. not given: only 'none', which always runs",
    )
    parser.add_argument("--lookup", action="store_true", help="also the peers' own prompt lookup")
    parser.add_argument("--quantization", metavar="FORMAT", help="of specserve; not given: auto")
    parser.add_argument(
        "--per-category",
        type=at_least_one,
        default=2,
        metavar="N",
        help="number of prompts of each category (default: %(default)s)",
    )
    parser.add_argument(
        "--max-tokens",
        type=at_least_one,
        default=128,
        metavar="N",
        help="most tokens of an answer (default: %(default)s)",
    )
    parser.add_argument(
        "--max-prompt",
        type=at_least_one,
        default=2048,
        metavar="N",
        help="skip prompts longer than this with their answer (default: %(default)s)",
    )
    add_repeats(parser, 3)
    parser.add_argument(
        "--threads",
        type=at_least_one,
        default=os.cpu_count() or 1,
        metavar="N",
        help="of every engine (default: %(default)s)",
    )
    parser.add_argument(
        "--ttft",
        type=at_least_one,
        metavar="TOKENS",
        help="also measure the time to the first token, with prompts this long",
    )
    parser.add_argument(
        "--batch",
        type=at_least_one,
        nargs="+",
        metavar="N",
        help="also measure so many requests together",
    )
    parser.add_argument("--against", metavar="ENGINE", help="baseline; not given: the first peer")
    parser.add_argument(
        "--batch-against", default=PLAIN, metavar="ENGINE", help="of --batch (default: %(default)s)"
    )
    parser.add_argument("--name", default="peers", help="of the result (default: %(default)s)")
    add_results(parser)
    return parser


if __name__ == "__main__":
    sys.exit(main())
