"""The files that ARCHITECTURE.md names exist."""

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
# Where a name such as `server/app` or `specserve_kernels/host` is looked for, in this order.
FOLDERS = (
    ROOT / "specserve",
    ROOT,
    ROOT / "kernels",
    ROOT / "drafts",
    ROOT / "kernels/specserve_kernels",
)


def test_architecture_names_files_that_exist() -> None:
    text = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
    names = sorted(set(re.findall(r"`([a-z_]+(?:/[a-z_]+)+)`", text)))
    assert "server/app" in names
    missing = [
        name
        for name in names
        if not any(
            (folder / f"{name}.py").is_file() or (folder / name).is_dir() for folder in FOLDERS
        )
    ]
    assert missing == []
