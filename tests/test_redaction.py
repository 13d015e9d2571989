from __future__ import annotations

import base64
import logging
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from stoker import redaction
from stoker.config import drift
from stoker.redaction import REDACTED
from stoker.run import journal, media, messages

_PEM = f"-----BEGIN RSA {'PRIVATE'} KEY-----\n{'MIIEabc+' * 20}\n-----END RSA {'PRIVATE'} KEY-----"


def _joined(*parts: str) -> str:
    """A key that only looks like one; in parts, as what searches for secrets would find it in this file."""
    return "".join(parts)


LOOKS = {
    "aws": _joined("AKIA", "IOSFODNN7EXAMPLE"),
    "github": _joined("ghp_", "0123456789abcdefABCDEF0123456789abcd"),
    "github fine": _joined("github_pat_", "11ABCDEFG0123456789012"),
    "gitlab": _joined("glpat-", "0123456789abcdefghij"),
    "hugging face": _joined("hf_", "abcdefghijklmnopqrstuvwxyzABCDEFGH"),
    "openai": _joined("sk-", "proj-0123456789_abcdef-ABCDEF"),
    "openai old": _joined("sk-", "0123456789abcdefABCDEF0123456789abcdefABCDEF0123"),
    "anthropic": _joined("sk-", "ant-api03-0123456789abcdef-ABCDEF"),
    "stripe": _joined("sk_", "live_0123456789abcdef"),
    "slack": _joined("xoxb-", "123456789012-abcdefABCDEF"),
    "google": _joined("AIza", "SyA0123456789abcdefghijklmnopqrstuv"),
    "npm": _joined("npm_", "0123456789abcdefABCDEF0123456789abcd"),
    "jwt": ".".join(
        base64.urlsafe_b64encode(part.encode()).decode().rstrip("=")
        for part in ('{"alg":"HS256","typ":"JWT"}', '{"sub":"1234567890"}', "signature-of-it")
    ),
}


@pytest.mark.parametrize("name", [
    "password", "DB_PASSWORD", "PGPASSWORD", "dbPassword", "passphrase", "HF_TOKEN", "token", "api_key",
    "access_token", "OPENAI_API_KEY", "apiKey", "hub.token", "client_secret", "AWS_SECRET_ACCESS_KEY",
    "private_key", "credentials", "auth", "MYSQL_PWD", "WANDB_API_KEY", "Authorization",
    "AZURE_STORAGE_CONNECTION_STRING", "GITHUB_PAT", "MY_PAT", "pw", "db.pw", "pwd", "dbpass", "SSHPASS",
    "OPENAI_KEY", "WANDB_KEY", "license_key", "JWT", "SENTRY_DSN", "webhook_url",
])  # fmt: skip
def test_what_such_a_name_holds_is_a_secret(name: str) -> None:
    assert redaction.is_secret_name(name)


@pytest.mark.parametrize("name", [
    "tokens", "tokenizer", "max_tokens", "pad_token", "eos_token", "token_ids", "num_tokens_per_second",
    "tokens_per_second", "key", "keys", "num_key_value_heads", "author", "PWD", "OLDPWD", "SSH_AUTH_SOCK",
    "password_file", "HF_TOKEN_PATH", "bypass", "passes", "secretary", "token_type", "TOKENIZERS_PARALLELISM",
    "file_pat", "path", "SORT_KEY", "primary_key", "url", "AuthError", "jwt_algorithm", "compass",
])  # fmt: skip
def test_what_only_sounds_like_it_is_none(name: str) -> None:
    assert not redaction.is_secret_name(name)


@pytest.mark.parametrize("key", LOOKS.values(), ids=LOOKS)
def test_a_well_known_look_is_removed_wherever_it_stands(key: str) -> None:
    for said in (key, f"x = '{key}'", f"see {key}.", f"https://h/?a={key}&b=1", f"+{key}\n-{key}"):
        assert key not in redaction.text(said, code=True)
        assert redaction.text(said, code=True).count(REDACTED) == said.count(key)


