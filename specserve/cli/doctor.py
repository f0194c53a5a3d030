"""`specserve doctor`: what this machine has, what specserve will use, and what is broken.

It needs no network and no model. The checks that import torch run last.
"""

import argparse
from collections.abc import Sequence
from importlib import import_module
from itertools import groupby

import msgspec
from rich.console import Console
from rich.text import Text

from specserve.cli.machine import Check, cache_folder, compilers, processor, versions
from specserve.cli.parser import engine_config

STYLES = {"ok": "", "note": "yellow", "broken": "bold red"}


def run(args: argparse.Namespace) -> int:
    config = engine_config(args)
    checks = [*versions(), *processor(), *compilers(), *cache_folder()]
    try:
        runtime = import_module("specserve.cli.runtime")
    except (ImportError, OSError) as error:
        fix = "install torch again for this Python and this machine"
        checks.append(Check("use", "torch", f"cannot be imported: {error}", "broken", fix))
    else:
        checks += runtime.runtime_checks(config)
    healthy = all(check.status != "broken" for check in checks)
    if args.json:
        print(msgspec.json.encode({"ok": healthy, "checks": checks}).decode())
    else:
        _show(checks)
    return 0 if healthy else 1


def _show(checks: Sequence[Check]) -> None:
    console = Console(highlight=False, soft_wrap=True)
    width = max(len(check.name) for check in checks)
    for section, group in groupby(checks, key=lambda check: check.section):
        console.print(Text(section, style="bold"))
        for check in group:
            words = Text(f"  {check.name:<{width}}  {check.value}")
            if check.status != "ok":
                words.append(f"  [{check.status}]", style=STYLES[check.status])
            if check.fix is not None:
                words.append(f"\n    -> {check.fix}", style=STYLES[check.status])
            console.print(words)
