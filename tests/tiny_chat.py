"""The tiny random model as a chat model, and a prompt file for it."""

import json
import shutil
from pathlib import Path


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
