"""The settings of plans: which blocks and units are removed."""

from dataclasses import dataclass, replace
from typing import Any, Literal

from llmprune.utils.errors import UserError
from llmprune.utils.settings import check_settings, limited

OTHER_DATA = (
    "with fewer tokens the data are encoded in another way: cut the vocabulary first (llmprune plan --shape "
    "vocabulary=…, llmprune apply, python -m data_prep reencode), and prune what comes out"
)


@dataclass
class PlanConfig:
    """How a plan is made from scores.

    Attributes:
        method: name of a registered selection of blocks: lowest, span, list, sublayers, iterative, greedy or merge.
        criterion: name of the criterion whose scores select blocks; null = none.
        remove: number of blocks to remove.
        shape: sizes of the pruned model, any of layers, hidden, heads, kv_heads, intermediate, experts and vocabulary;
            sizes that are not given stay as they are. The tokens that stay are those that the calibration text uses
            most. attention_layers and mlp_layers are the numbers of attentions and MLPs that stay; each time the one
            goes without which the calibration loss is lowest. Blocks without one need a modelling file.
        unit_criterion: name of the criterion whose scores select heads, channels and hidden dimensions; null = none.
        expert_criterion: name of the criterion whose scores select experts; null = ``unit_criterion``.
        correction: correction of output matrices on the calibration samples: none, mean (in narrowed attentions and
            MLPs the mean of the removed inputs is folded into biases) or refit (there the columns that stay are fitted
            by least squares, and so are MLPs before removed blocks, for what these blocks did).
        drop: list of what the method ``list`` removes: numbers of blocks, or ``attention.N`` and ``mlp.N``.
        protect_first: number of blocks at the start of the model that must stay; null = none (greedy and merge: one).
        protect_last: number of blocks at the end of the model that must stay; null = none (greedy and merge: one).
        threshold: mean cosine that the final hidden states must keep after a merge, in [-1, 1] (method ``merge``).
        merge_size: number of blocks that a merge makes into one (method ``merge``).
        merge_step: number of blocks to move towards the start of the model after a merge (method ``merge``).
        force: keep a plan with corrections, or under a budget, even if its calibration loss shows that the model is
            ruined.
    """

    method: str = "lowest"
    criterion: str | None = None
    remove: int | None = None
    shape: dict[str, int] | None = None
    unit_criterion: str | None = None
    expert_criterion: str | None = None
    correction: Literal["none", "mean", "refit"] = "none"
    drop: list[str] | None = None
    protect_first: int | None = limited(None, least=0)
    protect_last: int | None = limited(None, least=0)
    threshold: float = 0.65
    merge_size: int = 4
    merge_step: int = 2
    force: bool = False

    def check(self) -> None:
        """Raise ``UserError`` for settings that contradict each other."""
        check_settings(self)
        if self.shape is not None and not self.shape:
            raise UserError(
                "the shape is empty: name layers, hidden, heads, kv_heads, intermediate, experts or vocabulary"
            )
        if self.shape is not None and "layers" in self.shape and (self.remove is not None or self.drop is not None):
            raise UserError("the shape says how many layers stay: leave out --remove and --drop")
        if self.method == "merge" and self.correction != "none":
            raise UserError(
                "merged blocks have no matrices of their own to correct: leave out the merge or the correction"
            )

    def of_depth(self, layers: int) -> "PlanConfig | None":
        """The settings that select blocks; None if all blocks stay."""
        if self.shape is None:
            return self
        if (kept := self.shape.get("layers")) is not None:
            return None if kept == layers else replace(self, remove=layers - kept)
        return None if self.remove is None and self.drop is None and self.method == "lowest" else self

    @property
    def sublayers(self) -> dict[str, int]:
        """The numbers of attentions and MLPs that stay in the blocks that stay, as far as the shape names them."""
        given = self.shape or {}
        names = ("attention", "mlp")
        return {name: given[f"{name}_layers"] for name in names if f"{name}_layers" in given}

    @property
    def sizes(self) -> dict[str, int]:
        """The sizes of the shape, without the numbers of sub-layers."""
        return {
            name: size for name, size in (self.shape or {}).items() if name not in ("attention_layers", "mlp_layers")
        }

    def refuse_vocabulary(self) -> None:
        """Refuse a smaller vocabulary in a job that also trains.

        Raises:
            UserError: the shape names a vocabulary: the data of the training would have the wrong tokens.
        """
        if "vocabulary" in (self.shape or {}):
            raise UserError(OTHER_DATA)

    def refuse(self, section: str, *names: str) -> None:
        """Refuse keys that the job sets itself.

        Args:
            section: name of the section with the job's own keys, for the message.
            names: names of the refused keys.

        Raises:
            UserError: one of the keys is set.
        """
        for name in names:
            if getattr(self, name) != getattr(PlanConfig, name, None):
                raise UserError(f"leave out plan.{name}: {section} decides it")


@dataclass
class PlansConfig(PlanConfig):
    """How plans are made from scores: ``plan-N.json`` for every N in ``remove``, or ``plan.json``.

    With several criteria, each criterion has its own plans: ``plan-CRITERION-N.json``.

    Attributes:
        criterion: name of the criterion whose scores select blocks, or a list of names; null = none.
        remove: number of blocks to remove, or a list of numbers; null = none.
    """

    criterion: Any = None
    remove: Any = None

    def each(self) -> dict[str, PlanConfig]:
        """The settings of every plan, by the name of its file.

        Raises:
            UserError: a criterion is no name, or a number of blocks no number.
        """
        criteria = _names(self.criterion)
        numbers = _numbers(self.remove)
        counts: list[int | None] = [None] if not numbers and self.shape is not None else [*numbers]

        def file(name: str | None, count: int | None) -> str:
            parts = ["plan", *([str(name)] if len(criteria) > 1 else []), *([] if count is None else [str(count)])]
            return f"{'-'.join(parts)}.json"

        return {
            file(name, count): PlanConfig(**{**vars(self), "criterion": name, "remove": count})
            for name in criteria
            for count in counts
        }


def _numbers(value: Any) -> list[int | None]:
    """The numbers of blocks to remove: those in a list, or the one that is no list."""
    listed = [int(one) if isinstance(one, str) and one.isdecimal() else one for one in _as_list(value)]
    if not all(type(one) is int or (one is None and not isinstance(value, list)) for one in listed):
        raise UserError(f"plan.remove is {value}; it must be a number, or a list of numbers")
    return listed


def _as_list(value: Any) -> list[Any]:
    return [*value] if isinstance(value, list) else [value]


def _names(value: Any) -> list[str | None]:
    """The names of criteria: those in a list, or the one that is no list."""
    listed = _as_list(value)
    if not listed or not all(isinstance(one, str) or (one is None and not isinstance(value, list)) for one in listed):
        raise UserError(f"plan.criterion is {value}; it must be a name, or a list of names")
    return listed
