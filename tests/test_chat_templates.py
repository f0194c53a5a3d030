"""Chat templates as they are published: where they lie, which messages they leave out, and what
they cost whoever compiles them."""

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from tiny_text import CHATML, write_byte_tokenizer

from specserve.text import Tokenizer, TokenizerError
from specserve.text.chat_template import ChatTemplate, TemplateUnusable
from specserve.types import RequestError

USER = {"role": "user", "content": "hello"}
SYSTEM = {"role": "system", "content": "be brief"}
DEVELOPER = {"role": "developer", "content": "be brief"}
ASSISTANT = {"role": "assistant", "content": "well"}
# Roles that are not listed are left out without a word, in the order in which models list them.
_LISTED = (
    "{{%- for m in messages %}}{{%- if m.role in {roles} %}}"
    "{{{{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}}}{{%- endif %}}"
    "{{%- endfor %}}{{%- if add_generation_prompt %}}{{{{- '<|im_start|>assistant\n' }}}}"
    "{{%- endif %}}"
)
QWEN = _LISTED.format(roles=("user", "assistant", "system"))
WITH_DEVELOPERS = _LISTED.format(roles=("user", "assistant", "developer"))
NO_SYSTEM = _LISTED.format(roles=("user", "assistant"))
REFUSING = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}"
    "{% endif %}" + CHATML
)
FIRST_SYSTEM = (
    "{% if messages[0].role == 'system' %}{{ messages[0].content }}"
    "{% set messages = messages[1:] %}{% endif %}"
    "{% for m in messages if m.role != 'system' %}{{ m.content }}{% endfor %}"
)
LAST_ONLY = "{{ messages[-1].content }}"
MERGED = (  # Llama 2: the system message goes into the first user's
    "{% set system = messages[0].content %}{% for m in messages[1:] %}"
    "{% if loop.first %}[INST] <<SYS>>{{ system }}<</SYS>> {{ m.content }} [/INST]"
    "{% else %}{{ m.content | trim }}{% endif %}{% endfor %}"
)
THINKING = CHATML.replace("m.content", "m.content.split('</think>')[-1].lstrip('\n')")


def _text(directory: Path, messages: list[dict[str, str]]) -> str:
    tokenizer = Tokenizer(directory)
    return tokenizer.decode(tokenizer.chat(messages), skip_special=False)


@pytest.mark.parametrize(
    ("template", "messages", "param"),
    [
        (QWEN, [DEVELOPER, USER], None),
        (CHATML, [DEVELOPER, USER], None),
        (WITH_DEVELOPERS, [DEVELOPER, USER], None),
        (WITH_DEVELOPERS, [SYSTEM, USER], "messages[0].content"),
        (NO_SYSTEM, [SYSTEM, USER], "messages[0].content"),
        (NO_SYSTEM, [DEVELOPER, USER], "messages[0].content"),
        (REFUSING, [DEVELOPER, USER], "messages"),
        (FIRST_SYSTEM, [SYSTEM, USER, ASSISTANT, USER], None),
        (FIRST_SYSTEM, [USER, SYSTEM, USER], "messages[1].content"),
        (LAST_ONLY, [USER], None),
        (LAST_ONLY, [USER, ASSISTANT, USER], "messages[0].content"),
        (MERGED, [SYSTEM, USER, ASSISTANT, USER], None),
        (MERGED, [SYSTEM], "messages[0].content"),
        (CHATML, [USER | {"name": "Bo"}], "messages[0].name"),
        (CHATML, [USER, USER | {"name": ""}], "messages[1].name"),
        (CHATML.replace("m.role", "(m.name or m.role)"), [USER | {"name": "Bo"}], None),
        # What changes a content is no reason to refuse it.
        (CHATML.replace("m.content", "m.content | upper"), [SYSTEM, USER], None),
        (CHATML.replace("m.content", "m.content[:3]"), [SYSTEM, USER], None),
        (CHATML.replace("m.content", "m.content | tojson"), [SYSTEM, USER], None),
        (CHATML.replace("m.content", "m.content | reverse"), [SYSTEM, USER], None),
        (THINKING, [USER, ASSISTANT | {"content": "hm</think>\n\nwell"}, USER], None),
        (CHATML, [SYSTEM | {"content": ""}, USER], None),
    ],
)
def test_a_message_that_the_template_omits_is_refused(
    tmp_path: Path, template: str, messages: list[dict[str, str]], param: str | None
) -> None:
    directory = write_byte_tokenizer(tmp_path, template)
    if param is not None:
        with pytest.raises(RequestError) as error:
            _text(directory, messages)
        assert error.value.param == param
        return
    text = _text(directory, messages)
    changed = [message | {"content": f"9{message['content']}9"} for message in messages]
    for index in range(len(messages)):
        other = [*messages[:index], changed[index], *messages[index + 1 :]]
        assert _text(directory, other) != text


