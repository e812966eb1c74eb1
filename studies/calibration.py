"""How many calibration tokens does a criterion need, and does it matter which text they are from?

    python studies/calibration.py MODEL builtin=DATA prose=DATA [--tokens 524288] [--criteria …]

DATA is prepared data. Scores are made of 4,096 tokens at a time and kept in the folder --out, so that a killed command
goes on. Scores of more tokens are means of these. The first table compares the scores of some tokens with those of all
other tokens of the same data: the rank correlation (Spearman), and the share of what would go that is the same, if a
third of the blocks or 704 of the channels of every block went. The second compares the scores of all tokens of
two kinds of text. Scores of channels are compared block by block; the figures are means.
"""

import argparse
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path

import numpy as np
from scipy.stats import spearmanr

import llmprune
from llmprune.pruning.scoring.scores import Scores

LENGTH, CHUNK = 512, 8  # tokens of a sample, samples of a chunk
GROUPS = 8  # groups of chunks, at most, whose figures are averaged
GO = {"blocks": 1 / 3, "channels": 704 / 1536}  # share that goes
CRITERIA = ("block_influence", "taylor", "unit_taylor", "unit_taylor_entropy", "unit_activation_l2")


def kind(criterion: str) -> str:
    """What a criterion scores: blocks or channels."""
    return "channels" if criterion.startswith("unit_") else "blocks"


def read(scores: Scores, criterion: str) -> np.ndarray:
    """The scores of one chunk, [rows, blocks or channels]; as they add up over tokens."""
    if kind(criterion) == "channels":
        return np.array(scores.units[criterion]["channels"])
    found = np.array([scores.blocks[criterion]])
    return np.log(found) if criterion == "perplexity" else found


def alike(a: np.ndarray, b: np.ndarray, share: float) -> tuple[float, float]:
    """Rank correlation of two scores, and the share of what goes that is the same; means over rows."""
    gone = round(share * a.shape[1])
    lowest = [[{*row.argsort(kind="stable")[:gone].tolist()} for row in one] for one in (a, b)]
    same = [len(first & second) / gone for first, second in zip(*lowest, strict=True)]
    return float(np.mean([spearmanr(x, y)[0] for x, y in zip(a, b, strict=True)])), float(np.mean(same))


def chunks(model: str, data: str, criteria: Sequence[str], count: int, folder: Path) -> dict[str, np.ndarray]:
    """The scores of every chunk, [chunks, rows, blocks or channels] by criterion."""
    folder.mkdir(parents=True, exist_ok=True)
    found: dict[str, list[np.ndarray]] = {criterion: [] for criterion in criteria}
    for seed in range(count):
        path = folder / f"{seed}.json"
        if not path.exists():
            scores = llmprune.score(model, data, criteria=criteria, samples=CHUNK, seq_len=LENGTH, seed=seed)
            scores.save(path)
        scores = Scores.load(path)
        for criterion in criteria:
            found[criterion].append(read(scores, criterion))
    return {criterion: np.stack(rows) for criterion, rows in found.items()}


def main() -> None:
    """Score, and print both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("data", nargs="+", metavar="NAME=DATA")
    parser.add_argument("--tokens", type=int, default=2**19, help="of each kind of text")
    parser.add_argument("--criteria", nargs="+", default=CRITERIA)
    parser.add_argument("--out", type=Path, default=Path("runs/study_calibration"))
    arguments = parser.parse_args()
    count = arguments.tokens // (CHUNK * LENGTH)
    texts = dict(one.split("=", 1) for one in arguments.data)
    scored = {
        name: chunks(arguments.model, data, arguments.criteria, count, arguments.out / name)
        for name, data in texts.items()
    }
    sizes = [2**power for power in range(count.bit_length()) if 2 * 2**power <= count]
    print(f"| criterion | text | {' | '.join(f'{size * CHUNK * LENGTH:,}' for size in sizes)} |")
    print("|---" * (2 + len(sizes)) + "|")
    for criterion in arguments.criteria:
        for name, of_text in scored.items():
            values, cells = of_text[criterion], []
            for size in sizes:
                figures = []
                for first in range(0, min(count, GROUPS * size) - size + 1, size):
                    inside = np.arange(count) // size == first // size
                    some, others = values[inside].mean(0), values[~inside].mean(0)
                    figures.append(alike(some, others, GO[kind(criterion)]))
                correlation, same = np.mean(figures, axis=0)
                cells.append(f"{correlation:.3f}, {same:.0%}")
            print(f"| `{criterion}` | {name} | {' | '.join(cells)} |")
    print()
    for first, second in combinations(scored, 2):
        for criterion in arguments.criteria:
            a, b = (scored[name][criterion].mean(0) for name in (first, second))
            correlation, same = alike(a, b, GO[kind(criterion)])
            print(f"| `{criterion}` | {first}, {second} | {correlation:.3f}, {same:.0%} |")


if __name__ == "__main__":
    main()
