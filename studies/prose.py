"""English prose to train and calibrate on: three books that Debian packages, as text.

    python studies/prose.py --out runs/text/prose

The packages are ``anarchism``, ``debian-handbook`` and ``debian-reference-en``; ``apt-get`` downloads them, and nothing
is installed.
"""

import argparse
import subprocess
import tempfile
from pathlib import Path

from lxml import html  # type: ignore[import-untyped]

from llmprune.utils.outputs import output_folder

PAGES = {
    "anarchism": "usr/share/doc/anarchism/html/*.html",
    "debian-handbook": "usr/share/doc/debian-handbook/html/en-US/*.html",
    "debian-reference-en": "usr/share/debian-reference/*.en.html",
}
PARAGRAPHS = "//p | //h1 | //h2 | //h3 | //h4 | //blockquote[not(.//p)]"
SHORTEST = 2000  # characters of a page


def text_of(page: Path) -> str:
    """The paragraphs of a page, with a blank line between two."""
    found = html.parse(str(page), html.HTMLParser(encoding="utf-8")).xpath(PARAGRAPHS)
    paragraphs = (" ".join(element.text_content().split()) for element in found)
    return "\n\n".join(paragraph for paragraph in paragraphs if paragraph) + "\n"


def main() -> None:
    """Download the packages and write a text file for every page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of text files")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, output_folder(arguments.out) as out:
        subprocess.run(["apt-get", "download", *PAGES], cwd=folder, check=True)
        for name, pattern in PAGES.items():
            (package,) = Path(folder).glob(f"{name}_*.deb")
            subprocess.run(["dpkg-deb", "-x", package, Path(folder) / name], check=True)
            for page in sorted((Path(folder) / name).glob(pattern)):
                if len(text := text_of(page)) >= SHORTEST:
                    (out / f"{name}-{page.stem}.txt").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