@pytest.mark.parametrize(("said", "kept"), [
    ("https://bob:pa55word@host/x?y=1", f"https://bob:{REDACTED}@host/x?y=1"),
    ("postgresql+psycopg2://bob:s3cret@host/db", f"postgresql+psycopg2://bob:{REDACTED}@host/db"),
    ("https://0123456789abcdefghijkl@host/x", f"https://{REDACTED}@host/x"),
    ('password = "hunter2hunter2"', f'password = "{REDACTED}"'),
    ("+    'api_key': 'hunter2hunter2',", f"+    'api_key': '{REDACTED}',"),
    ('os.environ["HF_TOKEN"] = "hunter2hunter2"', f'os.environ["HF_TOKEN"] = "{REDACTED}"'),
    ('environ.setdefault("API_KEY", "hunter2hunter2")', f'environ.setdefault("API_KEY", "{REDACTED}")'),
    ('token: str = "hunter2hunter2"', f'token: str = "{REDACTED}"'),
    ('{"a": "{\\"api_key\\": \\"hunter2hunter2\\"}"}', f'{{"a": "{{\\"api_key\\": \\"{REDACTED}\\"}}"}}'),
    ("Authorization: Bearer abcdefghij1234567890", f"Authorization: Bearer {REDACTED}"),
    (f"key:\n{_PEM}\nend", f"key:\n-----BEGIN RSA {'PRIVATE'} KEY-----{REDACTED}\nend"),
])  # fmt: skip
def test_a_secret_is_known_by_what_stands_around_it(said: str, kept: str) -> None:
    assert redaction.text(said, code=True) == kept


@pytest.mark.parametrize("said", [
    "git@github.com:a/b.git", "ssh://git@github.com/a/b.git", 'f"postgresql://{user}:{password}@{host}"',
    'token = tokenizer.decode2(ids)', 'pad_token = "special123"', 'key = "value1234567"',
    'password = "optional"',
    "commit 0123456789abcdef0123456789abcdef01234567", "tokens_per_second=123456789a",
    f"-----BEGIN {'PRIVATE'} KEY-----", "risk-assessment-of-something-long1", "https://host/a:b@c",
])  # fmt: skip
def test_what_is_no_secret_stays(said: str) -> None:
    assert redaction.text(said, code=True) == said


SETTINGS = {  # what stands in a file of settings, with the secret between ⟨ and ⟩
    "a dollar": "DB_PASSWORD=⟨Tr0ub4dor$3cretA⟩\n",
    "words in quotes": 'PASSWORD="⟨SECRET correct horse 42⟩"\n',
    "a number sign": "MYSQL_PWD=⟨abcd#ef12345C⟩  # of the database\n",
    "brackets": "SECRET_KEY='⟨django-insecure-9k(x)2{}7$abD⟩'\n",
    "only letters": "ALPHA_SECRET=⟨SECRETonlylettersnodigits⟩\n",
    "exported": "export SSHPASS=⟨Tr0ub4dor&3; x⟩\n",
    "a YAML list": "credentials:\n  - ⟨SECRETlist1234⟩\n  - user: bob\n    pw: ⟨abc def⟩\nlr: 0.1\n",
    "the line after": "db:\n  password:\n    ⟨SECRET on the next 1⟩\n  port: 5432\n",
    "a YAML text": "password: |\n  ⟨SECRET text⟩\nlr: 1\n",
    "a YAML flow": "db: {user: bob, pw: ⟨flow1234E⟩, port: 1}\n",
    "JSON": '{"db_password": "⟨p@ss w\\"0rd⟩", "port": 5432}\n',
    "an address": 'url="mysql://r:⟨pa$s1234J⟩@h/d"\n',
    "a query": "https://h/d?user=me123&access_token=⟨abcd1234efgh⟩&page=2\n",
    "an error": "ValueError: token=⟨zzzz1234L⟩\n",
    "an error within": "OperationalError: cannot connect: host=h password=⟨hunter⟩ port=1\n",
    "a YAML list at the margin": "api_keys:\n- ⟨one⟩\n\n- ⟨two⟩\nname: x\n",
    "a diff of YAML": " db:\n   password:\n+    ⟨new words⟩\n-    ⟨old words⟩\n   port: 1\n",
    "a diff": "-password: ⟨old words⟩\n+password: ⟨new words⟩\n",
    "an option": "foo --password ⟨abcd1234⟩ --verbose\n",
    "an option in quotes": "foo --api-key '⟨abcd1234⟩'\n",
    "an option of words": "foo --password '⟨correct horse 12⟩' x\n",
    "curl": "curl -s \\\n\t-u me:⟨ab/cd@1234⟩ https://h/\n",
    "mysql": "mysql -u root -p⟨abcd1234⟩ db\nmysqldump -p'⟨abcd1234⟩' db\n",
}
CODE = {
    "all characters": 'PASSWORD = "⟨p@ss{w0rd}<1>E⟩"\n',
    "many lines": 'API_KEY = """⟨multi\nline1234G⟩"""\nx = 1\n',
    "an argument": "connect(token='⟨tok$en12345H⟩', port=1)\n",
    "a dictionary": 'dict(password="⟨Tr0ub4dor$3cretZ⟩")\n',
    "a query": 'url = "https://h/d?api_key=⟨abcd1234efgh⟩"\n',
    "a signature": 'url = "https://h/d?X-Amz-Date=2&X-Amz-Signature=⟨0123abcd4567⟩"\n',
    "basic": 'headers = {"Authorization": "Basic ⟨dXNlcjpwYXNz⟩"}\n',
    "a comment": "x = 1  # password: ⟨SECRETcomment99aa⟩\n",
    "a text": 'raise ValueError("at h: token=⟨zzzz1234L⟩ was refused")\n',
    "a command": "run('train.py --db.password=⟨abcd1234⟩ lr=1')\n",
    "a type": 'api_key: str | None = "⟨short⟩"\n',
    "camel": 'const dbPassword = "⟨correct horse⟩";\n',
    "an option's default": 'add_argument("--password", type=str,\n    default="⟨correct horse⟩")\n',
    "in pieces": 'pw = (\n    "⟨abcd⟩"\n    "⟨1234⟩"\n)\nname = "x1234567"\n',
}


