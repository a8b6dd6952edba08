"""Conversations -> text, as the checkpoint's own chat template writes them.

The template and the conversations are untrusted: a template runs in Jinja2's sandbox, and whatever
goes wrong in it is one line. How long it runs is not limited.
"""

import json
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prunetool.checkpoint.index import read_json
from prunetool.errors import CorpusError
from prunetool.tokenizer import named_token

if TYPE_CHECKING:
    import jinja2

FILE = "chat_template.jinja"
# Some templates write today's date. The same conversations must give the same tokens tomorrow; this
# day is Llama 3's own, for programs that give it none.
TODAY = datetime(2024, 7, 26)
# Names of ShareGPT's conversations, {"from": …, "value": …}, and of the usual messages.
ROLES = {"human": "user", "gpt": "assistant"}


def chat_templates(directory: Path) -> dict[str, str]:
    """A checkpoint's chat templates by name: of the file, which counts, or tokenizer_config.json.

    Raises:
      CheckpointError: if tokenizer_config.json cannot be read.
    """
    file, config = directory / FILE, directory / "tokenizer_config.json"
    if file.is_file():
        stated: Any = file.read_text("utf-8", "replace")
    else:
        stated = read_json(config).get("chat_template") if config.exists() else None
    if isinstance(stated, str):
        return {"default": stated}
    named = [one for one in stated if isinstance(one, dict)] if isinstance(stated, list) else []
    pairs = [(one.get("name"), one.get("template")) for one in named]
    return {a: b for a, b in pairs if isinstance(a, str) and isinstance(b, str)}


def conversation_text(directory: Path) -> Callable[[object, Any], str]:
    """A function that makes text of a row's messages, and names ``where`` they are in its errors.

    Messages are ``{"role": …, "content": …}``, or ShareGPT's ``{"from": …, "value": …}``.

    Args:
      directory: the checkpoint, whose default chat template is used.

    Raises:
      CorpusError: if there is no such template, or it cannot be used; from the function: if a value
        is no list of messages, or the template refuses them.
    """
    template, special = _compiled(directory), _special_tokens(directory)

    def text(where: object, value: Any) -> str:
        messages = [_message(one) for one in value] if isinstance(value, list) else []
        if not messages or None in messages:
            raise CorpusError(
                where,
                "has no conversation: a list of objects with role and content",
                "name its field with --text-field, or omit --chat",
            )
        try:
            return template.render(
                messages=messages, tools=None, documents=None, add_generation_prompt=False,
                **special,
            )  # fmt: skip
        except Exception as error:  # the template's own code can raise anything
            what = f"is refused by the model's chat template ({error})"
            raise CorpusError(where, what, "leave it out, or omit --chat") from error

    return text


def _message(said: Any) -> dict[str, Any] | None:
    if not isinstance(said, dict):
        return None
    if {"from", "value"} <= said.keys():
        role = said["from"]
        named = ROLES.get(role, role) if isinstance(role, str) else None
        said = {"role": named, "content": said["value"]}
    if not isinstance(said.get("role"), str) or "content" not in said:
        return None
    # Parquet has null for what a message lacks, and templates ask what it has.
    return {key: value for key, value in said.items() if value is not None or key == "content"}


def _special_tokens(directory: Path) -> dict[str, str]:
    """The special tokens that a template may write, such as ``bos_token``."""
    path = directory / "tokenizer_config.json"
    stated = read_json(path) if path.exists() else {}
    names = ("bos_token", "eos_token", "unk_token", "pad_token")
    found = {name: named_token(stated, name) for name in names}
    return {name: token for name, token in found.items() if token is not None}


def _compiled(directory: Path) -> "jinja2.Template":
    import jinja2
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """The tag that marks what the assistant said; here it changes nothing."""

        tags = {"generation"}  # noqa: RUF012  as Jinja2 has it

        def parse(self, parser: Any) -> list[jinja2.nodes.Node]:
            next(parser.stream)
            inside: list[jinja2.nodes.Node] = parser.parse_statements(
                ("name:endgeneration",), drop_needle=True
            )
            return inside

    def refuse(message: str) -> None:
        raise jinja2.TemplateError(message)

    def as_json(value: Any, ensure_ascii: bool = False, **how: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, **how)

    found = chat_templates(directory).get("default")
    if found is None:
        raise CorpusError(
            directory, "has no chat template", f"omit --chat, or copy the original model's {FILE}"
        )
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = as_json
    environment.globals |= {"raise_exception": refuse, "strftime_now": TODAY.strftime}
    try:
        return environment.from_string(found)
    except Exception as error:  # it becomes Python code, which can fail in any way
        what = f"has a chat template that cannot be used ({error})"
        raise CorpusError(directory, what, "omit --chat") from error
