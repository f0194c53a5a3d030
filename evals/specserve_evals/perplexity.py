"""Measures what a weight format costs in quality: the perplexity of a text under each format.

specserve eval perplexity --text FILE --quantization none --quantization auto

Every format is measured on the same windows of the same tokens; the first format is the reference.
Each window starts with an empty context, and all of its tokens but the first are predicted. The
model is loaded as the engine loads it, and its forward passes are of the size of a prefill.
"""

import argparse
import gc
import math
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final

import msgspec
import torch
from msgspec import Struct
from torch import Tensor

from specserve.batch import build_batch, prefill_segments
from specserve.cache.storage import KVStorage
from specserve.cache.table import BlockTable
from specserve.cli.parser import OPTIONAL_TARGET_HELP
from specserve.cli.progress import show_progress
from specserve.config import TargetConfig
from specserve.engine.device import choose_platform
from specserve.field_help import ENGINE_HELP
from specserve.hub import resolve
from specserve.models.loader import load_model
from specserve.models.model import Model
from specserve.text import Tokenizer
from specserve.types import Quantization
from specserve_evals import provenance
from specserve_evals.progress import Advance, plain_table, stdout_console, track
from specserve_evals.prompts import load_prompts
from specserve_evals.runs import at_least_one

BLOCK: Final = 32  # slots per KV block
PASS_ROWS: Final = 512  # tokens per forward pass
FORMATS: Final = ("none", "int8", "int4", "auto")


class FormatResult(Struct, frozen=True):
    """The perplexity of one format, and its ratio to that of the reference in the same windows."""

    quantization: str
    dtype: str
    kernels: str
    weight_bytes: int
    perplexity: float
    ratio: float  # to the reference's perplexity
    log_ratio_error: float  # standard error of log(ratio), with the windows as the sample
    window_losses: tuple[float, ...]  # by window, the sum over its tokens in nats


class Report(Struct, frozen=True):
    provenance: provenance.Provenance
    num_predicted: int
    window: int
    formats: list[FormatResult]


