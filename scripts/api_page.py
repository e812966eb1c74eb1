"""Write docs/api.md from the docstrings of what ``import llmprune`` offers: ``python scripts/api_page.py``."""

import ast
import inspect
from pathlib import Path

from docstring_parser import DocstringStyle, parse

import llmprune
from llmprune.api import functions

ROOT = Path(__file__).resolve().parents[1]
NAMES = ("prune", "score", "plan", "apply", "train", "convert", "verify", "evaluate", "measure", "report")
BEGIN = """# Python

```python
{example}
```

`import llmprune` imports nothing else: every function below loads what it needs when it is called, and does what the
command of the same name does. A mistake raises `llmprune.UserError`, whose text says what to do. In the
signatures `Place` is a path or a hub name (`str | Path`); `Scores`, `Plan`, `Difference` and `BudgetConfig` are
`llmprune.Scores` and so on, `Config` is what `llmprune.load_job` makes of a YAML, `Callback` and `Trainer` are
Composer's. The settings of `plan` are listed by `llmprune plan --help`.

This page is written by `python scripts/api_page.py`. Its examples are run by a test, one after the other, in a folder
with a model of six blocks, `base`, and some text, `text`.
"""


def page() -> str:
    """The text of the page."""
    (example,) = (text for text in inspect.cleandoc(llmprune.__doc__ or "").split("\n\n") if text.startswith(">>>"))
    parts = [BEGIN.format(example=example.replace(">>> ", "").replace("import llmprune\n", "import llmprune\n\n"))]
    for name in NAMES:
        function = getattr(functions, name)
        told = parse(function.__doc__, DocstringStyle.GOOGLE)
        parts.append(f"## llmprune.{name}\n\n```python\n{_signature(name)}\n```\n")
        parts.append(f"{told.short_description}\n")
        parts.append(f"```python\n{inspect.cleandoc(told.long_description or '')}\n```\n")
        parts.append("\n".join(f"- `{each.arg_name}`: {_line(each.description)}" for each in told.params) + "\n")
        if told.returns is not None:
            parts.append(f"Returns: {_line(told.returns.description)}\n")
        parts += [f"Raises `llmprune.{each.type_name}`: {_line(each.description)}\n" for each in told.raises]
    return "\n".join(parts)


def _line(text: str | None) -> str:
    return " ".join((text or "").replace("``", "`").split())


class _Plain(ast.NodeTransformer):
    """Replaces annotations that are strings by the types that they name."""

    def visit_arg(self, node: ast.arg) -> ast.arg:
        if isinstance(node.annotation, ast.Constant):
            node.annotation = ast.parse(str(node.annotation.value), mode="eval").body
        return node


def _signature(name: str) -> str:
    """The signature of a function, with one argument per line."""
    tree = ast.parse(inspect.getsource(getattr(functions, name)))
    (function,) = (node for node in tree.body if isinstance(node, ast.FunctionDef))
    returns = ast.unparse(function.returns).strip("'") if function.returns is not None else ""
    arguments, depth = [""], 0
    for letter in ast.unparse(_Plain().visit(function.args)):
        depth += (letter in "[(") - (letter in "])")
        if letter == "," and not depth:
            arguments.append("")
        else:
            arguments[-1] += letter
    lines = "".join(f"    {argument.strip()},\n" for argument in arguments).replace("'", '"')
    return f"llmprune.{name}(\n{lines}) -> {returns}"


if __name__ == "__main__":
    (ROOT / "docs" / "api.md").write_text(page(), encoding="utf-8")
