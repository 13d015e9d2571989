"""Redaction of secrets, which are recognised by name, format, file or value.

- Name: `password`, `HF_TOKEN`, `db.api_key`. The value with that name is removed.
- Format: well-known keys and tokens, private keys, URLs with a password. The formats are those of gitleaks
  (https://github.com/gitleaks/gitleaks, `config/gitleaks.toml`) and detect-secrets
  (https://github.com/Yelp/detect-secrets, `detect_secrets/plugins`).
- File: `.env`, `key.pem`, `id_rsa`, unless git tracks it.
- Value: the current value of an environment variable with such a name, or a config value with such a name
  (`keep_out`), wherever it occurs.

All text written to a run's directory passes through here. Each format is searched for only if a few
of its fixed characters occur in the text, so most texts take only a few scans of memory.
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
"""Replaces a secret."""

_LEAST = 8  # the fewest characters of a value that is removed everywhere: shorter ones may be words
_SHORT = 400  # characters of a text up to which its redacted form is cached
_BACK = 400  # characters before a name that are searched for its context
_MOST_WORDS = 4  # the most words of an uncertain secret, such as `Basic c2VjcmV0`; longer values are prose
_MOST = 4000  # characters of a value that are inspected
_BINARY = 8192  # a zero byte within so many bytes marks a binary file, as in git

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
_OTHER_THAN_SECRET = re.compile(  # names of properties of secrets, and of tokens of text
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
_PATH_OF_KEY = re.compile(r"/(?:[\w.@+-]+/)*[\w.@+-]+\.[A-Za-z][A-Za-z0-9]{1,7}")  # base64 has no dot
_KEY_FILE = "GOOGLE_APPLICATION_CREDENTIALS"  # always a path
_CAMEL = re.compile(r"(?<=[a-z0-9])(?=[A-Z])")

# Formats of secrets, each with characters of which at least one occurs in every match. Group "kept" stays.
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
        (("local-",), r"\blocal-[0-9a-f]{40}\b"),  # a self-hosted W&B server
        (("eyJ",), r"\beyJ[A-Za-z0-9_-]{14,}\.eyJ[A-Za-z0-9_-]{14,}\.[A-Za-z0-9_-]{10,}={0,2}"),
        (
            ("PRIVATE KEY",),
            r"(?P<kept>-----BEGIN[ A-Z0-9_-]{0,100}PRIVATE KEY(?: BLOCK)?-----)"
            r"[\s\S]{64,}?-----END[ A-Z0-9_-]{0,100}PRIVATE KEY(?: BLOCK)?-----",
        ),
        (("://",), r"(?P<kept>https?://)[\w-]{20,}(?=@)"),
        (("earer ",), r"(?P<kept>\b[Bb]earer )(?=[\w.~+/-]*\d)[\w.~+/-]{16,}=*"),
        (("asic ",), r"(?P<kept>[Aa]uthorization\\?[\"']?\s*[:=,]\s*\\?[\"']?[Bb]asic )[\w.~+/-]{4,}=*"),
    )
)  # fmt: skip

# A value assigned to the name of a secret is a secret, whatever its characters. A name is found by a part of
# a word (to-ken, s-cre-t, a-uth: starting with a rare letter is faster), together with the sign that follows:
# `name =`, `"name":`, `name: str =`, `["name"] =`, `("name",`.
_NAMED = re.compile(
    r"(?:p(?:ass|at|w)|k(?:en|ey|ie)|c(?:re|onnection)|uth|bearer|jwt|dsn|webhook)[\w.\-]{0,80}+"
    r"(?P<close>\\?[\"'])?\]?(?:[ \t]*:[ \t]*[\w\[\]. |]{1,40}(?==[^=]))?\s*?(?P<sign>[:=]=|[=:]>?|,)"
)
_IN_NAMES = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_.-")
_STRING = re.compile(
    r"(?P<space>\s*\(?\s*)(?P<prefix>[rbfuRBFU]{0,2})(?P<open>\\?(?:\"{3}|'{3}|[\"']))"
    r"(?P<value>(?:(?!(?P=open))(?:\\[\s\S]|[\s\S])){1,20000}?)(?P=open)"
)
_WORD = re.compile(r"[ \t]*(?P<value>(?:\[REDACTED\]|\{[^{}\n]*\}|<[^<>\n]*>|[^\s,;&\"'`<>)\]}\\])+)")
_BEGINS_LINE = re.compile(r"[+\-]?[\s\"'*>;#-]*(?:(?:export|set|ENV|ARG) )?[\"']?")
_PAIR = re.compile(r"(?:- +)?[\"']?[\w.\-]+[\"']?:(?:\s|$)")
_QUERY = re.compile(r"(?P<kept>[?&](?P<name>[\w.\-]{2,64})=)(?P<value>[^\s&\"'`<>#\\;]+)")
_SIGNS_URL = re.compile(r"(?:^|[_.\-])(?:sig|signature|credential|key|code)$", re.IGNORECASE)
_IN_URL = re.compile(r"(?P<kept>://[^/\s:@'\"<>]*:)(?P<value>[^@/\s'\"]+)(?=@)")

# Values given to a command or defined in an option parser, each with characters that occur in every match. A
# group "name" must name a secret. A plain word is not a secret, unless it is quoted and its name is certain.
_GIVEN: tuple[tuple[tuple[str, ...], re.Pattern[str]], ...] = tuple(
    (starts, re.compile(pattern))
    for starts, pattern in (
        (
            ("--",),  # --password VALUE
            r"(?P<kept>--(?<![\w-]--)(?P<name>[A-Za-z][\w\-]{1,60})[ \t]+)(?P<quote>[\"']?)"
            r"(?P<value>(?<=[\"'])[^\"'\n]+(?=(?P=quote))|(?<![\"'])(?![-/~.])[^\s\"'`<>;|&)\]}\\]+)",
        ),
        (
            ("\"--", "'--"),  # add_argument("--password", default="VALUE")
            r"(?P<kept>[\"']--(?P<name>[A-Za-z][\w\-]{1,60})[\"'],[^()]{0,300}?\bdefault\s*=\s*[rbuRBU]?)"
            r"(?P<quote>[\"'])(?P<value>[^\"'\n]+)",
        ),
        (
            ("curl",),  # curl -u NAME:VALUE
            r"(?P<kept>\bcurl[ \t](?:[^\n|;&]|\\\n){0,300}?\s(?:-u|--user)[ =]?)"
            r"(?P<quote>[\"']?)(?P<user>[^\s:\"'=]+:)(?P<value>[^\s\"']+)",
        ),
        (
            ("mysql", "mariadb"),  # mysql -pVALUE
            r"(?P<kept>\b(?:mysql|mariadb)\w*[ \t][^\n|;&]{0,200}?(?<=\s)-p)"
            r"(?P<quote>[\"']?)(?P<value>(?!-)[^\s;|&\"']+)",
        ),
    )
)  # fmt: skip
_OF_FILES = {  # secrets in files with a format of their own, by file name
    ".netrc": re.compile(r"(?P<kept>\b(?:password|account)\s+)(?P<value>\S+)"),
    ".pgpass": re.compile(r"(?m)^(?P<kept>(?!#)(?:(?:\\.|[^:\\\n])*:){4})(?P<value>.+)$"),
}

# Placeholders and references that stand for a value defined elsewhere.
_FIELD = re.compile(
    r"\$\{\{.*?\}\}|\$\{[^}]*\}|\$\([^)]*\)|\$[A-Z_][A-Z0-9_]*\b|\$[a-z_]+\b|\{\{.*?\}\}|\{[A-Za-z_][^{}]*\}"
    r"|<[^<>]*>|%\(\w+\)s|%[sd]"
)
_EXPRESSION = re.compile(r"[A-Za-z_][\w.]*(?:\(.*\)|\[.*\]|\(\S*)[\s,;)]*")
_READ = re.compile(r"[A-Za-z_][A-Za-z_.]*\d?")
_CERTAIN = re.compile(  # names whose values are secrets even if they are words, unlike `token` or `auth`
    r"passw(?:or)?d|passphrase|passcode|(?:^|[_.\-])(?:pwd?|dsn|[a-z]*pass)\d*$|keys?\d*$|webhook|connection|_pat$"
    r"|(?:client|app)[_\-]secret$|(?-i:[A-Z0-9]_SECRET$)",
    re.IGNORECASE,
)
_FROM_CODE = frozenset({
    ".py", ".pyx", ".pyi", ".c", ".cc", ".cpp", ".cu", ".cuh", ".h", ".hpp", ".rs", ".go", ".js", ".ts",
    ".jl", ".lua", ".java", ".r",
})  # fmt: skip
_SECRET_FILE = re.compile(
    r"\.env(?:rc|\..+)?|.+\.(?:pem|p12|pfx|env)|id_(?:rsa|dsa|ecdsa|ed25519)|\.(?:netrc|pgpass|pypirc)"
)
_NO_SECRETS = frozenset({
    "disabled", "required", "optional", "kerberos", "password", "anonymous", "none", "null", "nil",
    "true", "false", "str", "string", "bytes", "any", "empty", "undefined", "default",
})  # fmt: skip

_kept_out: set[str] = set()  # global like the environment: a secret stays one, whichever run is written


@functools.lru_cache(4096)
def is_secret_name(name: str) -> bool:
    """Whether a name is that of a secret: `HF_TOKEN`, `dbPassword`, but not `pad_token`."""
    spelled = _CAMEL.sub("_", name) if not name.isupper() else name
    return _WORDS.search(spelled) is not None and _OTHER_THAN_SECRET.search(spelled) is None


def is_secret_variable(name: str, value: str) -> bool:
    """Whether an environment variable is a secret, by its name or value: the path of a key's file is none."""
    is_path = value.startswith("/") if name == _KEY_FILE else _PATH_OF_KEY.fullmatch(value) is not None
    named = is_secret_name(name) and not (name.endswith("_CREDENTIALS") and is_path)
    return named or text(value) != value