def _planted(said: str) -> tuple[str, str]:
    """A text with its secrets, and what is to be left of it."""
    return re.sub("[⟨⟩]", "", said), re.sub("⟨[^⟩]*⟩", REDACTED, said)


@pytest.mark.parametrize("said", [*SETTINGS.values(), *CODE.values()], ids=[*SETTINGS, *CODE])
def test_a_secret_is_removed_whatever_its_characters(said: str) -> None:
    planted, left = _planted(said)
    found = redaction.text(planted, code=said in CODE.values())
    assert found == left
    assert redaction.text(found, code=said in CODE.values()) == left


@pytest.mark.parametrize("said", [
    "pad_token: <|endoftext|>1", '"eos_token": "<|im_end|>12345"', "max_tokens: 4096",
    "tokenizer: my-tokenizer2",
    '"tokenizer_class": "LlamaTokenizer2"', "PASSWORD=${DB_PASSWORD}", "password: <your password>",
    "api_key: ...",
    "token: null", "password: ${{ secrets.PASSWORD }}", "api_key: $API_KEY", "auth: none",
    "password: ********",
    "api_key = os.environ['SERVICE_KEY_2']", "password = getpass.getpass('Password: ')", "password: true",
    "connect(password=password, token=self.token)", "secrets: inherit",
    "AuthError: it was refused at step 12",
    "https://h/d?page=2&sort=key1", "https://h/d?token={token}", "mysql://r:$DB_PASSWORD@h/d",
    "mysql://{u}:{p}@h",
    "the token: wait for it", "sort(key=lambda x: x)", '"key": "value12345"', "PWD=/home/me/project1",
    "Token indices sequence length is longer: 1024", "url: https://host/a?x=1",
    "#   HF_TOKEN=... stoker train llm --config llama-2-7b",
    "foo --token TOKEN", "foo --password $PASSWORD --x 1abcdefgh", "the --token option",
    "docker run -u 1000:1000 x", "foo --max-tokens 4096abcd", "mysql -p db", "chown -u root:root x",
    "mysql -p$PASS", "rsync -u host:backups20240101 .", "foo --ssh-key ~/.ssh/id_ed25519",
    "--default-password is needed1",
])  # fmt: skip
def test_settings_and_messages_without_secrets_stay(said: str) -> None:
    assert redaction.text(f"{said}\n") == f"{said}\n"


