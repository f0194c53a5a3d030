"""Requests that the engines of other processes took, written down by `request_recorder`."""

import os
import sys
from pathlib import Path

import msgspec

from specserve.types import Request


def recording(directory: Path) -> dict[str, str]:
    """The environment of a process whose engines write down what they are asked."""
    folder = Path(__file__).with_name("request_recorder")
    path = os.pathsep.join([str(folder), *sys.path])
    return {"PYTHONPATH": path, "RECORDED_REQUESTS": str(directory / "requests.jsonl")}


def recorded(environment: dict[str, str], count: int) -> list[Request]:
    """The last `count` requests. A server's engine tries itself out before."""
    lines = Path(environment["RECORDED_REQUESTS"]).read_bytes().splitlines()
    return [msgspec.json.decode(line, type=Request) for line in lines[-count:]]
