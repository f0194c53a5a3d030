"""The commands, their flags and their help texts (those of settings by field name)."""

import argparse
from pathlib import Path
from typing import Any, Final, TypeAlias

from specserve import __version__
from specserve.cli.flags import add_flags, given
from specserve.cli.foreign_flags import refuse_foreign_flags
from specserve.cli.prompts import EXPECTED
from specserve.config import (
    ALL_SECTIONS,
    ENGINE_SECTIONS,
    SECTION_TYPES,
    EngineConfig,
    ServerConfig,
    TargetConfig,
    load_config,
)
from specserve.field_help import ENGINE_HELP
from specserve.types import SamplingParams, SpeculationParams

Commands: TypeAlias = "argparse._SubParsersAction[CommandParser]"
TARGET_HELP: Final = "alias such as smollm2-135m, model directory, .gguf file or hub id"
OPTIONAL_TARGET_HELP: Final = f"{TARGET_HELP} (default: {TargetConfig().target})"
PROMPTS_HELP: Final = f"one per line: {EXPECTED}, of which the first is used"

SAMPLING_HELP: Final = {
    "temperature": "0 is greedy",
    "top_k": "sample among the K best tokens; 0: all",
    "top_p": "sample among the most likely tokens that together have this probability",
    "min_p": "leave out tokens less likely than this share of the most likely one",
    "presence_penalty": "subtracted from the logit of every token that the answer already has",
    "frequency_penalty": "the same, times the number of its occurrences",
    "repetition_penalty": "divides the logits of tokens in prompt and output; above 1 discourages",
    "logit_bias": "add BIAS to a token's logit",
    "max_tokens": "maximum number of tokens to generate",
    "min_tokens": "fewest tokens before an end token or a stop",
    "stop": "end before this text",
    "stop_token_ids": "end at this token",
    "ignore_eos": "continue after the model's end token",
    "skip_special_tokens": "leave control tokens out of the text",
    "include_stop_str_in_output": "end after the stop text instead of before it",
    "seed": "makes sampling repeatable; not given: a random one",
    "logprobs": "log-probabilities of each token and of the N most likely ones; shown by --json",
    "prompt_logprobs": "the same for the tokens of the prompt",
    "n": "completions per prompt",
}
_DEFAULTS: Final = "the defaults shown are for a model that recommends no other ones"

SPECULATION_PREFIX: Final = "speculation_"
SPECULATION_HELP: Final = {
    "enabled": "use speculation; --no-speculation-enabled decodes plainly",
    "max_nodes": "tree nodes for each of these prompts, within --max-nodes",
    "drafters": "use only this one of the drafters of --draft",
}

SERVER_HELP: Final = {
    "host": "address to listen on; one that other machines reach needs API keys",
    "port": "port to listen on; 0: a free one",
    "served_model_name": "what clients call the model; not given: the target's name",
    "api_key_file": "one name:scopes:key per line; scopes: inference, metrics, admin. Keys may "
    "also come in the environment variable SPECSERVE_API_KEYS, separated by spaces",
    "allow_public": "let other machines, and with --allowed-origins '*' all web pages, in without "
    "API keys",
    "allowed_origins": "an origin whose web pages may use the server from a browser (CORS), such "
    "as https://chat.example.com. '*': all pages; needs API keys. Not given: none",
    "ssl_certfile": "certificate chain (PEM); serves HTTPS",
    "ssl_keyfile": "the certificate's private key (PEM)",
    "max_body_bytes": "largest body of a request; all that are in memory together may have eight "
    "times as much, 64 MiB at least",
    "body_timeout": "seconds for a request's body to arrive",
    "keepalive_timeout": "seconds an idle connection stays open, or a request's headers may take",
    "max_connections": "requests that are read, served or answered at once; an eighth more "
    "connections may be open. Of several API keys, one may have as many as it leaves free",
    "max_queued_requests": "sequences that may wait for the engine; more get a 429. API keys share "
    "them likewise",
    "max_queued_tokens": "prompt tokens that may wait for the engine; API keys share them likewise",
    "max_prompt_tokens": "longest prompt; not given: what the context has room for",
    "max_output_tokens": "most tokens a request can ask for; not given: until the context is full",
    "request_timeout": "seconds from its arrival until a request is given up; it can ask for fewer",
    "write_timeout": "seconds after which a client that reads nothing of its answer is dropped",
    "drain_timeout": "seconds accepted requests have to finish when the server is told to stop",
    "heartbeat_timeout": "seconds of silence after which the engine is restarted; longer in a step",
    "template_timeout": "seconds of processor time to render a chat or tokenize a prompt",
    "stream_interval": "tokens per event of a stream, so that the sizes of events do not reveal "
    "how many drafted tokens were accepted; 0: the tokens of one forward pass",
    "status_interval": "seconds between status lines in the log; 0: none",
}

