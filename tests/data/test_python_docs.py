"""The built-in corpora: enough of them, well cut, and no leak from one split to another."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from stoker.data import python_docs
from stoker.data.documents import Document
from stoker.data.sources import read, split


@pytest.fixture(scope="module")
def questions() -> list[Document]:
    return python_docs.questions()


@pytest.fixture(scope="module")
def texts(cache: Path) -> list[Document]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STOKER_CACHE", str(cache))
        return python_docs.texts()


def answers(questions: list[Document], prompt: str) -> str:
    return " ".join(" ".join(d.text for d in questions if d.prompt.startswith(prompt)).split())


def test_there_are_hundreds_of_entries_and_a_thousand_questions(questions: list[Document]) -> None:
    found = python_docs.entries()
    assert len(found) > 250
    assert len(questions) > 1000
    assert all(entry.title.strip() and len(entry.body) >= 80 for entry in found)


def test_definitions_headings_methods_and_commands_are_asked_for(questions: list[Document]) -> None:
    assert answers(questions, "What does `object.__repr__(self)` do?").startswith(
        'Called by the "repr()" built-in function'
    )
    assert "debugging assertions into a program" in answers(
        questions, 'Explain the "assert" statement in Python.'
    )
    assert "Remove and return" in answers(questions, "What does `dict.popitem()` do?")
    assert "stack trace" in answers(questions, "What does the debugger command `w(here)` do?")
    assert answers(questions, "What does `object.__le__(self, other)` do?")


def test_answers_are_short_and_dedented(questions: list[Document]) -> None:
    assert all(d.text.strip() and len(d.text) <= 500 for d in questions)
    definitions = [d for d in questions if d.prompt.endswith("do?")]
    assert not any(d.text.startswith(" ") for d in definitions)


def test_an_answer_in_the_test_split_is_in_no_text_that_is_trained_on(
    questions: list[Document], texts: list[Document]
) -> None:
    reference = " ".join(" ".join(d.text.split()) for d in split(texts).train if d.key.startswith("entry "))
    asked = split(questions)
    trained = {" ".join(d.text.split()) for d in asked.train}
    for document in asked.test:
        answer = " ".join(document.text.split())
        assert answer not in trained
        if len(answer) >= 80:
            assert answer not in reference


def test_questions_stand_in_the_split_of_their_entry(
    questions: list[Document], texts: list[Document]
) -> None:
    assert {d.key for d in questions} == {d.key for d in texts if d.key.startswith("entry ")}
    of_texts = {d.key for d in split(texts).test if d.key.startswith("entry ")}
    assert {d.key for d in split(questions).test} == of_texts


def test_source_and_docstrings_of_a_module_share_a_split(texts: list[Document]) -> None:
    source, docstrings = (d.text for d in texts if d.key == "module textwrap")
    assert "def dedent(text):" in source
    assert "textwrap.TextWrapper.wrap(self, text)\n\n" in docstrings
    assert "def " not in docstrings.splitlines()[0]


def test_the_library_is_read_without_tests_and_other_peoples_packages(texts: list[Document]) -> None:
    modules = {d.key.removeprefix("module ") for d in texts if d.key.startswith("module ")}
    assert {"ast", "asyncio", "json.decoder", "email.message"} <= modules
    assert not [m for m in modules if m.startswith(("test.", "site-packages", "idlelib", "pydoc_data"))]
    assert sum(len(d.text) for d in texts) > 5_000_000


def test_the_library_is_parsed_once(texts: list[Document], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(python_docs, "parsed", lambda source: pytest.fail("it is parsed again"))
    assert python_docs.texts() == texts


def test_the_corpora_are_the_same_in_another_process() -> None:
    code = "from stoker.data.sources import read; print(read('python-docs-qa').fingerprint)"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == read("python-docs-qa").fingerprint


def test_reading_them_needs_neither_torch_nor_transformers() -> None:
    code = (
        "import sys, stoker.data.sources, stoker.data.tokens, stoker.data.order\n"
        "stoker.data.sources.read('python-docs-qa')\n"
        "assert not {'torch', 'transformers', 'datasets', 'pyarrow'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
