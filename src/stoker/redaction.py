"""What must not be written down: secrets, known by their name, look, value or file.

- A name: `password`, `HF_TOKEN`, `db.api_key`. What stands under it is removed.
- A look: the formats of well-known keys and tokens, of private keys, of URLs with a password. The
  formats are those of gitleaks (https://github.com/gitleaks/gitleaks, `config/gitleaks.toml`) and of
  detect-secrets (https://github.com/Yelp/detect-secrets, `detect_secrets/plugins`).
- A file: `.env`, `key.pem`, `id_rsa`, where git does not have it.
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
_SHORT = 400  # characters of a text that is remembered without its secrets
_BACK = 400  # characters that are looked at before a name, to know what it stands in
_MOST_WORDS = 4  # of a value where words are none, as in `Basic c2VjcmV0`: more are a text
_MOST = 4000  # characters of a value that are looked at to know what it is
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
        (("://",), r"(?P<kept>https?://)[\w-]{20,}(?=@)"),
        (("earer ",), r"(?P<kept>\b[Bb]earer )(?=[\w.~+/-]*\d)[\w.~+/-]{16,}=*"),
        (("asic ",), r"(?P<kept>[Aa]uthorization\\?[\"']?\s*[:=,]\s*\\?[\"']?[Bb]asic )[\w.~+/-]{4,}=*"),
    )
)  # fmt: skip

# What is assigned to the name of a secret is one, whatever its characters. A name is found by a part of a
# word in it (to-ken, s-cre-t, a-uth: what begins with a rare letter is found faster), together with the sign
# that follows: `name =`, `"name":`, `name: str =`, `["name"] =`, `("name",`.
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

# What a command or a parser of its options is given, with characters that each form has. A value under
# a "name" is a secret as that is, one without where it is no word.
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
_OF_FILES = {  # what is a secret in files of their own form, by their names
    ".netrc": re.compile(r"(?P<kept>\b(?:password|account)\s+)(?P<value>\S+)"),
    ".pgpass": re.compile(r"(?m)^(?P<kept>(?!#)(?:(?:\\.|[^:\\\n])*:){4})(?P<value>.+)$"),
}

# What stands for a value that is found elsewhere.
_FIELD = re.compile(
    r"\$\{\{.*?\}\}|\$\{[^}]*\}|\$\([^)]*\)|\$[A-Z_][A-Z0-9_]*\b|\$[a-z_]+\b|\{\{.*?\}\}|\{[A-Za-z_][^{}]*\}"
    r"|<[^<>]*>|%\(\w+\)s|%[sd]"
)
_EXPRESSION = re.compile(r"[A-Za-z_][\w.]*(?:\(.*\)|\[.*\]|\(\S*)[\s,;)]*")
_READ = re.compile(r"[A-Za-z_][A-Za-z_.]*\d?")
_CERTAIN = re.compile(  # names under which words are secrets too; those under `token` or `auth` need not be
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

_kept_out: set[str] = set()  # of the process, as its environment is: a secret is one whoever writes


@functools.lru_cache(4096)
def is_secret_name(name: str) -> bool:
    """Whether what stands under a name is a secret: `HF_TOKEN`, `dbPassword`; not `pad_token`."""
    spelled = _CAMEL.sub("_", name) if not name.isupper() else name
    return _WORDS.search(spelled) is not None and _OTHER_THAN_SECRET.search(spelled) is None


def keep_out(config: Mapping[str, Any]) -> None:
    """Remove the secrets of a config from all that this process writes down from now on."""
    _kept_out.update(filter(_is_distinct, _secrets(config)))


def text(said: str, *, code: bool = False) -> str:
    """A text without its secrets.

    Args:
        code: it is of a programming language: only what stands in quotes or in a comment is a value there.
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


_of_short = functools.lru_cache(1024)(_without_secrets)  # trials of a search say the same again


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
    if own := _OF_FILES.get(PurePath(path).name.replace("_netrc", ".netrc")):
        kept = own.sub(_without, kept)
    return data if kept == said else kept.encode("utf-8", "surrogateescape")


def is_code(path: str) -> bool:
    """Whether a file is of a programming language, by its ending."""
    return PurePath(path).suffix.lower() in _FROM_CODE


def is_secret_file(path: str) -> bool:
    """Whether a file is one of secrets, by its name: `.env`, `key.pem`, `id_rsa`."""
    return _SECRET_FILE.fullmatch(PurePath(path).name) is not None


def holds(data: bytes, values: Sequence[str]) -> bool:
    """Whether one of some values is in a file."""
    return any(value.encode() in data for value in values)


def rules() -> bytes:
    """What tells the names and looks of this version from those of another."""
    known = [look.pattern for _, look in (*_LOOKS, *_GIVEN)] + [own.pattern for own in _OF_FILES.values()]
    patterns = (
        _WORDS, _OTHER_THAN_SECRET, _CAMEL, _NAMED, _STRING, _WORD, _BEGINS_LINE, _PAIR, _QUERY,
        _SIGNS_URL, _IN_URL, _FIELD, _EXPRESSION, _READ, _CERTAIN,
    )  # fmt: skip
    known += [pattern.pattern for pattern in patterns]
    return hashlib.sha256(repr((known, sorted(_NO_SECRETS), sorted(_FROM_CODE), _BINARY)).encode()).digest()


def values() -> list[str]:
    """The secrets that this process knows, the longest first: one may be part of another."""
    told = (os.environ.get(name, "") for name in os.environ if is_secret_name(name))
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


