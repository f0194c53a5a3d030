"""Provenance: what is needed to repeat a run, without the machine's folders."""

import hashlib
from pathlib import Path

import msgspec

from specserve.config import TargetConfig
from specserve.engine.device import choose_platform
from specserve_evals.provenance import collect, markdown


def test_provenance(tmp_path: Path) -> None:
    data = tmp_path / "data.jsonl"
    data.write_bytes(b"abc")
    platform = choose_platform(TargetConfig(device="cpu", dtype="float32"))
    arguments = ["--prompts", str(data), "--limit", "2", "--draft", f"a b,{tmp_path}/head"]
    arguments += [
        f"--out={tmp_path}/x",
        f"--draft=ngram,{tmp_path}/y",
        "--min=0.5",
        f"{tmp_path}/a=b",
    ]
    found = collect("package.module", arguments, platform, data)
    assert (
        found.command
        == "python -m package.module --prompts data.jsonl --limit 2 --draft 'a b,head' "
        "--out=x --draft=ngram,y --min=0.5 a=b"
    )
    assert found.data is not None
    assert found.data.sha256 == hashlib.sha256(b"abc").hexdigest()
    assert found.engine["dtype"] == "float32"
    assert found.engine["kernels"] == platform.kernels.name
    assert found.versions["torch"]
    assert found.gpu is None
    text = markdown(found)
    assert found.command in text
    assert str(tmp_path) not in text + msgspec.json.encode(found).decode()