EVALS: Final = {  # modules of specserve_evals
    "acceptance": "tokens per forward pass of every draft, by budget and category; speed",
    "lossless": "whether a draft changes any token",
    "conformance": "whether a drafter, your own for example, does what every drafter must",
    "perplexity": "perplexity of a text by weight format",
    "soak": "whether a server survives thousands of mixed requests",
    "two_keys": "whether a hostile API key slows down another",
    "fuzz": "whether requests generated from the API's description break a server",
}

TUNES: Final = {  # modules of specserve_drafts.tune
    "recycle": "a table of the likely next tokens after the last tokens",
    "eagle": "a head that reads hidden states of the target, trained on its answers",
    "medusa": "heads that read the target's last hidden state, trained on its answers",
    "prompts": "prompts generated by the target, to train on if there are no others",
}


class CommandParser(argparse.ArgumentParser):
    """The parser of one command. Raises ConfigError for flags of other servers."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        if self.get_default("package") is None:  # otherwise a module parses the arguments
            refuse_foreign_flags(args or (), self._option_string_actions, self.prog)
        return super().parse_known_args(args, namespace)


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands. The name of the command is stored in `command`."""
    parser = argparse.ArgumentParser(
        prog="specserve", description="Serve language models with speculative decoding."
    )
    parser.add_argument("--version", action="version", version=f"specserve {__version__}")
    commands = parser.add_subparsers(
        dest="command", required=True, metavar="COMMAND", parser_class=CommandParser
    )
    _add_generate(commands)
    _add_serve(commands)
    _add_chat(commands)
    pull = commands.add_parser("pull", help="fetch a model and print its directory")
    pull.add_argument("target", metavar="TARGET", help=TARGET_HELP)
    _add_convert(commands)
    _add_doctor(commands)
    _add_group(
        commands, "eval", "measure acceptance, correctness and quality", EVALS, "specserve_evals"
    )
    _add_group(commands, "tune", "make a draft for a target", TUNES, "specserve_drafts.tune")
    return parser


def settings(args: argparse.Namespace) -> dict[str, Any]:
    """The settings that flags give, by field name."""
    sections = [given(args, section) for section in SECTION_TYPES.values()]
    return {name: value for section in sections for name, value in section.items()}


def engine_config(args: argparse.Namespace) -> EngineConfig:
    """The settings of the file given by --config, overridden by flags. Raises ConfigError."""
    return load_config(settings(args), args.config, sections=ALL_SECTIONS)


def _add_generate(commands: Commands) -> None:
    parser = commands.add_parser("generate", help="generate text from prompts", allow_abbrev=False)
    prompts = parser.add_argument_group("prompts")
    prompts.add_argument(
        "--prompt", action="append", default=[], metavar="TEXT", help="a prompt; repeatable"
    )
    prompts.add_argument("--prompts", type=Path, metavar="FILE.jsonl", help=PROMPTS_HELP)
    form = prompts.add_mutually_exclusive_group()
    form.add_argument(
        "--chat",
        action="store_true",
        help="each prompt is a user's message (default if the model has a chat template)",
    )
    form.add_argument("--raw", action="store_true", help="each prompt is text to continue")
    prompts.add_argument(
        "--prediction", metavar="TEXT", help="text expected in the answers; affects speed only"
    )
    output = parser.add_argument_group("output")
    output.add_argument("--json", action="store_true", help="one JSON object per completion")
    add_flags(parser.add_argument_group("sampling", _DEFAULTS), SamplingParams, SAMPLING_HELP)
    add_flags(
        parser.add_argument_group("speculation", "of these prompts; affects speed only"),
        SpeculationParams,
        SPECULATION_HELP,
        skip=frozenset({"prediction"}),  # --prediction takes text, this field token ids
        prefix=SPECULATION_PREFIX,
    )
    _add_engine_flags(parser)


