"""Chat templates: Jinja, rendered by transformers, from a shipped name, a model or a file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jinja2 import TemplateSyntaxError, meta
from stoker import store_urls
from stoker.errors import BadInput, nearest
from stoker.language import hub
from stoker.words import first_line

Template = str | dict[str, str]
"""One template for all conversations, or several by name, as some tokenizers have."""

NAMES = ("chatml", "llama3", "gemma", "mistral", "alpaca")
"""The shipped templates. Their beginning of a text is adapted to the tokenizer, see `of`."""
ENDED_BY_EOS = ("mistral", "alpaca")
"""Those that end assistant turns with the end-of-text token, which every tokenizer has."""
ALLOWED = (
    f"chat_template={NAMES[0]} (or {', '.join(NAMES[1:])}; a model or folder that has one; a Jinja file)"
)
"""What can be given, for messages."""

_FOLDER = Path(__file__).with_name("templates")
_OF_FILES = (".jinja", ".jinja2", ".j2", ".txt", ".json")


def read(given: str) -> Template:
    """The template of a shipped name, of the tokenizer of a directory or hub id, or of a file.

    Raises BadInput if it does not exist, is not valid Jinja, or writes no messages.
    """
    if given in NAMES:
        return (_FOLDER / f"{given}.jinja").read_text(encoding="utf-8")
    if "{{" in given or "{%" in given:
        raise BadInput(
            "chat_template is Jinja, but should name where it is: save it as FILE.jinja, and give that"
        )
    path = Path(given).expanduser()
    if store_urls.is_url(given) or path.is_dir():
        return _of_tokenizer(given)
    if path.exists() or path.suffix in _OF_FILES or given.startswith((".", "/", "~")):
        return _of_file(path)
    if "/" not in given:
        raise BadInput(
            f"chat_template={given} is neither a local file nor a known name{nearest(given, NAMES)}; "
            f"give {ALLOWED}"
        )
    return _of_tokenizer(given)


def of(given: str, tokenizer: Any) -> Template:
    """The template for a tokenizer: a shipped one begins a text the way that the tokenizer does."""
    found = read(given)
    begun = given in NAMES and begins(tokenizer)
    return f"{{{{ bos_token }}}}{found}" if begun else found


def begins(tokenizer: Any) -> bool:
    """Whether a tokenizer itself begins every text with its bos_token."""
    return tokenizer.bos_token_id in tokenizer("").get("input_ids", [])[:1]


def _of_tokenizer(reference: str) -> Template:
    folder = hub.find(reference, "chat_template", weights=False)
    from transformers import AutoTokenizer

    try:
        found: Template | None = AutoTokenizer.from_pretrained(folder).chat_template
    except (OSError, ValueError, KeyError) as error:
        raise BadInput(
            f"chat_template={reference}: its tokenizer cannot be loaded: {first_line(error)}"
        ) from error
    if not found:
        raise BadInput(f"chat_template={reference}: its tokenizer has no chat template: give {ALLOWED}")
    return found


def _of_file(file: Path) -> str:
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"chat_template={file} cannot be read: {error}") from error
    from transformers.utils.chat_template_utils import _compile_jinja_template

    try:
        environment = _compile_jinja_template(text).environment  # supports the tags that templates use
        names = meta.find_undeclared_variables(environment.parse(text))
    except TemplateSyntaxError as error:
        raise BadInput(
            f"chat_template={file} is not a valid Jinja template, line {error.lineno}: {error.message}"
        ) from error
    if "messages" not in names:
        raise BadInput(
            f"chat_template={file} {'is empty' if not text.strip() else 'writes no messages'}: give a Jinja "
            "template that iterates over `messages`, each with `role` and `content`"
        )
    return text
