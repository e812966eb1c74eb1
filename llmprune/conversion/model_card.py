"""The README.md of an exported model."""

import json
from collections.abc import Mapping
from dataclasses import asdict

from huggingface_hub import ModelCardData

from llmprune.checkpoints.run_folder import RANDOM
from llmprune.plans.plan import Plan


def model_card(
    source: str,
    plan: Plan,
    parameters: int,
    model_type: str,
    facts: Mapping[str, object],
    *,
    needs_code: bool = False,
) -> str:
    """Write the text of the model card.

    Args:
        source: name of the model that was cut.
        plan: plan of the cut.
        parameters: number of parameters of the cut model.
        model_type: Hugging Face model type of the cut model.
        facts: further sections of the card: JSON-like value by heading.
        needs_code: whether the model loads only with its modelling file.
    """
    on_hub = source.count("/") == 1 and not source.startswith((".", "/"))
    header = ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["llmprune", "pruned", model_type],
        base_model=source if on_hub else None,
    )
    before, after = asdict(plan.source), asdict(plan.shape)
    rows = [
        f"| {name.replace('_', ' ')} | {size:,} | {after[name]:,} |"
        for name, size in before.items()
        if size is not None
    ]
    trust = ", trust_remote_code=True" if needs_code else ""
    origin = "random weights" if source == RANDOM else f"`{source}`"
    sections = [
        f"---\n{header.to_yaml()}\n---",
        f"# A {model_type} model of {parameters:,} parameters",
        f"Made from {origin} with llmprune. "
        + ("It needs the code in modeling_llmprune.py:" if needs_code else "It loads with plain transformers:"),
        "```python\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f"model = AutoModelForCausalLM.from_pretrained(FOLDER{trust})\n"
        f"tokenizer = AutoTokenizer.from_pretrained(FOLDER{trust})\n```",
        "## Shape\n\n| | source | this model |\n|---|---|---|\n" + "\n".join(rows),
        f"The plan is in `llmprune/`; it was made for weights with the SHA-256 `{plan.model}`.",
    ]
    for heading, value in facts.items():
        text = value if isinstance(value, str) else f"```json\n{json.dumps(value, indent=2)}\n```"
        sections.append(f"## {heading}\n\n{text}")
    return "\n\n".join(sections) + "\n"
