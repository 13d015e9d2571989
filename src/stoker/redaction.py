"""What must not be written down: secrets, known by their name, by their look, or by their value.

- A name: `password`, `HF_TOKEN`, `db.api_key`. What stands under it is removed.
- A look: the formats of well-known keys and tokens, of private keys, of URLs with a password. The
  formats are those of gitleaks (https://github.com/gitleaks/gitleaks, `config/gitleaks.toml`) and of
  detect-secrets (https://github.com/Yelp/detect-secrets, `detect_secrets/plugins`).
- A value: what an environment variable of such a name holds now, or what a config held under such a
  name (`keep_out`), wherever it turns up.

Everything that is written into a run's directory as text comes through here. Each look is searched for
only where the few characters that it begins with occur at all, so most texts cost a few scans of memory.
"""

from __future__ import annotations

import functools
import hashlib
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import PurePath
from typing import Any

REDACTED = "[REDACTED]"
"""What stands in place of a secret."""

_LEAST = 8  # characters of a value that is removed wherever it turns up: shorter ones are words
_BINARY = 8192  # bytes at the start of a file in which a zero byte says that it is no text, as git has it

_WORDS = re.compile(
    r"""passw(?:or)?d | passphrase | passcode
    | (?:^|[_.\-])(?:
        secrets? | credentials? | creds | auth | authorization | bearer | cookies? | pass | token
        | (?:api|access|private|secret|signing|encryption|account|master|ssh|deploy)[_\-]?keys?
        | connection[_\-]?string | [a-z]+[_\-]pwd
    )(?:[_.\-]|\d*$)
    | (?:^|[_.\-])(?:
        pw | (?-i:pwd) | jwts? | dsn | webhooks?(?:[_\-]?urls?)? | licen[cs]e[_\-]?keys?
        | (?:db|ssh|user|admin|root|smtp|mail|mysql|pg|redis|ldap|ftp|vnc|proxy)pass
        | (?:openai|anthropic|wandb|hf|huggingface|gemini|google|gcp|azure|aws|cohere|mistral|groq|together
            |deepseek|openrouter|replicate|comet|neptune|pinecone|langsmith|langfuse|serp|tavily|stripe|sendgrid|twilio|github
            |gitlab|slack|sentry|datadog)[_\-]?keys?
    )\d*$
    | (?-i:[A-Z0-9]_PAT)$  # a personal access token; `file_pat` is a pattern, `PWD` a folder""",
    re.VERBOSE | re.IGNORECASE,
)
_OTHER_THAN_SECRET = re.compile(  # what such a word is only about, or a token of a text
    r"""(?:^|[_.\-])(?<!webhook.)(?:
        file|path|dir|folder|name|env|var|type|kind|method|mode|id|ids|sock|socket|url|uri|endpoint|header|headers
        |count|len|length|limit|size|budget|dim|index|mask|ratio|rate|weight|loss|class|prefix|suffix|expires|required
        |error|exception|warning|failed|failure|denied
    )$
    | (?:^|[_.\-])tokens$
    | (?:^|[_.\-])(?:pad|eos|bos|unk|sep|cls|mask|image|audio|video|start|end|stop|begin|special|new|next
        |last|first|per|prompt|response|boundary|newline|fim|eot|eod|im|blank|word|sub|added|extra|text|max|min|by|each)_token$
    """,
    re.VERBOSE | re.IGNORECASE,
)
_CAMEL = re.compile(r"(?<=[a-z0-9])(?=[A-Z])")

