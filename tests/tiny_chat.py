"""Tiny random models as chat models, and a prompt file for one."""

import json
import shutil
from pathlib import Path

from tiny import write_tiny_llama
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as HfTokenizer

from specserve.text.detokenizer import byte_alphabet

CONTROL = ("<|pad|>", "<|im_start|>", "<|im_end|>")  # the last one ends an answer


def write_tiny_chat(model: Path, directory: Path) -> Path:
    """A copy of a tiny `model` with a chat template."""
    shutil.copytree(model, directory)
    template = "{% for message in messages %}{{ message['content'] }} {% endfor %}"
    config = {"chat_template": template}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return directory


def write_chat_prompts(file: Path) -> Path:
    """Four prompts with repetitions, of two categories."""
    rows = [
        {"question_id": index, "category": category, "turns": [f"w{index} w7 w{index} w7 w3"]}
        for index, category in enumerate(("first", "second", "first", "second"), start=10)
    ]
    file.write_text("\n".join(map(json.dumps, rows)))
    return file


def write_byte_chat(directory: Path, *, seed: int = 1, context: int = 512) -> Path:
    """A tiny random chat model whose tokens are bytes: its answers are hardly ever valid UTF-8."""
    alphabet = byte_alphabet()
    spelling = sorted(alphabet, key=lambda character: alphabet[character])
    tokenizer = HfTokenizer(models.BPE({c: i for i, c in enumerate(spelling)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in CONTROL])
    vocab_size = tokenizer.get_vocab_size()
    write_tiny_llama(directory, seed=seed, vocab_size=vocab_size, context=context)
    tokenizer.save(str(directory / "tokenizer.json"))
    template = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    config = {"chat_template": template, "eos_token": CONTROL[-1]}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return directory