@pytest.mark.parametrize("said", [
    "rows.sort(key=lambda x: x)", 'token = os.environ["HF_TOKEN"]', 'key = os.environ.get("API_KEY", "")',
    'tokenizer(text, padding="max_length", return_tensors="pt")', 'tokenizer.pad_token = tokenizer.eos_token',
    'special_tokens = {"pad_token": "<pad12345>"}', 'token = "the"', 'if token == "<s>":',
    "def f(token: str) -> str:",
    'add_argument("--password", help="of the database1")', 'password = f"{user}-{secret}"',
    'password = "<password>"',
    'class Auth:\n    """What is asked for 1st."""', "# the token: see tokenizer.decode2(ids)",
    'api_key = "${API_KEY}"',
    'for key, token in pairs: yield f"{key}={token}"', 'api_key=config.api_key,', 'password: str = ""',
    'if host and auth:\n    message = "written for host2host"',
    'API_KEY = "OPENAI_API_KEY"', 'TOKEN_START = "\\U000f0000"', 'TOKEN_SAMPLE = "a b c d of model_123456"',
    'call("a", token=decode_v2(x), auth=scheme2basic)', 'print(f"token={token_12345}")',
    'add_argument("--token", default=None)', 'add_argument("--lr", default="abcd1234")',
    'add_argument("--password", help="x")\nadd_argument("--name", default="abcd1234")',
    'write("password=" + given + "; port=1")', '_CREDENTIALS = ("NoCredentialsError", "TokenError")',
])  # fmt: skip
def test_code_without_secrets_stays(said: str) -> None:
    assert redaction.text(f"{said}\n", code=True) == f"{said}\n"


def test_a_file_of_one_long_line_is_looked_through_in_little_time() -> None:
    begun = time.process_time()
    for piece in ('"password":1,', "password: ", "token=a(b) ", "password" + " " * 50, "${{", "https://a:"):
        redaction.text(piece * 5_000)
        redaction.text(f"password={piece * 5_000}")
    assert time.process_time() - begun < 5


def test_a_secret_deep_in_a_config_is_kept_out() -> None:
    redaction.keep_out({"db": {"password": "nested12345I"}, "many": [{"api_key": ["listed12345K"]}]})
    assert redaction.text("it said nested12345I, listed12345K") == f"it said {REDACTED}, {REDACTED}"


def test_an_assignment_without_quotes_counts_where_it_is_no_code() -> None:
    assert redaction.text("API_KEY=hunter2hunter2\n") == f"API_KEY={REDACTED}\n"
    assert redaction.text("password: hunter2hunter2") == f"password: {REDACTED}"
    assert redaction.text("password = other_password2", code=True) == "password = other_password2"