# What a key looks like, with characters that each of its forms begins with. Group "kept" stays.
_LOOKS: tuple[tuple[tuple[str, ...], re.Pattern[str]], ...] = tuple(
    (starts, re.compile(pattern))
    for starts, pattern in (
        (("AKIA", "ASIA", "ABIA", "ACCA"), r"\b(?:AKIA|ASIA|ABIA|ACCA)[A-Z2-7]{16}\b"),
        (("ghp_", "gho_", "ghu_", "ghs_", "ghr_"), r"\bgh[pousr]_[0-9A-Za-z]{36,}"),
        (("github_pat_",), r"\bgithub_pat_\w{22,}"),
        (("glpat-",), r"\bglpat-[\w-]{20,}"),
        (("hf_",), r"\bhf_[A-Za-z0-9]{30,}"),
        (("api_org_",), r"\bapi_org_[A-Za-z]{34}"),
        (("sk-",), r"\bsk-(?:(?:proj|svcacct|admin|ant|or)-[\w-]{20,}|[A-Za-z0-9]{32,})"),
        (("sk_", "rk_"), r"\b[sr]k_(?:test|live|prod)_[A-Za-z0-9]{10,}"),
        (("xox", "xapp-"), r"\b(?:xox[a-z](?:\.xox[a-z])?|xapp)-[A-Za-z0-9-]{10,}"),
        (("hooks.slack.com/",), r"(?P<kept>hooks\.slack\.com/(?:services|workflows|triggers)/)[\w+/]{40,}"),
        (("AIza",), r"\bAIza[\w-]{35}"),
        (("ya29.",), r"\bya29\.[\w-]{20,}"),
        (("GOCSPX-",), r"\bGOCSPX-[\w-]{20,}"),
        (("AccountKey=",), r"(?P<kept>AccountKey=)[A-Za-z0-9+/]{40,}={0,2}"),
        (("npm_",), r"\bnpm_[A-Za-z0-9]{36}"),
        (("pypi-AgE",), r"\bpypi-AgE[\w-]{50,}"),
        (("dapi",), r"\bdapi[a-f0-9]{32}(?:-\d)?\b"),
        (("local-",), r"\blocal-[0-9a-f]{40}\b"),  # of a W&B server of one's own
        (("eyJ",), r"\beyJ[A-Za-z0-9_-]{14,}\.eyJ[A-Za-z0-9_-]{14,}\.[A-Za-z0-9_-]{10,}={0,2}"),
        (
            ("PRIVATE KEY",),
            r"(?P<kept>-----BEGIN[ A-Z0-9_-]{0,100}PRIVATE KEY(?: BLOCK)?-----)"
            r"[\s\S]{64,}?-----END[ A-Z0-9_-]{0,100}PRIVATE KEY(?: BLOCK)?-----",
        ),
        (("://",), r"(?P<kept>://[^/\s:@'\"<>{}$`\\]*:)[^@/\s'\"<>{}$`\\]+(?=@)"),
        (("://",), r"(?P<kept>https?://)[\w-]{20,}(?=@)"),
        (("earer ",), r"(?P<kept>\b[Bb]earer )(?=[\w.~+/-]*\d)[\w.~+/-]{16,}=*"),
    )
)  # fmt: skip

# A text in quotes, or all that is left of a line, after a sign of assignment: what it is assigned to says
# whether it is a secret.
_QUOTED = re.compile(r"(?P<quote>[\"'])(?P<value>[^\"'\s\\{}<>$]{8,})\\?(?P=quote)")
_BARE = re.compile(r"[=:][ \t]{0,8}(?P<value>[\w+/=~!@%^&*.-]{8,})(?=[ \t\r]*(?:\n|$|[ \t;,&]))")
_ASSIGNED = (
    re.compile(  # what stands before a value: `name =`, `"name":`, `name: str =`, `["name"] =`, `("name",`
        r"(?P<name>[\w.\-]{3,100})\\?[\"']?\]?(?:\s*:\s*[\w\[\]. |]{1,40})?\s*(?:[=:]>?|,)?\s*[rbfuRBFU]?\\?$"
    )
)
_NAMED = (
    "pass", "secret", "cred", "auth", "bearer", "cookie", "token", "key", "pw", "connection", "_pat", "jwt",
    "dsn", "webhook",
)  # fmt: skip
_FROM_CODE = frozenset({
    ".py", ".pyx", ".pyi", ".c", ".cc", ".cpp", ".cu", ".cuh", ".h", ".hpp", ".rs", ".go", ".js", ".ts",
    ".jl", ".lua", ".java", ".r",
})  # fmt: skip
_NO_SECRETS = frozenset({"disabled", "required", "optional", "kerberos", "password", "anonymous"})

_kept_out: set[str] = set()  # of the process, as its environment is: a secret is one whoever writes


@functools.lru_cache(4096)
def is_secret_name(name: str) -> bool:
    """Whether what stands under a name is a secret: `HF_TOKEN`, `dbPassword`; not `pad_token`."""
    spelled = _CAMEL.sub("_", name) if not name.isupper() else name
    return _WORDS.search(spelled) is not None and _OTHER_THAN_SECRET.search(spelled) is None


def keep_out(config: Mapping[str, Any]) -> None:
    """Remove the secrets of a config from all that this process writes down from now on."""
    found = (_texts(value) for name, value in config.items() if is_secret_name(name))
    _kept_out.update(value for values in found for value in values if _is_distinct(value))


