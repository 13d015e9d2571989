"""A file with a chat template: Jinja, as transformers renders it, that writes a conversation's messages."""

from __future__ import annotations

from pathlib import Path

from jinja2 import TemplateSyntaxError, meta
from stoker.errors import BadInput


def read(file: Path) -> str:
    """The template of a file. Raises BadInput where it is not there, is no Jinja, or writes no messages."""
    try:
        text = file.expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"chat_template={file} cannot be read: {error}") from error
    from transformers.utils.chat_template_utils import _compile_jinja_template

    try:
        environment = _compile_jinja_template(text).environment  # has the tags that templates use
        names = meta.find_undeclared_variables(environment.parse(text))
    except TemplateSyntaxError as error:
        raise BadInput(
            f"chat_template={file} is no Jinja template, see its line {error.lineno}: {error.message}"
        ) from error
    if "messages" not in names:
        raise BadInput(
            f"chat_template={file} {'is empty' if not text.strip() else 'writes no messages'}: give a Jinja "
            "template that goes through `messages`, each with `role` and `content`"
        )
    return text
