"""Messages to prompt text, by the jinja template that came with the model."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, ClassVar, NoReturn

import jinja2
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError

from longspan._core import CheckpointError, InvalidArgument, Unsupported
from longspan.tokenizer import read_json_object

Message = Mapping[str, Any]


# Marks where an unfinished last message ends; the space shows whether the template strips it.
_CONTINUE = "<continue-here> "


class _TemplateError(jinja2.TemplateError):
    """What a template raises on messages it does not accept."""


class _Environment(ImmutableSandboxedEnvironment):
    """jinja2's sandbox hands out an undefined value for `x.__class__`; this one refuses at once."""

    def unsafe_undefined(self, obj: Any, attribute: str) -> NoReturn:
        raise SecurityError(f"access to attribute {attribute!r} of {type(obj).__name__}")


class _GenerationBlock(Extension):
    """{% generation %}, which marks the assistant's part for training: its body, unchanged."""

    tags: ClassVar[set[str]] = {"generation"}

    def parse(self, parser: Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class ChatTemplate:
    """A compiled template. Throws CheckpointError for one that is malformed or hostile."""

    def __init__(self, source: str, special_tokens: Mapping[str, str] | None = None) -> None:
        """special_tokens: "bos_token", "eos_token", ... as the template names them."""
        environment = _Environment(
            trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _GenerationBlock]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise
        environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
        self._special_tokens = dict(special_tokens or {})
        try:
            self._template = environment.from_string(source)
        except (jinja2.TemplateError, RecursionError) as error:
            raise CheckpointError(f"chat template: expected a jinja template, {error}") from error

    @classmethod
    def from_dir(
        cls, model_dir: str | Path, special_tokens: Mapping[str, str] | None = None
    ) -> ChatTemplate | None:
        """The template of chat_template.jinja or tokenizer_config.json; None when there is none."""
        path = Path(model_dir) / "chat_template.jinja"
        config_path = Path(model_dir) / "tokenizer_config.json"
        if path.exists():
            return cls(_read(path), special_tokens)
        config = read_json_object(config_path) if config_path.exists() else {}
        source = config.get("chat_template")
        if isinstance(source, list):  # several, by name
            named = {t.get("name"): t.get("template") for t in source if isinstance(t, dict)}
            source = named.get("default")
            if source is None:
                raise CheckpointError(
                    f"{config_path}: chat_template: expected one named 'default', got {list(named)}"
                )
        if source is None:
            return None
        if not isinstance(source, str):
            raise CheckpointError(f"{config_path}: chat_template: expected a string")
        return cls(source, special_tokens)

    @classmethod
    def from_user(
        cls, config: Any, special_tokens: Mapping[str, str] | None = None
    ) -> ChatTemplate:
        """chat_template_config of pipeline(): the path of a jinja file, or {"chat_template": text},
        or an object with that attribute."""
        if isinstance(config, (str, os.PathLike)):
            return cls(_read(Path(config)), special_tokens)
        options = config if isinstance(config, Mapping) else getattr(config, "__dict__", {})
        given = {name: value for name, value in options.items() if value is not None}
        source = given.pop("chat_template", None)
        if given:
            raise Unsupported(
                f"chat_template_config: expected only 'chat_template', got {sorted(given)}"
            )
        if not isinstance(source, str):
            raise InvalidArgument(
                f"chat_template_config: expected a path or a 'chat_template', got {config!r:.80}"
            )
        return cls(source, special_tokens)

    def render(self, messages: Sequence[Message], add_generation_prompt: bool = True) -> str:
        """The prompt of a conversation. One that ends with the assistant is left open there, to be
        continued; otherwise the assistant's next turn is opened.

        Throws InvalidArgument for messages that the template does not accept.
        """
        conversation = [_checked(message, i) for i, message in enumerate(messages)]
        if not conversation:
            raise InvalidArgument("messages: expected at least one, got none")
        last = conversation[-1]
        if not add_generation_prompt or last["role"] != "assistant":
            return self._run(conversation, add_generation_prompt)
        last["content"] += _CONTINUE
        text = self._run(conversation, add_generation_prompt=False)
        end = text.rfind(_CONTINUE.rstrip())
        if end < 0:
            raise InvalidArgument(
                "messages: expected a chat template that keeps the last message, to continue it"
            )
        # A template that strips contents has stripped the mark's space, so it would this text's.
        return text[:end] if text.startswith(_CONTINUE, end) else text[:end].rstrip()

    def _run(self, messages: list[dict[str, Any]], add_generation_prompt: bool) -> str:
        try:
            return self._template.render(
                messages=messages,
                add_generation_prompt=add_generation_prompt,
                tools=None,
                documents=None,
                **self._special_tokens,
            )
        except SecurityError as error:
            raise CheckpointError(f"chat template: expected a harmless one, got {error}") from error
        except jinja2.TemplateError as error:
            raise InvalidArgument(f"messages: the chat template refuses them: {error}") from error
        except Exception as error:  # a template can raise whatever its expressions raise
            raise CheckpointError(f"chat template: expected text, got {error!r}") from error


def _checked(message: Message, index: int) -> dict[str, Any]:
    """The message with its content as one string: text parts joined by newlines, as LMDeploy."""
    where = f"messages[{index}]"
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise InvalidArgument(f"{where}: expected a dict with a 'role' and a 'content'")
    content = message.get("content")
    if isinstance(content, list):
        parts = [part.get("text") if isinstance(part, Mapping) else None for part in content]
        if not all(isinstance(part, str) for part in parts):
            raise Unsupported(f"{where}.content: expected parts of type 'text' only")
        content = "\n".join(parts)
    if not isinstance(content, str):
        raise InvalidArgument(
            f"{where}.content: expected a string or text parts, got {type(content).__name__}"
        )
    return {**message, "content": content}


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent)


def _raise(message: str) -> NoReturn:
    raise _TemplateError(message)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: expected a jinja template, got {error}") from error