def text(said: str, *, code: bool = False) -> str:
    """A text without its secrets.

    Args:
        code: it is of a programming language: only what stands in quotes is a value there.
    """
    for value in values():
        if value in said:
            said = said.replace(value, REDACTED)
    for starts, look in _LOOKS:
        if any(start in said for start in starts):
            said = look.sub(_without, said)
    lower = said.lower()
    if any(word in lower for word in _NAMED):
        said = _QUOTED.sub(_without_assigned, said)
        said = said if code else _BARE.sub(_without_assigned, said)
    return said


def tree(value: Any) -> Any:
    """A value of JSON types without the secrets in it: those under a name, and those within texts."""
    if isinstance(value, str):
        return text(value)
    if isinstance(value, Mapping):
        return {key: hidden(item) if is_secret_name(str(key)) else tree(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [tree(item) for item in value]
    return value


def hidden(value: Any) -> Any:
    """A secret, hidden: its texts are replaced; numbers, and that there is none, are no secret."""
    if isinstance(value, str):
        return REDACTED if value else value
    if isinstance(value, Mapping):
        return {key: hidden(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [hidden(item) for item in value]
    return value


def holds_redacted(value: Any) -> bool:
    """Whether something was removed from a value of JSON types."""
    return any(REDACTED in said for said in _texts(value))


def command(words: Sequence[str]) -> list[str]:
    """The words of a command without their secrets: `password=...`, and what follows `--password`."""
    found: list[str] = []
    for word in words:
        name, sign, value = word.partition("=")
        before = found[-1] if found else ""
        if sign and value and is_secret_name(name.lstrip("-")):
            found.append(f"{name}={REDACTED}")
        elif before.startswith("--") and "=" not in before and is_secret_name(before.lstrip("-")):
            found.append(REDACTED)
        else:
            found.append(text(word))
    return found


def variables(given: Mapping[str, str]) -> dict[str, str]:
    """Environment variables without the secrets among them."""
    return {name: REDACTED if is_secret_name(name) else text(value) for name, value in given.items()}


def content(path: str, data: bytes) -> bytes | None:
    """The content of a file without its secrets; None where it is no text, and holds one."""
    if b"\0" in data[:_BINARY]:
        return None if holds(data, values()) else data
    said = data.decode("utf-8", "surrogateescape")
    kept = text(said, code=is_code(path))
    return data if kept == said else kept.encode("utf-8", "surrogateescape")


def is_code(path: str) -> bool:
    """Whether a file is of a programming language, by its ending."""
    return PurePath(path).suffix.lower() in _FROM_CODE


def holds(data: bytes, values: Sequence[str]) -> bool:
    """Whether one of some values is in a file."""
    return any(value.encode() in data for value in values)


def rules() -> bytes:
    """What tells the names and looks of this version from those of another."""
    known = [look.pattern for _, look in _LOOKS]
    patterns = (_WORDS, _OTHER_THAN_SECRET, _CAMEL, _QUOTED, _BARE, _ASSIGNED)
    known += [pattern.pattern for pattern in patterns]
    return hashlib.sha256(repr((known, _NAMED, sorted(_FROM_CODE), _BINARY)).encode()).digest()


def values() -> list[str]:
    """The secrets that this process knows, the longest first: one may be part of another."""
    told = (value for name, value in os.environ.items() if is_secret_name(name))
    return sorted({*filter(_is_distinct, told), *_kept_out}, key=len, reverse=True)


def _is_distinct(value: str) -> bool:
    """Whether a value may be removed wherever it turns up: it is no word, no path, and no placeholder."""
    if len(value) < _LEAST or value.lower() in _NO_SECRETS or REDACTED in value:
        return False
    return not (value.startswith(("/", "~")) and os.path.exists(os.path.expanduser(value)))  # noqa: PTH110,PTH111


def _texts(value: Any) -> Iterable[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _texts(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _texts(item)


def _without(found: re.Match[str]) -> str:
    return f"{found.groupdict().get('kept') or ''}{REDACTED}"


def _without_assigned(found: re.Match[str]) -> str:
    """What was matched, without its value where that is assigned to the name of a secret."""
    value = found["value"]
    if not any(c.isdigit() for c in value) or not any(c.isalpha() for c in value):
        return found[0]  # a word, or a number: examples and keys of dictionaries
    before = found.string[max(0, found.start() - 160) : found.start()]
    lower = before.lower()
    name = _ASSIGNED.search(before) if any(word in lower for word in _NAMED) else None
    if name is None or not is_secret_name(name["name"]):
        return found[0]
    return found[0].replace(value, REDACTED)
