"""Dispatches to the command that the arguments name, and turns errors into exit codes.

0: success; 1: a request failed or something is broken; 2: wrong usage or settings; 130: Ctrl-C;
141: the output is a closed pipe. User errors are reported on stderr without a traceback. A
command is imported only when it runs, so that `--help` does not wait for torch.
"""

import codecs
import os
import sys
import time
from collections.abc import Sequence
from importlib import import_module
from io import TextIOWrapper
from pathlib import Path

from specserve.cli.loading import without_gc
from specserve.cli.parser import build_parser, engine_config
from specserve.cli.show_config import show_config
from specserve.config import TargetConfig

INTERRUPTED = 130  # 128 + SIGINT, the convention of shells
BROKEN_PIPE = 141  # 128 + SIGPIPE


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command (default: that of `sys.argv`). Returns the exit code."""
    started = time.monotonic()
    if argv is None:
        _leave_ascii()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):  # escape what the locale cannot encode
            stream.reconfigure(errors="backslashreplace")
    try:
        args = build_parser().parse_args(argv)
        if getattr(args, "print_config", False):
            config = engine_config(args)
            print(show_config(config))
            print(f"sampling defaults: {_default_sampling(config.target)}", file=sys.stderr)
            status = 0
        elif hasattr(args, "package"):  # of a layer above this one, so imported by name
            own = {"started": started} if args.command == "tune" else {}  # `--minutes` counts so
            module = import_module(f"{args.package}.{args.name}")
            status = int(module.main(args.arguments, **own))
        else:
            with without_gc():
                command = import_module(f"specserve.cli.{args.command}")
            status = int(command.run(args))
        sys.stdout.flush()
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        # Python flushes stdout once more at exit; into /dev/null, that flush cannot fail.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
    except ValueError as error:
        print(f"specserve: error: {error}", file=sys.stderr)
        return 2
    return status


def _default_sampling(target: TargetConfig) -> str:
    """What the model of `target` recommends, without downloading it."""
    # Imported here, because no other command of this module needs them.
    from specserve.hub import local_directory
    from specserve.models.generation_config import describe_sampling, read_default_sampling

    directory = local_directory(target.target)
    if directory is None and target.generation_config == "auto":
        return f"not known before {target.target} is fetched"
    return describe_sampling(read_default_sampling(directory or Path(), target.generation_config))


def _leave_ascii() -> None:
    """Restart Python in UTF-8 mode if the encoding of the locale is ASCII.

    Python does this by itself unless it is disabled. Arguments and texts may hold any character.
    """
    if codecs.lookup(sys.getfilesystemencoding()).name != "ascii":
        return
    if os.environ.get("PYTHONUTF8") != "1":  # otherwise a restart had no effect
        os.environ["PYTHONUTF8"] = "1"
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
