"""A long text in parts."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_prep.parts import divided, write_parts
from llmprune.data.records import find_inputs
from llmprune.utils.errors import UserError


@given(st.text(alphabet="ab \n", max_size=200), st.integers(1, 30))
def test_nothing_is_lost(text: str, parts: int) -> None:
    pieces = divided(text, parts)
    assert "".join(pieces) == text
    assert len(pieces) <= parts
    assert all(piece.strip() for piece in pieces[:-1])
    assert all(piece.endswith((" ", "\n")) for piece in pieces[:-1])


def test_parts_are_about_equal_and_end_with_paragraphs() -> None:
    paragraphs = [f"Paragraph {number} has a line.\nAnd a second one.\n\n" for number in range(400)]
    pieces = divided("".join(paragraphs), 20)
    assert len(pieces) == 20
    assert all(piece.endswith("one.\n\n") for piece in pieces)
    assert max(map(len, pieces)) - min(map(len, pieces)) < 2 * len(paragraphs[-1])


def test_a_file_that_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "book.txt").write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(UserError, match="book.txt:1: "):
        write_parts(find_inputs([tmp_path / "book.txt"])[0], tmp_path / "out")
    assert not (tmp_path / "out").exists()