def test_the_value_of_a_variable_of_such_a_name_is_removed_wherever_it_turns_up(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("MY_SERVICE_TOKEN", "plain words of it")
    monkeypatch.setenv("SHORT_TOKEN", "abc")
    monkeypatch.setenv("TOKEN", str(tmp_path))
    assert redaction.text("it said: plain words of it!") == f"it said: {REDACTED}!"
    assert redaction.text(f"abc {tmp_path}") == f"abc {tmp_path}"
    monkeypatch.delenv("MY_SERVICE_TOKEN")
    assert redaction.text("plain words of it") == "plain words of it"


def test_files_of_logins_are_looked_through_by_their_own_form() -> None:
    netrc = b"machine h login me password words only\n"
    assert redaction.content("a/.netrc", netrc) == f"machine h login me password {REDACTED} only\n".encode()
    assert redaction.content("a/netrc.md", netrc) == netrc
    pgpass = b"h:5432:db:me:only\\: words\n# h:1:2:3:4\n"
    assert redaction.content(".pgpass", pgpass) == f"h:5432:db:me:{REDACTED}\n# h:1:2:3:4\n".encode()


def test_a_tree_keeps_its_shape_and_numbers() -> None:
    given = {
        "db": {"password": "x", "port": 5432},
        "api_key": None,
        "token": 7,
        "credentials": ["a", {"b": "c"}],
        "urls": ["https://a:pa55word@h"],
        "lr": 0.1,
    }
    assert redaction.tree(given) == {
        "db": {"password": REDACTED, "port": 5432},
        "api_key": None,
        "token": 7,
        "credentials": [REDACTED, {"b": REDACTED}],
        "urls": [f"https://a:{REDACTED}@h"],
        "lr": 0.1,
    }


def test_a_command_keeps_its_words() -> None:
    words = [
        "train.py",
        "lr=0.1",
        "api_key=x",
        "--db.password=y",
        "--token",
        "z",
        "--name",
        "a",
        "pad_token=w",
    ]
    assert redaction.command(words) == [
        "train.py", "lr=0.1", f"api_key={REDACTED}", f"--db.password={REDACTED}", "--token", REDACTED,
        "--name", "a", "pad_token=w",
    ]  # fmt: skip


def test_a_file_that_is_no_text_is_as_it_was_unless_it_holds_a_secret(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("MY_SERVICE_TOKEN", "hunter2hunter2")
    assert redaction.content("a.bin", b"\0\xff") == b"\0\xff"
    assert redaction.content("a.bin", b"\0\xffhunter2hunter2") is None
    assert redaction.content("a.txt", b"\xff hunter2hunter2") == b"\xff [REDACTED]"


@given(st.binary(max_size=200))
def test_any_content_without_secrets_is_the_same_bytes(data: bytes) -> None:
    kept = redaction.content("a.py", data)
    assert kept is data or kept != data  # it is never copied for nothing, which says that it was changed
    assert kept is data or b"REDACTED" in (kept or b"REDACTED")


@given(st.text(max_size=300))
def test_what_was_removed_once_stays_as_it_is(said: str) -> None:
    once = redaction.text(f"{said} password='hunter2hunter2' https://a:pa55word@h")
    assert redaction.text(once) == once


def test_the_journal_keeps_secrets_out_of_all_but_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_SERVICE_TOKEN", "hunter2hunter2")
    writer = journal.JournalWriter(tmp_path / "control-1.jsonl")
    writer.append("tags", tags={"api_key": "short", "a": "is hunter2hunter2"})
    writer.append("note", text="of hunter2hunter2")
    writer.append("metrics", step=1, values={"token": 1.0})
    writer.close()
    tags, note, metrics = journal.read(tmp_path)
    assert tags["tags"] == {"api_key": REDACTED, "a": f"is {REDACTED}"}
    assert note["text"] == f"of {REDACTED}"
    assert metrics["values"] == {"token": 1.0}


def test_a_log_keeps_secrets_out_of_messages_and_tracebacks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_SERVICE_TOKEN", "hunter2hunter2")
    log = logging.getLogger("stoker")
    handlers = messages.write_to(tmp_path / "log")
    try:
        log.info("with %s", "hunter2hunter2")
        try:
            raise ValueError("hunter2hunter2")
        except ValueError:
            log.exception("it failed")
    finally:
        for handler in handlers:
            log.removeHandler(handler)
            handler.close()
    said = (tmp_path / "log").read_text()
    assert "hunter2" not in said
    assert f"ValueError: {REDACTED}" in said


def test_what_is_to_be_looked_at_has_no_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_SERVICE_TOKEN", "hunter2hunter2")
    assert media.text("a hunter2hunter2").content == f"a {REDACTED}".encode()
    rows = [{"said": "hunter2hunter2", "n": 1}, {"said": None, "n": 2}]
    assert media.read_table(media.table(rows, None).content) == (["said", "n"], [[REDACTED, 1], [None, 2]])


def test_two_records_of_one_secret_do_not_differ() -> None:
    before, now = (redaction.tree({"api_key": key, "lr": 1}) for key in ("a", "b"))
    assert drift(before, now) == {}


def test_what_a_rank_prints_into_its_log_has_no_secrets(tmp_path: Path) -> None:
    script = (
        "import os, pathlib, sys; from stoker.launch import ranks\n"
        f"ranks.log_to(pathlib.Path({str(tmp_path / 'log')!r}))\n"
        "print('first', os.environ['MY_SERVICE_TOKEN'], 'é')\n"
        "raise ValueError(os.environ['MY_SERVICE_TOKEN'])\n"
    )
    environment = {**os.environ, "MY_SERVICE_TOKEN": "hunter2hunter2"}
    subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, check=False)
    said = (tmp_path / "log").read_text(encoding="utf-8")
    assert f"first {REDACTED} é\n" in said
    assert f"ValueError: {REDACTED}" in said
    assert "hunter2" not in said
