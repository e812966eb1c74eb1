"""Which tokens should stay: those that the text at hand uses, or those that text in general uses?

    python studies/vocabulary.py MODEL DATA --text TEXT [--keep 24576]

For several weights of text in general beside the uses in DATA (``expected_uses``) it prints by how much the loss of
held-out text of every domain of DATA, and of TEXT, rises before any training, and by how much these texts get longer.
"""

import argparse
from pathlib import Path

import torch
from torch import Tensor

from llmprune.data.calibration_settings import CalibrationConfig
from llmprune.data.dataset import EvalDataset
from llmprune.data.prepared import PreparedData
from llmprune.data.token_counts import count_tokens
from llmprune.models.causal_lm import token_losses
from llmprune.models.loading import load_model, load_tokenizer
from llmprune.models.number_formats import dtype_for_inference
from llmprune.models.retold import Spelling
from llmprune.models.smaller_tokenizer import Vocabulary
from llmprune.pruning.selection.vocabulary import expected_uses

LENGTH, SAMPLES, BATCH = 512, 32, 4
WEIGHTS = (0.0, 0.03, 0.1, 0.3, 1.0)


def main() -> None:
    """Print a row for every weight."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("data", help="prepared data")
    parser.add_argument("--text", type=Path, required=True, help="a file with other text")
    parser.add_argument("--keep", type=int, default=24_576, help="number of tokens that stay")
    arguments = parser.parse_args()
    tokenizer = load_tokenizer(arguments.model)
    vocabulary = Vocabulary(tokenizer)
    counts = count_tokens(CalibrationConfig(arguments.data), tokenizer)
    model = load_model(arguments.model, dtype=dtype_for_inference("auto", on_gpu=False))
    rows = model.config.vocab_size

    @torch.no_grad()
    def measured(samples: Tensor, spelling: Spelling | None) -> tuple[float, float]:
        """Loss per token of the source, and the number of tokens as a share of the source's."""
        nats = told = predicted = 0.0
        for part in samples.split(BATCH):
            if spelling is None:
                losses, number = token_losses(model(part, use_cache=False).logits, part)
                new = number
            else:
                absent = torch.full((rows,), -torch.inf, dtype=model.dtype)
                absent[list(spelling.kept)] = 0
                batch, number = spelling.retold({"input_ids": part})
                logits = model(batch["input_ids"], use_cache=False).logits.add_(absent)
                losses, new = token_losses(logits, batch["labels"])
            nats, told, predicted = nats + losses.sum().item(), told + new.sum().item(), predicted + number.sum().item()
        return nats / predicted, told / predicted

    held_out = EvalDataset(PreparedData(arguments.data), SAMPLES // 4)
    texts: dict[str, list[Tensor]] = {}
    for place in range(len(held_out)):
        sample = held_out[place]
        texts.setdefault(held_out.domains[int(sample["domain"])], []).append(sample["input_ids"])
    other = tokenizer(arguments.text.read_text(encoding="utf-8"), add_special_tokens=False, verbose=False)["input_ids"]
    streams = {name: torch.stack(samples) for name, samples in texts.items()}
    streams[arguments.text.stem] = torch.tensor(other[: SAMPLES * LENGTH]).view(-1, LENGTH)
    whole = {name: measured(samples, None)[0] for name, samples in streams.items()}
    print("weight  " + "  ".join(f"{name:>20}" for name in streams), flush=True)
    for weight in WEIGHTS:
        order = vocabulary.in_order(expected_uses(counts, rows, weight), rows)
        kept = tuple(sorted(order[: arguments.keep]))
        spelling = Spelling(kept, vocabulary.pieces(kept))
        cells = []
        for name, samples in streams.items():
            loss, longer = measured(samples, spelling)
            cells.append(f"{loss / whole[name] - 1:+8.1%} {longer - 1:+8.1%}")
        print(f"{weight:6g}  " + "  ".join(f"{cell:>20}" for cell in cells), flush=True)


if __name__ == "__main__":
    main()
