"""Converts text and chats to token ids, and token ids to text.

Owns the tokenizer and the chat template of one model directory. Invariant: user text never becomes
a control token, whatever its spelling, unless the caller allows it.
"""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import cached_property
from itertools import chain
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final

from tokenizers import decoders, models

from specserve.text.chat_messages import (
    Message,
    PlainMessage,
    other_fields,
    read_messages,
    user_texts,
)
from specserve.text.chat_tools import (
    check_text,
    read_tools,
    read_variables,
    strings,
    with_strings,
)
from specserve.text.control_tokens import (
    END_OF_TURN,
    ControlTokens,
    EncodingError,
    add_named_tokens,
    encode,
    is_character,
)
from specserve.text.detokenizer import Detokenizer
from specserve.text.model_files import (
    TokenizerError,
    read_chat_template,
    read_special_tokens,
    read_tokenizer,
)
from specserve.types import RequestError

if TYPE_CHECKING:
    from specserve.text.chat_template import ChatTemplate, Rendering, Variables

# Most bytes that become one byte in a Unicode normal form: U+1D400 becomes "A".
_MAX_NORMALIZED: Final = 4
_NOT_KEPT: Final = (
    "a control token, and the template rewrites messages so that it cannot be kept as text; "
    "remove it"
)


class Tokenizer:
    """The tokenizer of a model directory: tokenizer.json and the files that complete it.

    `eos_ids` are the end tokens that these files name. `hidden_ids` are those and the tokens
    flagged special, except single characters of the vocabulary; decoded text omits them by default.
    Decoding never compiles the chat template; `compile_template` and `prepare` do, or the first
    encoding. Raises `TokenizerError` if the files are missing or unusable.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._special = read_special_tokens(directory)
        self._source = read_chat_template(directory)
        self._tokenizer = read_tokenizer(directory)
        add_named_tokens(self._tokenizer, self._special.all)
        try:
            self.detokenizer = Detokenizer(self._tokenizer)
        except ValueError as error:
            raise TokenizerError(f"{directory / 'tokenizer.json'}: {error}") from None
        added = self._tokenizer.get_added_tokens_decoder()
        self.eos_ids = self._end_tokens({token.content: index for index, token in added.items()})
        self.hidden_ids = frozenset(
            index
            for index, token in added.items()
            if index in self.eos_ids
            or (token.special and not is_character(self._tokenizer, token.content))
        )

    @property
    def vocab_size(self) -> int:
        """The number of tokens. The vocabulary of the model's head may be padded beyond it."""
        return self._tokenizer.get_vocab_size(with_added_tokens=True)

    @property
    def has_chat_template(self) -> bool:
        return self._source is not None

    def vocabulary(self) -> dict[str, int]:
        """The id of every token, by its spelling in tokenizer.json."""
        return self._tokenizer.get_vocab(with_added_tokens=True)

    def max_token_bytes(self) -> int | None:
        """The largest number of bytes of text that one token can stand for, except control tokens.

        None if there is no such bound: one token stands for any unknown word, or space is dropped.
        """
        model = self._tokenizer.model
        bytewise = isinstance(self._tokenizer.decoder, decoders.ByteLevel)
        if not isinstance(model, models.BPE) or not (bytewise or model.byte_fallback):
            return None
        longest = max(len(token.encode()) for token in self.vocabulary())
        return longest if self._tokenizer.normalizer is None else longest * _MAX_NORMALIZED

    def compile_template(self) -> None:
        """Compile the chat template and render it to find its literals. Raises `TokenizerError`."""
        _ = self._template_literals

    def prepare(self) -> None:
        """Do in advance what the first `encode` or `chat` would do. Raises `TokenizerError`."""
        _ = self._control

    def encode(
        self, text: str, *, allow_special: bool = False, add_special: bool = True
    ) -> list[int]:
        """Token ids of a prompt.

        `allow_special`: spellings of control tokens in `text` become these tokens, not plain text.
        `add_special`: add the tokens that the model expects around a text, such as BOS. Raises
        `RequestError`.
        """
        check_text("prompt", text)
        try:
            if allow_special:
                return encode(self._tokenizer, text, add_special_tokens=add_special)
            return self._control.encode(text, add_special_tokens=add_special)
        except EncodingError as error:
            raise RequestError("prompt", str(error)) from None

    def chat(
        self,
        messages: Sequence[Message],
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        *,
        tools: Sequence[Mapping[str, Any]] = (),
        template_kwargs: Mapping[str, Any] = MappingProxyType({}),
    ) -> list[int]:
        """Token ids of a chat, rendered by the model's chat template.

        `add_generation_prompt` appends the beginning of the model's answer. With
        `continue_final_message` the ids end where the content of the last message ends, which must
        be an assistant's. Control tokens come from the template only. If the template changes
        a content by more than stripping space and thinking, and the content makes a control token,
        that token cannot be attributed and the request is rejected. The template may show `tools`
        (OpenAI's form) and uses the variables `template_kwargs`, which it must have. Raises
        `RequestError` naming the field.
        """
        plain = read_messages(messages)
        if continue_final_message:
            _check_continued(plain, add_generation_prompt)
        if self._template is None:
            raise RequestError(
                "messages",
                "this model has no chat template; send a plain prompt, or add a chat_template to "
                "the model's tokenizer_config.json",
            )
        own = read_variables(template_kwargs) | ({"tools": read_tools(tools)} if tools else {})
        self._template.check_variables(template_kwargs)
        variables = own | {"add_generation_prompt": add_generation_prompt}
        try:
            chat = self._template.render(plain, variables)
            self._check_other_fields(chat.text, plain, own, variables)
            if continue_final_message:
                chat = chat.up_to_content(len(plain) - 1)
            return self._encode_chat(chat, plain, variables)
        except EncodingError as error:
            raise RequestError("messages", str(error)) from None

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        """The text of `ids`; `skip_special`: without `hidden_ids`.

        Invalid UTF-8 becomes U+FFFD. Unknown ids have no text.
        """
        skipped = self.hidden_ids if skip_special else frozenset()
        return self.detokenizer.text([index for index in ids if index not in skipped])

    def _encode_chat(
        self, chat: "Rendering", plain: Sequence[PlainMessage], variables: "Variables"
    ) -> list[int]:
        """Token ids of the rendered chat of the messages `plain`. May raise `EncodingError`."""
        ids = encode(self._tokenizer, chat.text, add_special_tokens=False)
        if not self._is_forged(chat, plain, ids, variables):
            return ids
        if chat.spans is None:
            raise self._control_token_error(plain) or RequestError(
                "messages", f"what this model's chat template makes of them spells {_NOT_KEPT}"
            )
        user_ranges = [(span.start, span.end) for span in chat.spans]
        return self._control.encode_between(self._tokenizer, chat.text, user_ranges)

    @cached_property
    def _template(self) -> "ChatTemplate | None":
        # Imported only here, so that a process that only decodes cannot compile a template.
        from specserve.text.chat_template import ChatTemplate, TemplateUnusable

        if self._source is None:
            return None
        try:
            return ChatTemplate(self._source.text, self._special.roles)
        except TemplateUnusable as error:
            raise TokenizerError(
                f"{self.directory / self._source.file_name}: the chat template cannot be compiled "
                f"({error}); use the model's original one"
            ) from None

    @cached_property
    def _template_literals(self) -> list[str]:
        return [] if self._template is None else self._template.template_literals()

    @cached_property
    def _control(self) -> ControlTokens:
        template_literals = self._template_literals
        try:
            return ControlTokens(self._tokenizer, self._special.all, template_literals)
        except Exception as error:  # the library raises nothing narrower
            raise TokenizerError(
                f"{self.directory}/tokenizer.json: its control tokens cannot be told from text "
                f"({error}); save the tokenizer again with a recent version of its library"
            ) from None

    def _is_forged(
        self,
        chat: "Rendering",
        messages: Sequence[PlainMessage],
        ids: list[int],
        variables: "Variables",
    ) -> bool:
        """Whether user text makes a control token.

        It does if the chat with harmless text in its place has other control tokens. If the
        template fails for such a chat, it does if a user text alone makes a control token.
        """
        found = self._control.select(ids)
        if chat.marked is None:
            return self._control_token_error(messages) is not None
        if found == self._control_tokens_in(chat.marked):
            return False
        if chat.spans is not None:
            return True
        # The template may react to user text: "/no_think" makes some write <think></think>.
        # So compare with a rendering that keeps the user text except for control tokens in it.
        assert self._template is not None
        neutralized = self._control.neutralized
        plain = [
            message | {f: neutralized(message[f]) for f in user_texts(message)}
            for message in messages
        ]
        text = self._template.text(plain, variables)
        return found != self._control_tokens_in(text)

    def _check_other_fields(
        self,
        text: str,
        plain: Sequence[PlainMessage],
        own: Mapping[str, Any],
        variables: "Variables",
    ) -> None:
        """Raise `RequestError` if tool calls, tools or variables make a control token.

        They do if the chat, rendered as `text`, has other control tokens when the characters with
        which control tokens begin and end are replaced in them. `own` are the `variables` that the
        request has set.
        """
        assert self._template is not None
        harmless, others = self._control.without_edges, [other_fields(each) for each in plain]
        messages = [
            message | {field: with_strings(value, harmless) for field, value in fields.items()}
            for message, fields in zip(plain, others, strict=True)
        ]
        values = {name: with_strings(value, harmless) for name, value in own.items()}
        if messages == list(plain) and values == own:
            return
        expected = None  # the template may fail for other values
        with suppress(RequestError):
            harmless_text = self._template.text(messages, {**variables, **values})
            expected = self._control_tokens_in(harmless_text)
        if expected == self._control_tokens_in(text):
            return
        own = {
            name if name == "tools" else f"chat_template_kwargs.{name}": own[name] for name in own
        }
        named = {f"messages[{index}]": fields for index, fields in enumerate(others)} | own
        for at, part in chain.from_iterable(strings(name, value) for name, value in named.items()):
            if found := self._control_tokens_in(part):
                token = self._control.spelling_of(found[0])
                raise RequestError(at, f"it spells {token!r}, a control token; remove it")
        if expected is not None:
            raise RequestError(
                "messages", "tool calls, tools or variables spell a control token; remove it"
            )

    def _control_tokens_in(self, text: str) -> list[int]:
        return self._control.select(encode(self._tokenizer, text, add_special_tokens=False))

    def _control_token_error(self, messages: Sequence[PlainMessage]) -> RequestError | None:
        """The error for the first user text that by itself makes a control token; else None."""
        for index, message in enumerate(messages):
            for field in user_texts(message):
                if found := self._control_tokens_in(message[field]):
                    token = self._control.spelling_of(found[0])
                    return RequestError(
                        f"messages[{index}].{field}", f"it spells {token!r}, {_NOT_KEPT}"
                    )
        return None

    def _end_tokens(self, added: Mapping[str, int]) -> tuple[int, ...]:
        """The ids of eos_token, and of the `END_OF_TURN` tokens in the chat template."""
        template = "" if self._source is None else self._source.text
        named = self._special.roles.get("eos_token")
        ids = [None if named is None else self._tokenizer.token_to_id(named)]
        ids += [i for token, i in added.items() if token in END_OF_TURN and token in template]
        return tuple(dict.fromkeys(index for index in ids if index is not None))


def same_vocabulary(a: Tokenizer, b: Tokenizer) -> str | None:
    """None if both map every id to the same token, else a description of the first difference."""
    first, second = ({i: token for token, i in each.vocabulary().items()} for each in (a, b))
    if first == second:
        return None
    index = min(i for i in first.keys() | second.keys() if first.get(i) != second.get(i))
    names = [repr(each[index]) if index in each else "no token" for each in (first, second)]
    return (
        f"id {index} is {names[0]} in one ({len(first)} tokens) and {names[1]} in the other "
        f"({len(second)} tokens)"
    )


def _check_continued(messages: Sequence[PlainMessage], add_generation_prompt: bool) -> None:
    if add_generation_prompt:
        raise RequestError(
            "continue_final_message", "contradicts add_generation_prompt; set one of them to false"
        )
    role = messages[-1]["role"]
    if role != "assistant":
        raise RequestError(
            "continue_final_message",
            f"the last message is of role {role!r}; only an assistant's can be continued",
        )
