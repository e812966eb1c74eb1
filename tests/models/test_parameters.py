"""The parameters that parts of a model name, on every family, by what the names of modules say."""

import re

import pytest

from llmprune.models.parameters import parameter_names_of
from llmprune.utils.errors import UserError
from tests.conftest import random_model, tiny_config
from tests.models.families.test_conformance import CONFIGS


@pytest.mark.parametrize("name", CONFIGS)
def test_parts_are_exactly_what_they_say(name: str) -> None:
    model = random_model(CONFIGS[name])
    every = [parameter for parameter, _ in model.named_parameters()]
    numbers = {int(found[1]) for p in every if (found := re.search(r"layers\.(\d+)\.", p))}
    outside = [p for p in every if "layers." not in p]
    block = {n: {p for p in every if f"layers.{n}." in p} for n in numbers}
    last = max(numbers)
    expected = {
        "last.1": block[last],
        "last.2": block[last] | block[last - 1],
        "block.1": block[1],
        "norms": {p for p in every if "norm" in p},
        "final_norm": {p for p in outside if "norm" in p},
        "embedding": {p for p in outside if "embed" in p and not p.startswith("embed_out")},
        "all": set(every),
    }
    if not model.config.tie_word_embeddings:
        expected["output"] = {p for p in outside if p.startswith(("lm_head", "embed_out"))}
    for part, wanted in expected.items():
        assert wanted and set(parameter_names_of(model, [part])) == wanted, part
    both = parameter_names_of(model, ["final_norm", "last.1", "last.2"])
    assert both == [p for p in every if p in expected["final_norm"] | expected["last.2"]]  # each once, in order


def test_names_match_whole_parts_between_dots() -> None:
    """Block 1 is not block 10 or 11."""
    model = random_model(tiny_config(num_hidden_layers=12))
    for part, pattern in {
        "model.layers.1": r"model\.layers\.1\.",
        "model.layers.*.mlp.up_proj": r"model\.layers\.\d+\.mlp\.up_proj\.",
        "model.layers.1*": r"model\.layers\.1\d+\.",
        "model.norm.weight": r"model\.norm\.weight$",
    }.items():
        wanted = [name for name, _ in model.named_parameters() if re.match(pattern, name)]
        assert wanted and parameter_names_of(model, [part]) == wanted
    for part in ("layers.1", "model.layers.1.", "mlp", "block.12", "block.-1", "last.0", "last.13", "block.x", ""):
        with pytest.raises(UserError, match="there is no part"):
            parameter_names_of(model, [part])


def test_a_tied_output_does_not_train_alone() -> None:
    with pytest.raises(UserError, match="its embedding, too"):
        parameter_names_of(random_model(tiny_config()), ["output"])