def keep_out(config: Mapping[str, Any]) -> None:
    """Remove the secrets of a config from everything that this process writes from now on."""
    _kept_out.update(filter(_is_distinct, _secrets(config)))


def text(said: str, *, code: bool = False) -> str:
    """A text without its secrets.

    Args:
        code: the text is source code, in which only string literals and comments contain values.
    """
    known = tuple(values()) if len(said) >= _LEAST else ()
    return (_of_short if len(said) < _SHORT else _without_secrets)(said, known, code)


def _without_secrets(said: str, known: tuple[str, ...], code: bool) -> str:
    for value in known:
        if value in said:
            said = said.replace(value, REDACTED)
    for starts, look in _LOOKS:
        if any(start in said for start in starts):
            said = look.sub(_without, said)
    if "://" in said:
        said = _IN_URL.sub(_without_value, said)
        said = _QUERY.sub(_without_queried, said)
    for starts, given in _GIVEN:
        if any(start in said for start in starts):
            said = given.sub(_without_given, said)
    return _without_named(said, code=code)


_of_short = functools.lru_cache(1024)(_without_secrets)  # trials of a search write the same texts


def tree(value: Any) -> Any:
    """A JSON value without its secrets: values with the name of a secret, and secrets within strings."""
    if isinstance(value, str):
        return text(value)
    if isinstance(value, Mapping):
        return {key: hidden(item) if is_secret_name(str(key)) else tree(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [tree(item) for item in value]
    return value


def hidden(value: Any) -> Any:
    """A secret with its strings replaced; numbers, None and empty strings stay."""
    if isinstance(value, str):
        return REDACTED if value else value
    if isinstance(value, Mapping):
        return {key: hidden(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [hidden(item) for item in value]
    return value


def holds_redacted(value: Any) -> bool:
    """Whether a JSON value contains a redacted string."""
    return any(REDACTED in said for said in _texts(value))


def command(words: Sequence[str]) -> list[str]:
    """The words of a command without secrets such as those in `password=...` or after `--password`."""
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
    """Environment variables with their secrets replaced."""
    return {name: REDACTED if is_secret_name(name) else text(value) for name, value in given.items()}


def content(path: str, data: bytes) -> bytes | None:
    """The content of a file without its secrets; None for a binary file that contains one."""
    if b"\0" in data[:_BINARY]:
        return None if holds(data, values()) else data
    said = data.decode("utf-8", "surrogateescape")
    kept = text(said, code=is_code(path))
    if own := _OF_FILES.get(PurePath(path).name.replace("_netrc", ".netrc")):
        kept = own.sub(_without, kept)
    return data if kept == said else kept.encode("utf-8", "surrogateescape")


def is_code(path: str) -> bool:
    """Whether a file is source code, by its extension."""
    return PurePath(path).suffix.lower() in _FROM_CODE


def is_secret_file(path: str) -> bool:
    """Whether a file holds secrets, by its name: `.env`, `key.pem`, `id_rsa`."""
    return _SECRET_FILE.fullmatch(PurePath(path).name) is not None


def holds(data: bytes, values: Sequence[str]) -> bool:
    """Whether a file's content contains any of the values."""
    return any(value.encode() in data for value in values)


def rules() -> bytes:
    """A hash that changes with the names and formats of this module."""
    known = [look.pattern for _, look in (*_LOOKS, *_GIVEN)] + [own.pattern for own in _OF_FILES.values()]
    patterns = (
        _WORDS, _OTHER_THAN_SECRET, _CAMEL, _NAMED, _STRING, _WORD, _BEGINS_LINE, _PAIR, _QUERY,
        _SIGNS_URL, _IN_URL, _FIELD, _EXPRESSION, _READ, _CERTAIN,
    )  # fmt: skip
    known += [pattern.pattern for pattern in patterns]
    return hashlib.sha256(repr((known, sorted(_NO_SECRETS), sorted(_FROM_CODE), _BINARY)).encode()).digest()


def values() -> list[str]:
    """The secrets that this process knows, longest first, because one may be part of another."""
    told = (os.environ.get(name, "") for name in os.environ if is_secret_name(name))
    return sorted({*filter(_is_distinct, told), *_kept_out}, key=len, reverse=True)


def _is_distinct(value: str) -> bool:
    """Whether a value may be removed wherever it occurs: it is not a word, path or placeholder."""
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


def _secrets(value: Any) -> Iterable[str]:
    """The strings in a JSON value with names of secrets, at any depth."""
    if isinstance(value, Mapping):
        for name, item in value.items():
            yield from _texts(item) if is_secret_name(str(name)) else _secrets(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _secrets(item)


def _without(found: re.Match[str]) -> str:
    return f"{found.groupdict().get('kept') or ''}{REDACTED}"


def _without_value(found: re.Match[str]) -> str:
    return f"{found['kept']}{REDACTED}" if _is_secret(found["value"], certain=True) else found[0]


def _without_given(found: re.Match[str]) -> str:
    """A match of `_GIVEN` without its value, if the value is a secret."""
    known = found.groupdict()
    name = known.get("name")
    if name is not None and not is_secret_name(name):
        return found[0]
    certain = bool(found["quote"]) and name is not None and _CERTAIN.search(name) is not None
    if _is_found_elsewhere(found["value"]) or not _is_secret(found["value"], certain=certain):
        return found[0]
    return f"{found['kept']}{found['quote']}{known.get('user') or ''}{REDACTED}"


def _without_queried(found: re.Match[str]) -> str:
    """A query parameter of a URL without its value, if its name is that of a secret or a signature."""
    name = found["name"]
    is_named = is_secret_name(name) or (_SIGNS_URL.search(name) is not None and _is_random(found["value"]))
    return _without_value(found) if is_named else found[0]


def _without_named(said: str, *, code: bool) -> str:
    """A text without the values that are assigned to names of secrets."""
    lower = said.lower() if said.isascii() else said.replace("\u0130", "I").lower()  # of equal length
    kept, done = [], 0
    for start, end in sorted(
        span for found in _NAMED.finditer(lower) for span in _assigned(said, found, code=code)
    ):
        if start >= done:
            kept += [said[done:start], REDACTED]
        done = max(done, end)
    return "".join([*kept, said[done:]]) if kept else said


def _assigned(said: str, found: re.Match[str], *, code: bool) -> Iterable[tuple[int, int]]:
    """The spans of the values assigned to a name, if they are secrets."""
    start = found.start()
    while start and said[start - 1] in _IN_NAMES:
        start -= 1
    ends = found.start("close") if found["close"] else found.end()
    name = said[start:ends].rstrip(" \t\n:=>,").partition(":")[0].strip("-.")
    if len(name) > 100 or not is_secret_name(name) or (found["sign"] == "," and not found["close"]):
        return ()
    certain = found["sign"] not in (",", "==") and _CERTAIN.search(_CAMEL.sub("_", name)) is not None
    string = _STRING.match(said, found.end())
    if string and not (code and _closes(said, start, found, string)) and _is_literal(string, found["sign"]):
        is_name = string["value"].isupper() and _is_found_elsewhere(string["value"])  # names a variable
        is_one = not is_name and _is_secret(string["value"], certain=certain)
        return _in_pieces(said, string) if is_one else ()
    if found["sign"] in (",", "=="):
        return ()
    return _bare(said, start, found, code=code, certain=certain)


def _in_pieces(said: str, string: re.Match[str]) -> Iterable[tuple[int, int]]:
    """The span of a string literal; within parentheses also of those that Python concatenates to it."""
    bracket = "(" in string["space"]
    piece: re.Match[str] | None = string
    while piece is not None:
        yield piece.span("value")
        piece = _STRING.match(said, piece.end()) if bracket else None
        piece = None if piece is None or "(" in piece["space"] else piece


def _closes(said: str, start: int, found: re.Match[str], string: re.Match[str]) -> bool:
    """Whether the quote after a sign closes the string with the name: `"password=" + given + ";"`."""
    if found["close"] or string.start("open") > found.end():
        return False
    return said.count(string["open"], said.rfind("\n", max(0, start - _BACK), start) + 1, start) % 2 == 1


def _is_literal(string: re.Match[str], sign: str) -> bool:
    """Whether a string after a sign is its literal value, not one on a later line or an f-string."""
    if "\n" in string["space"] and sign != "=":
        return False
    if "\n" in string["value"] and len(string["open"].lstrip("\\")) == 1:
        return False
    return not ("f" in string["prefix"].lower() and "{" in string["value"])


def _bare(
    said: str, start: int, found: re.Match[str], *, code: bool, certain: bool
) -> Iterable[tuple[int, int]]:
    """The spans of unquoted values: the rest of the line if it starts with the name, else the next word."""
    begin = max(said.rfind("\n", max(0, start - _BACK), start) + 1, start - _BACK)
    before = said[begin:start]
    is_in_text = found["sign"] == "=" and (before.count('"') % 2 == 1 or before.count("'") % 2 == 1)
    if code and not (is_in_text or "#" in before or "//" in before):
        return
    if not code and _BEGINS_LINE.fullmatch(before):
        value, span = _line(said, found.end())
        if value in ("", "|", ">", "|-", ">-") and found["sign"] == ":":
            yield from _block(said, _next_line(said, found.end()), len(before), certain=certain)
            return
    else:
        word = _WORD.match(said, found.end())
        value, span = (word["value"], word.span("value")) if word else ("", (0, 0))
        certain = certain and not code and found["sign"] == "="
    if not _is_found_elsewhere(value) and _is_secret(value, certain=certain):
        yield span


def _line(said: str, start: int) -> tuple[str, tuple[int, int]]:
    """The rest of a line and its span, without a comment or trailing comma."""
    end = _next_line(said, start)
    written = said[start:end].partition(" #")[0]
    value = written.strip(" \t\r\n,")
    start += len(written) - len(written.lstrip(" \t\r\n,"))
    return value, (start, start + len(value))


def _next_line(said: str, start: int) -> int:
    end = said.find("\n", start)
    return end + 1 if end >= 0 else len(said)


def _is_found_elsewhere(value: str) -> bool:
    """Whether a value is only a reference (a call, a name) or a placeholder to be filled in."""
    if value.startswith("...") or _EXPRESSION.fullmatch(value[:_MOST]):
        return True
    return _READ.fullmatch(value) is not None and is_secret_name(value)  # `token = config.token`


def _block(said: str, start: int, column: int, *, certain: bool) -> Iterable[tuple[int, int]]:
    """The spans of values on the indented lines after a YAML key: a list or a block of text."""
    while start < len(said):
        value, (begin, end) = _line(said, start + (said[start] in "+-"))  # a list or a diff
        in_list = value.startswith("- ")
        if value and begin - start <= column and not in_list:
            return
        if not _PAIR.match(value) and _is_secret(value, certain=certain):
            yield begin + 2 * in_list, end
        start = _next_line(said, start)


def _is_secret(value: str, *, certain: bool) -> bool:
    """Whether a value with the name of a secret is one, not a placeholder.

    Args:
        certain: every value with this name is a secret; otherwise plain words are not.
    """
    left = _FIELD.sub("", value[:_MOST]).replace(REDACTED, "")
    if value.strip("\"' ").lower() in _NO_SECRETS or not any(map(str.isalnum, left)):
        return False
    words = left.split(None, _MOST_WORDS)
    return certain or (len(words) <= _MOST_WORDS and any(map(_is_random, words)))


def _is_random(word: str) -> bool:
    """Whether a word is not one of a natural language: it has both letters and digits."""
    if len(word) < _LEAST or "\\" in word:  # escaped characters occur in prose
        return False
    return any(map(str.isalpha, word)) and any(map(str.isdigit, word))