def test_developer_messages_become_system_messages(tmp_path: Path) -> None:
    directory = write_byte_tokenizer(tmp_path, QWEN)
    assert _text(directory, [DEVELOPER, USER]) == _text(directory, [SYSTEM, USER])
    directory = write_byte_tokenizer(tmp_path, WITH_DEVELOPERS)
    assert "developer\nbe brief" in _text(directory, [DEVELOPER, USER])


_NAMED = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": CHATML}]
_BOM = b"\xef\xbb\xbf"


@pytest.mark.parametrize(
    ("template", "files"),
    [
        (CHATML, {}),
        (_NAMED, {}),
        ({"tool_use": "no", "default": CHATML}, {}),
        ("no", {"chat_template.jinja": CHATML.encode()}),
        (None, {"chat_template.jinja": _BOM + CHATML.encode()}),
        (None, {"chat_template.json": json.dumps({"chat_template": CHATML}).encode()}),
        (CHATML, {"chat_template.json": b'{"chat_template": "no"}'}),
        (CHATML, {"additional_chat_templates": b"no folder"}),
        (None, {"tokenizer_config.json": _BOM + json.dumps({"chat_template": CHATML}).encode()}),
    ],
)
def test_files_that_hold_a_chat_template(
    tmp_path: Path, template: Any, files: dict[str, bytes]
) -> None:
    write_byte_tokenizer(tmp_path, template)
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    assert _text(tmp_path, [USER]) == ("<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n")


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"chat_template.jinja": b"{{ '\xff' }}"}, r"chat_template\.jinja: not UTF-8 \(byte 4\)"),
        ({"tokenizer_config.json": b'{"a": "\xff"}'}, r"tokenizer_config\.json: not UTF-8"),
        ({"tokenizer_config.json": b'{"chat_template": 5}'}, r"chat_template = 5 is not a string"),
        ({"tokenizer_config.json": b'{"chat_template": ["x"]}'}, r"chat_template = \['x'\] is not"),
        (
            {"tokenizer_config.json": b'{"chat_template": {"rag": "x"}}'},
            r"no template named 'default' \(there are: 'rag'\)",
        ),
        (
            {"tokenizer_config.json": b'{"chat_template": [{"name": "a", "template": "x"}]}'},
            r"no template named 'default' \(there are: 'a'\)",
        ),
        (
            {"tokenizer_config.json": b'{"chat_template": {"default": 5}}'},
            r"no template named 'default'",
        ),
        ({"chat_template.json": b'{"chat_template": []}'}, r"chat_template\.json: .* none"),
        ({"chat_template.jinja": b"x" * (2**20 + 1)}, r"of 1048577 characters is too long"),
        ({"tokenizer_config.json": b'{"bos_token": 7}'}, r"bos_token = 7 is not a token"),
        (
            {"special_tokens_map.json": b'{"additional_special_tokens": 7}'},
            r"special_tokens_map\.json: additional_special_tokens = 7 is not a list",
        ),
        ({"special_tokens_map.json": b"[]"}, r"special_tokens_map\.json: not a JSON object"),
    ],
)
def test_invalid_templates_and_tokens(
    tmp_path: Path, files: dict[str, bytes], message: str
) -> None:
    write_byte_tokenizer(tmp_path, None)
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    with pytest.raises(TokenizerError, match=message) as error:
        Tokenizer(tmp_path)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 400


