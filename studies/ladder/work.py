"""The folder of everything that the ladder makes, and the samples that everything is made with."""

from dataclasses import dataclass
from pathlib import Path

import llmprune
from data_prep.builtin import build_corpus
from data_prep.pack import prepare
from data_prep.recipe import PackSettings
from data_prep.reencode import reencode
from data_prep.sample import SampleConfig, sample
from llmprune.conversion.from_gguf import from_gguf
from llmprune.data.prepared import PreparedData
from llmprune.evaluation.references import references
from llmprune.models.loading import load_tokenizer
from llmprune.models.placement import Placement
from llmprune.plans.plan import Plan
from llmprune.pruning.scoring.all_criteria import CRITERIA
from llmprune.pruning.scoring.scores import Scores
from llmprune.utils.files import write_json

LENGTH = 512  # tokens of a sample
CALIBRATION = 32  # samples
MEGABYTES = 8.0  # of the built-in corpus
OWN, OWN_TOKENS = "own", 250_000  # the source's own text


@dataclass(frozen=True)
class Work:
    """The folder of everything that is made, and the samples that everything is made with."""

    folder: Path

    @property
    def model(self) -> Path:
        """The source model."""
        if not (self.folder / "smollm2").exists():
            from_gguf(None, self.folder / "smollm2")
        return self.folder / "smollm2"

    @property
    def data(self) -> Path:
        """Prepared data: the built-in corpus's domains, and prose if it is there."""
        data, text = self.folder / "data", self.folder / "text"
        if not data.exists():
            if not (text / "builtin").exists():
                build_corpus(text / "builtin", megabytes=MEGABYTES)
            domains = [str(folder) for folder in (*(text / "builtin").iterdir(), text / "prose") if folder.is_dir()]
            prepare(domains, str(self.model), data, PackSettings(LENGTH, eval_fraction=0.05), processes=2)
        return data

    def scores(self, samples: int) -> Scores:
        """The source's scores: by every criterion from ``CALIBRATION`` samples, by the compared one from more."""
        few = samples == CALIBRATION
        path = self.folder / ("scores" if few else f"scores-{samples}") / "scores.json"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            every = [name for name in CRITERIA if not CRITERIA[name].needs_experts]
            criteria = every if few else ["block_influence", "unit_activation_l2"]
            llmprune.score(self.model, self.data, criteria=criteria, samples=samples, seq_len=LENGTH).save(path)
        return Scores.load(path)

    @property
    def references(self) -> Path:
        """The source's losses by domain, for dynamic mixing."""
        path = self.folder / "references.json"
        if not path.exists():
            write_json(path, references([str(self.model)], PreparedData(self.data), Placement(), samples_per_domain=8))
        return path

    def text(self, wikitext: str, tokens: int) -> tuple[Path, int]:
        """A file with the text of WikiText-2's first tokens, and how many tokens of the source it has."""
        path, tokenizer = self.folder / f"wikitext-{tokens}.txt", load_tokenizer(self.model)
        if not path.exists():
            whole = tokenizer(Path(wikitext).read_text(encoding="utf-8"), verbose=False)["input_ids"]
            path.write_text(tokenizer.decode(whole[:tokens], clean_up_tokenization_spaces=False), encoding="utf-8")
        return path, len(tokenizer(path.read_text(encoding="utf-8"), verbose=False)["input_ids"])

    def data_from(self, name: str) -> Path:
        """Prepared data of one kind of text alone: what the source wrote itself (``own``), or a folder text-NAME."""
        data, text = self.folder / f"data-{name}", self.folder / f"text-{name}"
        if not data.exists():
            if name == OWN and not text.exists():
                sample(str(self.model), text / name, SampleConfig(OWN_TOKENS, LENGTH))
            prepare([str(text)], str(self.model), data, PackSettings(LENGTH, eval_fraction=0.05), processes=2)
        return data

    def kept(self, name: str | None) -> tuple[int, ...] | None:
        """The source's tokens that a cell's model kept; None = all, or there is no such cell."""
        plan = None if name is None else self.cell(name) / "model" / "llmprune" / "plan.json"
        return None if plan is None or not plan.exists() else Plan.load(plan).vocabulary

    def data_of(self, name: str | None) -> Path:
        """The prepared data in the tokens of a cell's model."""
        kept = self.kept(name)
        if name is None or kept is None:
            return self.data
        place = self.folder / f"data-{len(kept)}"
        if not place.exists():
            reencode(self.data, self.cell(name) / "model", place, processes=2)
        return place

    def cell(self, name: str) -> Path:
        """The folder of a cell."""
        return self.folder / "cells" / name.replace(" ", "_")
