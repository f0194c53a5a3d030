"""From arguments to a command, and from errors to exit codes.

0: done; 1: a request failed or something is broken; 2: wrong usage or settings. What a user can
get wrong is one line on stderr, never a traceback. Commands are imported when they are run, so
that `--help` does not wait for torch.
"""

import codecs
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from io import TextIOWrapper

from specserve.cli.parser import build_parser, engine_config
from specserve.config import show_config

INTERRUPTED = 130  # 128 + SIGINT, as shells count
BROKEN_PIPE = 141  # 128 + SIGPIPE


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit code."""
    if argv is None:
        _leave_ascii()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):  # what a locale cannot show is shown as its code
            stream.reconfigure(errors="backslashreplace")
    args = build_parser().parse_args(argv)
    try:
        if getattr(args, "print_config", False):
            print(show_config(engine_config(args)))
            status = 0
        else:
            status = int(import_module(f"specserve.cli.{args.command}").run(args))
        sys.stdout.flush()
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        # Python flushes stdout once more when it exits; let that go nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
    except ValueError as error:
        print(f"specserve: error: {error}", file=sys.stderr)
        return 2
    return status


def _leave_ascii() -> None:
    """Start over in Python's UTF-8 mode where the locale knows ASCII only.

    Arguments, paths and texts hold any character; Python does this itself unless it is told not to.
    """
    if codecs.lookup(sys.getfilesystemencoding()).name != "ascii":
        return
    if os.environ.get("PYTHONUTF8") != "1":  # else it had no effect
        os.environ["PYTHONUTF8"] = "1"
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
