"""Commands that make models from other formats."""

from typing import Annotated

import typer

from llmprune.cli.common import Out, Overwrite, app


@app.command()
def model(
    out: Out,
    gguf: Annotated[str | None, typer.Option(help="GGUF file; default: the built-in SmolLM2-135M-Instruct.")] = None,
    overwrite: Overwrite = False,
) -> None:
    """Write the built-in model, or any GGUF file of a supported family, as a Hugging Face folder."""
    from llmprune.conversion.from_gguf import from_gguf

    print(f"{out}: {from_gguf(gguf, out, overwrite=overwrite):,} parameters")
