"""The prompts that the head of SmolLM2-135M was trained on: its own, others, and tasks over texts.

python drafts/experiments/mix_prompts.py --own OWN.jsonl [...] --others train_prompts.jsonl \
    --answers DIR/data --target smollm2-135m --out mixed_prompts.jsonl

OWN.jsonl is of `specserve tune prompts`. The others are rows {"source", "prompt"}. Texts to be
summed up, asked about and translated from are the longest of the others and the target's own
answers, from the `data` of a run of `specserve tune eagle`. The order does not matter: a run
shuffles what it reads. The same files always make the same file.
"""

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from random import Random
from typing import Final

import msgspec

from specserve.hub import resolve
from specserve.text import Tokenizer
from specserve_drafts.tune.texts import read_texts

# Of every source: one in so many rows. What calls tools is not asked here.
EVERY: Final = {
    "gsm8k-train": 2,
    "self-instruct-t0": 2,
    "gpteacher-codegen": 1,
    "gpteacher-roleplay": 1,
    "self-instruct-seed": 1,
}
TWICE: Final = "gpteacher-roleplay"  # answered in prose, of which there is little
LONG: Final = "self-instruct-t0"  # many of its prompts hold a passage
LONG_CHARS: Final = 450
LONG_ANSWER: Final = 90  # tokens
SUM_UP: Final = (
    "Summarize: {}",
    "Summarize the following text.\n\n{}",
    "{}\n\nWrite a short summary of this text.",
    "Give the main points of this article:\n{}",
    "Summarize: {}",
)
ASK: Final = (
    "{}\n\nWhat is this text about?",
    "{}\n{}",
    "Answer the question with the help of these passages.\n\n{}\n\nQuestion: {}",
    "Passages:\n{}\n\nQuestion: {}\nAnswer:",
)
EXTRACT: Final = (
    "List the names of people and places in this text.\n\n{}",
    "Extract the most important facts from the text below as a list.\n{}",
    "Which numbers and dates are in this text? Return them as JSON.\n\n{}",
)
TRANSLATE: Final = ("Translate English to {}: {}", "Translate this sentence to {}.\n{}")
LANGUAGES: Final = ("German", "French", "Spanish", "Italian")


class Row(msgspec.Struct):
    prompt: str
    source: str = ""


def read_rows(file: Path) -> list[Row]:
    return [msgspec.json.decode(line, type=Row) for line in file.read_bytes().split(b"\n") if line]


def long_answers(folder: Path, tokenizer: Tokenizer) -> list[str]:
    return [
        tokenizer.decode(text.tokens[text.num_prompt :].tolist()).replace("<|im_end|>", "").strip()
        for file in sorted(folder.glob("shard-*"))
        for text in read_texts(file)
        if text.num_answer >= LONG_ANSWER
    ]


def tasks(passages: Sequence[str], answers: Sequence[str], own: Sequence[str]) -> Iterator[str]:
    """Prompts over one to three texts."""
    random = Random(0)
    choice = random.choice
    passages, answers = list(passages), list(answers)
    random.shuffle(passages)
    random.shuffle(answers)

    def texts(*counts: int) -> str:
        return "\n\n".join(
            choice(passages if random.random() < 0.55 else answers) for _ in range(choice(counts))
        )

    for passage in passages[:2000]:
        yield choice(SUM_UP).format(passage)
    for _ in range(2500):
        yield choice(SUM_UP).format(texts(1, 2, 2, 3))
    for _ in range(2500):
        task, question = choice(ASK), choice(own)
        yield task.format(texts(1, 2, 2, 3), *[question] * (task.count("{}") - 1))
    for _ in range(900):
        yield choice(EXTRACT).format(texts(1, 2))
    for _ in range(1200):
        sentence = choice(choice(answers).split(". ")).strip()
        if 30 < len(sentence) < 300:
            yield choice(TRANSLATE).format(choice(LANGUAGES), sentence)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--own", type=Path, nargs="+", required=True)
    for name in ("--others", "--answers", "--out"):
        parser.add_argument(name, type=Path, required=True)
    parser.add_argument("--target", required=True)
    args = parser.parse_args()
    own = [row.prompt for file in sorted(args.own) for row in read_rows(file)]
    others = read_rows(args.others)
    prompts = own.copy()
    for source, every in EVERY.items():
        prompts += [row.prompt for row in others if row.source == source][::every]
    prompts += [row.prompt for row in others if row.source == TWICE]
    passages = [r.prompt for r in others if r.source == LONG and len(r.prompt) > LONG_CHARS]
    answers = long_answers(args.answers, Tokenizer(resolve(args.target)))
    prompts += tasks(passages, answers, own)
    args.out.write_text(
        "".join(msgspec.json.encode({"prompt": p}).decode() + "\n" for p in prompts)
    )
    print(f"{args.out}: {len(prompts)} prompts, {len(own)} of them the target's own")


if __name__ == "__main__":
    main()
