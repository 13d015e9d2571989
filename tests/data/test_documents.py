"""Splitting by key, and cutting texts."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from stoker.data.documents import Document, chop, make_corpus, split
from stoker.errors import BadInput


def numbered(count: int) -> list[Document]:
    return [Document(f"key {i}", "", f"text {i}") for i in range(count)]


def test_documents_stay_in_their_split_when_others_are_added() -> None:
    before = numbered(500)
    few, many = split(before), split(numbered(2000))
    for name in ("train", "validation", "test"):
        assert getattr(few, name) == [d for d in getattr(many, name) if d in before]


def test_splits_have_about_the_fractions_asked_for() -> None:
    splits = split(numbered(4000), validation=0.1, test=0.2)
    assert 320 < len(splits.validation) < 480
    assert 680 < len(splits.test) < 920
    assert len(splits.train) + len(splits.validation) + len(splits.test) == 4000


def test_documents_of_one_key_stay_together() -> None:
    documents = [Document(f"key {i % 50}", f"part {i}", "text") for i in range(200)]
    splits = split(documents, validation=0.2, test=0.2)
    keys = [{d.key for d in part} for part in (splits.train, splits.validation, splits.test)]
    assert sum(len(k) for k in keys) == len(set.union(*keys)) == 50


@settings(max_examples=50)
@given(count=st.integers(3, 40), validation=st.floats(0, 0.45), test=st.floats(0, 0.45))
def test_no_split_is_empty_but_one_of_a_share_of_0(count: int, validation: float, test: float) -> None:
    splits = split(numbered(count), validation, test)
    assert len(splits.train) >= 1
    assert [bool(splits.validation), bool(splits.test)] == [validation > 0, test > 0]
    assert len(splits.train) + len(splits.validation) + len(splits.test) == count


def test_too_few_documents_are_refused() -> None:
    with pytest.raises(BadInput, match="there are 2 different documents among 4: "):
        split([*numbered(2), *numbered(2)])
    with pytest.raises(BadInput, match="there is 1 different document: "):
        split(numbered(1))
    with pytest.raises(BadInput, match="train and test need at least one each, so give at least 2"):
        split(numbered(1), validation=0.0)
    assert split(numbered(1), validation=0.0, test=0.0).train == numbered(1)


def test_fractions_that_leave_nothing_to_train_on_are_refused() -> None:
    with pytest.raises(BadInput, match="leave data to train on"):
        split(numbered(10), validation=0.5, test=0.5)


def test_a_corpus_is_named_by_its_content() -> None:
    first = make_corpus([Document("k", "a", "bc")], "here")
    assert first.fingerprint == make_corpus([Document("k", "a", "bc")], "elsewhere").fingerprint
    assert first.fingerprint != make_corpus([Document("k", "ab", "c")], "here").fingerprint


@given(text=st.text(alphabet="ab. \n", max_size=300), limit=st.integers(2, 80))
def test_chopping_keeps_all_words_and_the_limit(text: str, limit: int) -> None:
    parts = chop(text, limit)
    assert all(0 < len(part) <= limit for part in parts)
    assert "".join("".join(parts).split()) == "".join(text.split())


def test_a_text_is_chopped_between_paragraphs_then_after_sentences() -> None:
    assert chop("one two\n\nthree\n\nfour five", 16) == ["one two\n\nthree", "four five"]
    assert chop("One two.\nThree four five.\nSix", 18) == ["One two.", "Three four five.", "Six"]
    assert chop("abcdef", 4) == ["abcd", "ef"]