def _secrets(value: Any) -> Iterable[str]:
    """What stands under the names of secrets in a value of JSON types, at any depth."""
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
    """What a command is given without its value, where its name is that of a secret, or it is no word."""
    known = found.groupdict()
    name = known.get("name")
    if name is not None and not is_secret_name(name):
        return found[0]
    certain = bool(found["quote"]) and name is not None and _CERTAIN.search(name) is not None
    if _is_found_elsewhere(found["value"]) or not _is_secret(found["value"], certain=certain):
        return found[0]
    return f"{found['kept']}{found['quote']}{known.get('user') or ''}{REDACTED}"


def _without_queried(found: re.Match[str]) -> str:
    """A pair of a URL's query without its value, where its name is that of a secret or of a signature."""
    name = found["name"]
    is_named = is_secret_name(name) or (_SIGNS_URL.search(name) is not None and _is_random(found["value"]))
    return _without_value(found) if is_named else found[0]


def _without_named(said: str, *, code: bool) -> str:
    """A text without what is assigned to names of secrets in it."""
    lower = said.lower() if said.isascii() else said.replace("\u0130", "I").lower()  # as long as the text
    kept, done = [], 0
    for start, end in sorted(
        span for found in _NAMED.finditer(lower) for span in _assigned(said, found, code=code)
    ):
        if start >= done:
            kept += [said[done:start], REDACTED]
        done = max(done, end)
    return "".join([*kept, said[done:]]) if kept else said


def _assigned(said: str, found: re.Match[str], *, code: bool) -> Iterable[tuple[int, int]]:
    """Where the secrets stand that are assigned to a name, if it is that of one."""
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
        is_name = string["value"].isupper() and _is_found_elsewhere(string["value"])  # of a variable
        is_one = not is_name and _is_secret(string["value"], certain=certain)
        return _in_pieces(said, string) if is_one else ()
    if found["sign"] in (",", "=="):
        return ()
    return _bare(said, start, found, code=code, certain=certain)


def _in_pieces(said: str, string: re.Match[str]) -> Iterable[tuple[int, int]]:
    """Where a text in quotes stands, and in brackets also those that follow: Python makes one of them."""
    bracket = "(" in string["space"]
    piece: re.Match[str] | None = string
    while piece is not None:
        yield piece.span("value")
        piece = _STRING.match(said, piece.end()) if bracket else None
        piece = None if piece is None or "(" in piece["space"] else piece


def _closes(said: str, start: int, found: re.Match[str], string: re.Match[str]) -> bool:
    """Whether the quote after a sign ends the text that the name stands in: `"password=" + given + ";"`."""
    if found["close"] or string.start("open") > found.end():
        return False
    return said.count(string["open"], said.rfind("\n", max(0, start - _BACK), start) + 1, start) % 2 == 1


def _is_literal(string: re.Match[str], sign: str) -> bool:
    """Whether what stands in quotes after a sign is its value: no next line's, nothing that is computed."""
    if "\n" in string["space"] and sign != "=":
        return False
    if "\n" in string["value"] and len(string["open"].lstrip("\\")) == 1:
        return False
    return not ("f" in string["prefix"].lower() and "{" in string["value"])


def _bare(
    said: str, start: int, found: re.Match[str], *, code: bool, certain: bool
) -> Iterable[tuple[int, int]]:
    """Where a value without quotes stands: what is left of the line that its name begins, or a word."""
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
    """What is left of a line, and where it stands, without a comment and the comma of a list."""
    end = _next_line(said, start)
    written = said[start:end].partition(" #")[0]
    value = written.strip(" \t\r\n,")
    start += len(written) - len(written.lstrip(" \t\r\n,"))
    return value, (start, start + len(value))


def _next_line(said: str, start: int) -> int:
    end = said.find("\n", start)
    return end + 1 if end >= 0 else len(said)


def _is_found_elsewhere(value: str) -> bool:
    """Whether it is no value but where one comes from: a call, a name; or what is to be filled in."""
    if value.startswith("...") or _EXPRESSION.fullmatch(value[:_MOST]):
        return True
    return _READ.fullmatch(value) is not None and is_secret_name(value)  # `token = config.token`


def _block(said: str, start: int, column: int, *, certain: bool) -> Iterable[tuple[int, int]]:
    """Where values stand on the lines after a YAML key: those further in, a list or a text."""
    while start < len(said):
        value, (begin, end) = _line(said, start + (said[start] in "+-"))  # of a list, or of a diff
        in_list = value.startswith("- ")
        if value and begin - start <= column and not in_list:
            return
        if not _PAIR.match(value) and _is_secret(value, certain=certain):
            yield begin + 2 * in_list, end
        start = _next_line(said, start)


def _is_secret(value: str, *, certain: bool) -> bool:
    """Whether a value under the name of a secret is one: it does not stand for one that is elsewhere.

    Args:
        certain: all values under that name are; else words of a text may stand under it.
    """
    left = _FIELD.sub("", value[:_MOST]).replace(REDACTED, "")
    if value.strip("\"' ").lower() in _NO_SECRETS or not any(map(str.isalnum, left)):
        return False
    words = left.split(None, _MOST_WORDS)
    return certain or (len(words) <= _MOST_WORDS and any(map(_is_random, words)))


def _is_random(word: str) -> bool:
    """Whether it is no word of a language: it has letters and digits."""
    if len(word) < _LEAST or "\\" in word:  # a character that is escaped is one of a text
        return False
    return any(map(str.isalpha, word)) and any(map(str.isdigit, word))