def window_loss(model: Model, tokens: Sequence[int], kv: KVStorage) -> float:
    """The sum of -log P(token | the tokens before it) over tokens[1:], in nats.

    `kv` needs a slot for each of `tokens`; its content is overwritten.
    """
    table = BlockTable(BLOCK, list(range(-(-len(tokens) // BLOCK))))
    total = 0.0
    for start in range(0, len(tokens), PASS_ROWS):
        chunk = tokens[start : start + PASS_ROWS]
        segments = prefill_segments(table, start, chunk)
        rows = [replace(segment, wants_logits=True) for segment in segments]
        batch = build_batch(rows, BLOCK, model.row_multiple, kv.data.device)
        logits = model(batch, kv).logits
        following = tokens[start + 1 : start + 1 + len(chunk)]
        total += _losses(logits[: len(following)], following)
    return total


def _losses(logits: Tensor, tokens: Sequence[int]) -> float:
    total = 0.0
    for first in range(0, len(tokens), 64):  # bounds the size of the float64 copy
        wanted = torch.tensor(tokens[first : first + 64], device=logits.device)
        rows = logits[first : first + 64].double()
        total += torch.nn.functional.cross_entropy(rows, wanted, reduction="sum").item()
    return total


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code: 0 every ratio is within `--within` of 1; 1 one is not; 2 wrong usage."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    args = build_parser().parse_args(arguments)
    try:
        return run(args, arguments)
    except ValueError as error:
        print(f"specserve eval perplexity: error: {error}", file=sys.stderr)
        return 2


def run(args: argparse.Namespace, arguments: Sequence[str]) -> int:
    console = stdout_console()
    with show_progress() as progress:
        directory = resolve(args.target, progress=progress)
    windows = read_windows(args, Tokenizer(directory))
    num_predicted = sum(len(window) - 1 for window in windows)
    formats: list[FormatResult] = []
    with track(len(windows) * len(args.quantization)) as advance:
        for name in args.quantization:
            formats.append(measure(directory, name, args, windows, formats, advance))
    platform = choose_platform(TargetConfig(dtype=args.dtype))
    origin = provenance.collect("specserve_evals.perplexity", arguments, platform, args.text)
    table = plain_table("weights", "MB", "dtype", "kernels", "perplexity", "ratio", "+-")
    for row in formats:
        table.add_row(
            row.quantization,
            f"{row.weight_bytes / 1e6:.1f}",
            row.dtype,
            row.kernels,
            f"{row.perplexity:.4f}",
            f"{row.ratio:.5f}",
            "-" if math.isnan(row.log_ratio_error) else f"{row.log_ratio_error:.5f}",
        )
    console.print(table)
    console.print(f"{num_predicted} tokens predicted in {len(windows)} windows")
    if args.out is not None:
        report = Report(origin, num_predicted, args.window, formats)
        args.out.write_bytes(msgspec.json.format(msgspec.json.encode(report), indent=2))
        console.print(f"written: {args.out}")
    return int(any(abs(row.ratio - 1) > args.within for row in formats))


def read_windows(args: argparse.Namespace, tokenizer: Tokenizer) -> list[list[int]]:
    """Cut the first tokens of the text into windows of `--window` tokens.

    The number of tokens taken allows for the first token of each window, which is not predicted.
    Prompts of a JSONL file are concatenated. Raises ValueError if the text has fewer than 2 tokens.
    """
    if args.text.suffix == ".jsonl":
        chats = [prompt.messages for prompt in load_prompts(args.text)]
        text = "\n\n".join(message["content"] for chat in chats for message in chat)
    else:
        text = args.text.read_text(encoding="utf-8")
    tokens = list(tokenizer.encode(text))[: args.tokens + args.tokens // args.window + 1]
    if len(tokens) < 2:
        raise ValueError(f"--text {args.text.name}: {len(tokens)} tokens; at least 2 are needed")
    windows = [tokens[i : i + args.window] for i in range(0, len(tokens), args.window)]
    return [window for window in windows if len(window) > 1]


def measure(
    directory: Path,
    name: Quantization,
    args: argparse.Namespace,
    windows: Sequence[Sequence[int]],
    before: Sequence[FormatResult],
    advance: Advance,
) -> FormatResult:
    """Load the target in one format, as the engine does, and measure it.

    `before` has the results so far, the reference first.
    """
    gc.collect()  # frees the previous model before the next one is loaded
    platform = choose_platform(TargetConfig(dtype=args.dtype))
    model = load_model(
        directory,
        kernels=platform.kernels,
        dtype=platform.dtype,
        device=platform.device,
        exact=platform.exact,
        quantization=name,
        packed_kv_dtype=platform.packed_kv_dtype,
    )
    num_slots = -(-args.window // BLOCK) * BLOCK
    kv = KVStorage(model.kv_spec, num_slots, platform.device)
    losses = []
    with torch.inference_mode():
        for window in windows:
            losses.append(window_loss(model, window, kv))
            advance(1, name)
    sizes = [len(window) - 1 for window in windows]
    mean = sum(losses) / sum(sizes)
    reference = before[0].window_losses if before else losses
    beyond = [a - b for a, b in zip(losses, reference, strict=True)]
    return FormatResult(
        quantization=name,
        dtype=str(model.dtype).removeprefix("torch."),
        kernels=platform.kernels.name,
        weight_bytes=model.num_bytes,
        perplexity=math.exp(mean),
        ratio=math.exp(sum(beyond) / sum(sizes)),
        log_ratio_error=_ratio_error(beyond, sizes),
        window_losses=tuple(losses),
    )


def _ratio_error(sums: Sequence[float], sizes: Sequence[int]) -> float:
    """Standard error of sum(sums) / sum(sizes), with the windows as the sample; NaN for one."""
    mean, count = sum(sums) / sum(sizes), len(sums)
    if count < 2:
        return math.nan
    squares = sum((total - mean * size) ** 2 for total, size in zip(sums, sizes, strict=True))
    return math.sqrt(squares * count / (count - 1)) / sum(sizes)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="specserve eval perplexity",
        description="Perplexity of a text by weight format, as the target is served.",
        allow_abbrev=False,
    )
    parser.add_argument("--target", default=TargetConfig().target, help=OPTIONAL_TARGET_HELP)
    parser.add_argument(
        "--text", type=Path, required=True, metavar="FILE", help="plain text, or prompts in .jsonl"
    )
    parser.add_argument(
        "--quantization",
        action="append",
        choices=FORMATS,
        required=True,
        help="weight format; repeatable, the others are compared with the first",
    )
    parser.add_argument(
        "--dtype",
        default="auto",
        choices=("auto", "bfloat16", "float32"),
        help=f"{ENGINE_HELP['dtype']} (default: %(default)s)",
    )
    parser.add_argument(
        "--tokens",
        type=at_least_one,
        default=24576,
        metavar="N",
        help="tokens of the text that are predicted, at most (default: %(default)s)",
    )
    parser.add_argument(
        "--window",
        type=at_least_two,
        default=1024,
        metavar="N",
        help="the text is cut into pieces of this many tokens (default: %(default)s)",
    )
    parser.add_argument(
        "--within",
        type=float,
        default=0.01,
        metavar="X",
        help="exit with 1 if a perplexity differs from the first by more than this share "
        "(default: %(default)s)",
    )
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="write the result here")
    return parser


def at_least_two(text: str) -> int:
    if (number := int(text)) < 2:
        raise argparse.ArgumentTypeError(f"{number} is out of range; expected 2 or more")
    return number


if __name__ == "__main__":
    sys.exit(main())
