"""The command ``llmprune``: it only delegates. Imports are inside the commands, so that --help is quick."""

import json
import sys
from enum import Enum
from typing import Annotated

import typer

from llmprune.errors import UserError

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)

Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace OUT if it exists.")]
Out = Annotated[str, typer.Option(help="Folder to write.")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
PushToHub = Annotated[str | None, typer.Option(help="Also upload OUT to the Hugging Face hub under this name.")]


class DType(str, Enum):
    """Number formats that weights can be written in."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


@app.callback()
def llmprune() -> None:
    """Prune large language models and train them back."""


@app.command()
def convert(
    checkpoint: Annotated[str, typer.Argument(help="A Composer checkpoint (.pt), or the folder of its run.")],
    out: Out,
    dtype: Annotated[DType | None, typer.Option(help="Of the weights written; default: as trained.")] = None,
    overwrite: Overwrite = False,
    push_to_hub: PushToHub = None,
) -> None:
    """Turn a checkpoint (with gates, if it has any) into a plain Hugging Face folder."""
    import torch

    from llmprune.convert import commands

    plan = commands.convert(
        checkpoint, out, dtype=None if dtype is None else getattr(torch, dtype.value), overwrite=overwrite
    )
    print(f"{out}: {plan.shape}")
    if push_to_hub is not None:
        print(commands.push_to_hub(out, push_to_hub))


@app.command()
def apply(
    model: Annotated[str, typer.Argument(help="A Hugging Face folder or hub name.")],
    plan: Annotated[str, typer.Argument(help="A plan (.json).")],
    out: Out,
    overwrite: Overwrite = False,
    push_to_hub: PushToHub = None,
) -> None:
    """Cut a model by a plan; OUT is a plain Hugging Face folder."""
    from llmprune.convert import commands

    commands.apply(model, plan, out, overwrite=overwrite)
    print(out)
    if push_to_hub is not None:
        print(commands.push_to_hub(out, push_to_hub))


@app.command()
def verify(
    a: Annotated[str, typer.Argument(help="A Hugging Face model, or a checkpoint (gated or not).")],
    b: Annotated[str, typer.Argument(help="Another one.")],
    as_json: Json = False,
) -> None:
    """Compare the logits of two models on the same tokens, in float32."""
    from dataclasses import asdict

    from llmprune.evaluation.verify import compare, open_for_comparison

    difference = compare(open_for_comparison(a), open_for_comparison(b))
    if as_json:
        print(json.dumps(asdict(difference)))
    else:
        print(
            f"largest difference {difference.max_abs:.3g} ({difference.max_rel:.3g} of the largest logit), "
            f"mean {difference.mean_abs:.3g}"
        )


@app.command()
def families(as_json: Json = False) -> None:
    """List the model families that can be pruned."""
    from llmprune.families import FAMILIES

    if as_json:
        print(
            json.dumps(
                {name: {"model_types": f.model_types, "description": f.description} for name, f in FAMILIES.items()}
            )
        )
        return
    for name, family in FAMILIES.items():
        print(f"{name:12} {', '.join(family.model_types):20} {family.description}")


def main() -> None:
    """Run the command; a mistake of the user's is one line on standard error and exit code 2."""
    try:
        app()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