def _add_serve(commands: Commands) -> None:
    parser = commands.add_parser(
        "serve", help="serve a model over HTTP, as OpenAI's API", allow_abbrev=False
    )
    add_flags(parser.add_argument_group("server"), ServerConfig, SERVER_HELP)
    _add_engine_flags(parser)


def _add_chat(commands: Commands) -> None:
    parser = commands.add_parser("chat", help="talk to a running server", allow_abbrev=False)
    parser.add_argument(
        "url",
        nargs="?",
        default="http://127.0.0.1:8000",
        metavar="URL",
        help="address of the server (default: %(default)s)",
    )
    parser.add_argument(
        "--model", metavar="NAME", help="name of the model; not given: the one that is served"
    )
    parser.add_argument("--system", metavar="TEXT", help="system message")
    parser.add_argument(
        "--show-speculation",
        action="store_true",
        help="colour tokens by the drafter that proposed them",
    )
    parser.add_argument(
        "--api-key-env",
        default="SPECSERVE_API_KEY",
        metavar="NAME",
        help="environment variable with the API key (default: %(default)s)",
    )
    sampling = parser.add_argument_group("sampling", _DEFAULTS)
    sampling.add_argument(
        "--max-tokens",
        type=int,
        default=argparse.SUPPRESS,
        metavar="N",
        help="tokens per answer at most; not given: what the context has room for",
    )
    not_here = frozenset({"max_tokens", "n", "logprobs", "prompt_logprobs"})
    add_flags(sampling, SamplingParams, SAMPLING_HELP, skip=not_here)


def _add_convert(commands: Commands) -> None:
    parser = commands.add_parser(
        "convert",
        help="turn the pickled weights of a draft into safetensors",
        description="Turn the pickled weights of a draft into a directory that --draft takes. A "
        "child process reads them, with limits on memory and time, and runs no code in them.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "source",
        type=Path,
        metavar="SOURCE",
        help="directory with config.json and a .bin, .pt or .pth file, or that file",
    )
    parser.add_argument("out", type=Path, metavar="OUT", help="directory to make")


def _add_doctor(commands: Commands) -> None:
    parser = commands.add_parser(
        "doctor",
        help="show what this machine has, what will be used and why, and what is broken",
        allow_abbrev=False,
    )
    parser.add_argument("--json", action="store_true", help="one JSON object")
    _add_engine_flags(parser)


def _add_group(
    commands: Commands, name: str, purpose: str, members: dict[str, str], package: str
) -> None:
    """Add a command that runs a module of `package`. `members`: name of a module -> help text."""
    width = max(map(len, members))
    listed = "\n".join(f"  {member:<{width}}  {text}" for member, text in members.items())
    parser = commands.add_parser(
        name,
        help=purpose,
        usage="%(prog)s NAME [ARGUMENTS ...]",
        description=f"{purpose[0].upper()}{purpose[1:]}; `%(prog)s NAME --help` lists the flags."
        f"\n\nnames:\n{listed}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("name", choices=members, metavar="NAME", help="one of the above")
    parser.add_argument(
        "arguments", nargs=argparse.REMAINDER, metavar="ARGUMENTS", help="those of NAME"
    )
    parser.set_defaults(package=package)


def _add_engine_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "target", nargs="?", default=argparse.SUPPRESS, metavar="TARGET", help=OPTIONAL_TARGET_HELP
    )
    engine = parser.add_argument_group("engine")
    engine.add_argument(
        "--config", type=Path, metavar="FILE.toml", help="settings; flags override it"
    )
    engine.add_argument(
        "--print-config",
        action="store_true",
        help="print the settings in force as TOML, which --config reads, and exit",
    )
    for name in ENGINE_SECTIONS:
        add_flags(
            engine,
            SECTION_TYPES[name],
            ENGINE_HELP,
            skip=frozenset({"target"}),
            aliases={"max_num_seqs": "--batch"},
        )
