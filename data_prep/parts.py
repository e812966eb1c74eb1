"""One long text as several documents, so that some of them can be held out."""

from pathlib import Path

from llmprune.data.records import Input
from llmprune.data.sources import Document, Fields, documents
from llmprune.utils.errors import UserError
from llmprune.utils.outputs import output_folder

PARTS = 20
BREAKS = ("\n\n", "\n", " ")  # ends of paragraphs, lines and words


def divided(text: str, parts: int) -> list[str]:
    r"""A text in pieces of about the same length, each up to the end of a paragraph, if not of a line or of a word.

    Joined, they are the text. There are fewer pieces if the text has fewer ends.

    >>> divided("One. Two.\n\nThree.\n\nFour.", 2)
    ['One. Two.\n\n', 'Three.\n\nFour.']
    """
    pieces, start = [], 0
    for number in range(1, parts):
        wanted = number * len(text) // parts
        places = (text.rfind(mark, start, wanted) + len(mark) for mark in BREAKS if mark in text[start:wanted])
        end = next(places, start)
        if text[start:end].strip():
            pieces.append(text[start:end])
            start = end
    return [*pieces, text[start:]]


def write_parts(source: Input, out: Path) -> None:
    """Write the text of a file as several files.

    Args:
        source: file of text.
        out: folder to write.

    Raises:
        UserError: the file holds no text that can be read.
    """
    item = next(documents([source], Fields()), None)
    if not isinstance(item, Document):
        raise UserError(f"{source.name} holds no text" if item is None else f"{item.place}: {item.reason}")
    with output_folder(out) as folder:
        for number, piece in enumerate(divided(item.text, PARTS)):
            (folder / f"part-{number:02}.txt").write_text(piece, encoding="utf-8")
