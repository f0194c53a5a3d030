"""Reads the tokenizer, its special tokens and the chat template from a model directory.

Owns the file names and formats that libraries have used for them. Files are read as UTF-8 in every
locale. The chat template is not compiled here.
"""

from pathlib import Path
from typing import Any, Final

import msgspec
from msgspec import Struct
from tokenizers import Tokenizer as TokenizerFile

from specserve.files import FileError, is_there, quoted, read_file

_CONFIG: Final = "tokenizer_config.json"
_SPECIAL_TOKENS_MAP: Final = "special_tokens_map.json"  # written by older libraries
_ROLES: Final = ("bos", "eos", "unk", "pad", "sep", "cls", "mask")
_LISTS: Final = ("additional_special_tokens", "extra_special_tokens")
_MAX_BYTES: Final = 2**28  # of one file
_MAX_TEMPLATE: Final = 2**20  # characters; the longest published templates have some ten thousand


class TokenizerError(ValueError):
    """The model directory has no usable tokenizer; the message says why and what to do."""


class SpecialTokens(Struct, frozen=True):
    """The special tokens that the files name. `roles`: role, such as eos_token -> token."""

    roles: dict[str, str]
    all: frozenset[str]  # those without a role too


class ChatTemplateSource(Struct, frozen=True):
    """The source of a chat template, and the name of its file."""

    text: str
    file_name: str


def read_tokenizer(directory: Path) -> TokenizerFile:
    """Load tokenizer.json, without truncation and padding. Raises `TokenizerError`."""
    path = directory / "tokenizer.json"
    if not is_there(path):
        raise TokenizerError(
            f"{directory}: no tokenizer.json; save the tokenizer again with a recent version of "
            f"the library it came from"
        )
    text = _read_text(path)
    try:
        tokenizer = TokenizerFile.from_str(text)
    except Exception as error:  # the library raises nothing narrower
        raise TokenizerError(f"{path}: not a tokenizer ({error}); fetch it again") from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def read_special_tokens(directory: Path) -> SpecialTokens:
    """The special tokens that the files name. Raises `TokenizerError`."""
    files = {name: _read_json(directory / name) for name in (_CONFIG, _SPECIAL_TOKENS_MAP)}
    roles: dict[str, str] = {}
    found: set[str] = set()
    for role in (f"{name}_token" for name in _ROLES):
        for name, content in files.items():  # the first one that has the role counts
            if role in content:
                token = _content(directory / name, role, content[role])
                if token is not None:
                    roles[role] = token
                break
    for name, content in files.items():
        for field in _LISTS:
            listed = content.get(field)
            values = list(listed.values()) if isinstance(listed, dict) else listed or []
            if not isinstance(values, list):
                raise _unusable(directory / name, field, listed, "a list of tokens")
            found |= {t for v in values if (t := _content(directory / name, field, v)) is not None}
    decoder = files[_CONFIG].get("added_tokens_decoder")
    for entry in decoder.values() if isinstance(decoder, dict) else ():
        if isinstance(entry, dict) and entry.get("special") is True:
            found.add(str(entry.get("content")))
    return SpecialTokens(roles, frozenset(found | set(roles.values())))


def read_chat_template(directory: Path) -> ChatTemplateSource | None:
    """The chat template, or None; of several named ones "default". Raises `TokenizerError`."""
    source = _find_template(directory)
    if source is not None and len(source.text) > _MAX_TEMPLATE:
        raise TokenizerError(
            f"{directory / source.file_name}: a chat template of {len(source.text)} characters is "
            f"too long (limit {_MAX_TEMPLATE}); use the model's original one"
        )
    return source


def _find_template(directory: Path) -> ChatTemplateSource | None:
    path = directory / "chat_template.jinja"
    if is_there(path):
        return ChatTemplateSource(_read_text(path), path.name)
    for name in (_CONFIG, "chat_template.json"):
        found = _read_json(directory / name).get("chat_template")
        if found is not None:
            return ChatTemplateSource(_choose(directory / name, found), name)
    return None


def _choose(path: Path, found: object) -> str:
    """The template in a JSON field that holds one template or several named ones."""
    if isinstance(found, str):
        return found
    named = found
    if isinstance(found, list) and all(isinstance(item, dict) for item in found):
        named = {item.get("name"): item.get("template") for item in found}
    if not isinstance(named, dict):
        raise _unusable(path, "chat_template", found, "a string or a list of named templates")
    if not isinstance(named.get("default"), str):
        names = ", ".join(map(quoted, named)) or "none"
        raise TokenizerError(
            f"{path}: chat_template has no template named 'default' (there are: {names}); rename "
            f"the one to use"
        )
    return str(named["default"])


def _content(path: Path, field: str, token: object) -> str | None:
    """The token in a field that holds a string, an object with the string, or null."""
    content = token.get("content") if isinstance(token, dict) else token
    if content is not None and not isinstance(content, str):
        raise _unusable(path, field, token, "a token: a string, or an object with its content")
    return content


def _unusable(path: Path, field: str, value: object, expected: str) -> TokenizerError:
    return TokenizerError(f"{path}: {field} = {quoted(value)} is not {expected}; correct it")


def _read_json(path: Path) -> dict[str, Any]:
    if not is_there(path):
        return {}
    try:
        return msgspec.json.decode(_read_text(path), type=dict[str, Any])
    except (msgspec.MsgspecError, RecursionError) as error:
        raise TokenizerError(f"{path}: not a JSON object ({error}); fetch it again") from None


def _read_text(path: Path) -> str:
    """The text of a UTF-8 file, without a byte order mark."""
    try:
        return read_file(path, _MAX_BYTES).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise TokenizerError(f"{path}: not UTF-8 (byte {error.start}); save it as UTF-8") from None
    except FileError as error:
        raise TokenizerError(str(error)) from None
