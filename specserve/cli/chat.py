"""`specserve chat`: a chat with a server, on a terminal or with one prompt per input line."""

import argparse
import os
import sys
from contextlib import suppress
from importlib import import_module
from typing import Final, cast

from rich.console import Console

from specserve.cli.chat_screen import PlainScreen, TerminalScreen
from specserve.cli.conversation import Conversation
from specserve.cli.flags import given
from specserve.client import (
    APIStatusError,
    AuthenticationError,
    Client,
    ConnectionFailed,
    Options,
    SpecserveError,
)
from specserve.config import ConfigError
from specserve.types import SamplingParams

DEFAULT_KEY_VARIABLE: Final = "SPECSERVE_API_KEY"


def run(args: argparse.Namespace) -> int:
    key = _api_key(args.api_key_env)
    terminal = sys.stdin.isatty() and sys.stdout.isatty()
    # On a terminal a failure is shown at once instead of retried: the user has /retry.
    with Client(args.url, api_key=key, max_retries=0 if terminal else 2) as client:
        try:
            return _on_terminal(client, args) if terminal else _through_pipes(client, args)
        except SpecserveError as error:
            PlainScreen().error(explain(error, args.api_key_env))
            return 1


def _on_terminal(client: Client, args: argparse.Namespace) -> int:
    models = client.models()
    name = args.model or (models[0].id if models else "a model")
    report = client.speculation() if args.show_speculation else None
    screen = TerminalScreen(Console(), report)
    conversation = Conversation(client, screen, _options(args, report is not None), args.system)
    with suppress(ImportError):  # once loaded, input() has line editing and a history
        import_module("readline")
    screen.note(f"{name} at {client.url}; /help lists the commands")
    screen.legend()
    while True:
        with suppress(KeyboardInterrupt):  # from a Ctrl-C outside of the `try` blocks in `_turn`
            if not _turn(conversation, screen, args.api_key_env):
                return 0


def _turn(conversation: Conversation, screen: TerminalScreen, key_variable: str) -> bool:
    """Read one line and run it. Returns False if the user leaves."""
    try:
        line = input("> ")
    except EOFError:
        screen.note("")
        return False
    except KeyboardInterrupt:
        screen.note("\nCtrl-D or /exit leaves")
        return True
    try:
        return conversation.enter(line)
    except KeyboardInterrupt:
        screen.note("stopped")
    except SpecserveError as error:
        screen.error(explain(error, key_variable))
    return True


def _through_pipes(client: Client, args: argparse.Namespace) -> int:
    """Run stdin line by line. Returns the exit code: 1 if any line failed."""
    client.models()  # fails before any input is read if the server cannot be used
    screen = PlainScreen()
    conversation = Conversation(client, screen, _options(args, False), args.system)
    status = 0
    for line in sys.stdin:
        try:
            if not conversation.enter(line.removesuffix("\n")):
                break
        except SpecserveError as error:
            screen.error(explain(error, args.api_key_env))
            status = 1
    return status


def explain(error: SpecserveError, key_variable: str) -> str:
    """The error message, followed by a remedy if one is known."""
    if isinstance(error, ConnectionFailed):
        return f"{error}; start a server with `specserve serve` or `make serve`"
    if isinstance(error, AuthenticationError):
        return f"{error.message}; put the API key into the environment variable {key_variable}"
    if isinstance(error, APIStatusError):
        wait = "" if error.retry_after is None else f"; try again in {error.retry_after:.0f} s"
        return error.message + wait
    return str(error)


def _options(args: argparse.Namespace, tokens: bool) -> Options:
    """The options of a request. `tokens`: request logprobs, which give the bytes of each token."""
    options = given(args, SamplingParams) | {"model": args.model}
    return cast(Options, options | ({"logprobs": 0} if tokens else {}))


def _api_key(variable: str) -> str | None:
    key = os.environ.get(variable)
    if key is None and variable != DEFAULT_KEY_VARIABLE:
        raise ConfigError(f"api_key_env: the environment variable {variable} is not set; export it")
    return key