def test_the_template_gets_tokens_of_special_tokens_map(tmp_path: Path) -> None:
    template = "{{ bos_token }}{{ cls_token }}" + CHATML
    write_byte_tokenizer(tmp_path, template, cls_token=None)
    named = {"bos_token": {"content": "<|bos|>"}, "cls_token": "no", "eos_token": "no"}
    (tmp_path / "special_tokens_map.json").write_text(json.dumps(named), encoding="utf-8")
    assert _text(tmp_path, [USER]).startswith("<|bos|><|im_start|>")


# Constant expressions that Jinja would evaluate when it compiles, in every place for one.
_HUGE = "'x' * 9999999999"


@pytest.mark.parametrize(
    "source",
    [
        f"{{{{ {_HUGE} }}}}",
        "{{ " + "(" * 30 + "'x'" + " * 99)" * 30 + " }}",
        "{{ 9**9**9 }}",
        "{{ 'x' | center(9999999999) }}",
        "{{ ('x' | center(9999999999)) is string }}",
        f"{{% if {_HUGE} %}}x{{% endif %}}",
        f"{{% set x = [{_HUGE}] %}}",
        f"{{% for i in {_HUGE} %}}x{{% endfor %}}",
        f"{{% macro f(x={_HUGE}) %}}{{% endmacro %}}",
        f"{{{{ 'a' ~ ({_HUGE})[1:2] }}}}",
        f"{{{{ ({_HUGE}) == 'a' and {{'k': {_HUGE}}} }}}}",
        f"{{% with a = {_HUGE} %}}{{% endwith %}}",
        f"{{% include {_HUGE} %}}",
        "{% filter center(9999999999) %}x{% endfilter %}",
        "{{ '%9999999999d' % 1 }}",
    ],
)
def test_compiling_runs_no_template_code(source: str) -> None:
    started = time.perf_counter()
    ChatTemplate(source, {})
    assert time.perf_counter() - started < 2


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        (f"{{% autoescape {_HUGE} %}}x{{% endautoescape %}}", "autoescape takes true or false"),
        ("{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", "nested too deeply"),
        ("{{ " + "[" * 5000 + "]" * 5000 + " }}", "nested too deeply"),
        ("{{ " + "not " * 9999 + "1 }}", "nested too deeply"),
        ("{{ a" + "|trim" * 5000 + " }}", "nested too deeply"),
        ("{% if 1 %}" * 3000 + "{% endif %}" * 3000, "nested too deeply"),
        ("{{ " + "9" * 9999 + " }}", "4300 digits"),
        ("{% for %}", "Expected an expression"),
        ("{{ x | no_such_filter }}", "No filter named 'no_such_filter'"),
    ],
)
def test_a_compile_error_is_one_line(source: str, reason: str) -> None:
    with pytest.raises(TemplateUnusable, match=reason) as error:
        ChatTemplate(source, {})
    assert len(str(error.value)) <= 203
    assert "\n" not in str(error.value)


def test_decoding_compiles_no_template(tmp_path: Path) -> None:
    write_byte_tokenizer(tmp_path, "{% for %}")
    code = (
        "import sys; from pathlib import Path; from specserve.text import Tokenizer\n"
        "tokenizer = Tokenizer(Path(sys.argv[1]))\n"
        "print(tokenizer.decode([72, 73]), tokenizer.eos_ids, 'jinja2' in sys.modules)"
    )
    said = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True
    )
    assert said.stdout.endswith(" (258,) False\n")
