"""The span of blocks that is replaced."""

from dataclasses import dataclass

from llmprune.plans.plan import KeptBlock, Plan
from llmprune.pruning.replacements.settings import BlockReplacementConfig
from llmprune.utils.errors import UserError


@dataclass(frozen=True)
class Span:
    """Neighbouring blocks.

    Attributes:
        start: the first one's number.
        length: how many there are.
    """

    start: int
    length: int

    @property
    def end(self) -> int:
        """The number of the block after it."""
        return self.start + self.length

    def __contains__(self, block: int) -> bool:
        """Whether a block belongs to it."""
        return self.start <= block < self.end

    def __str__(self) -> str:
        return f"block {self.start}" if self.length == 1 else f"blocks {self.start} to {self.end - 1}"

    def check_within(self, layers: int) -> None:
        """Raise ``UserError`` unless it lies within a model of so many blocks, and leaves some."""
        if self.length < 1 or self.start < 0 or self.end > layers:
            raise UserError(
                f"a span of {self.length} blocks from block {self.start} on does not lie within the model's blocks, 0 "
                f"to {layers - 1}"
            )
        if self.length == layers:
            raise UserError("the span is the whole model: something has to stay")

    def kept(self, layers: int, offsets: tuple[int, ...] = ()) -> tuple[KeptBlock, ...]:
        """What stays of a model of so many blocks: all others, and of the span the blocks at ``offsets`` in it."""
        inside = {self.start + offset for offset in offsets}
        return tuple(KeptBlock.whole(block) for block in range(layers) if block not in self or block in inside)


def span_of(plan: Plan) -> Span:
    """The span that a plan removes.

    Raises:
        UserError: it does something else, too.
    """
    removed = sorted(set(range(plan.source.layers)) - {block.attention for block in plan.blocks})
    if not removed:
        raise UserError("the plan removes no block: there is nothing to replace")
    span = Span(removed[0], len(removed))
    if plan.hidden is not None or plan.factors or plan.blocks != span.kept(plan.source.layers):
        raise UserError("the plan does more than to remove neighbouring blocks: make it with `--method span`")
    return span


def given_span(settings: BlockReplacementConfig) -> Span | None:
    """The span that the settings name; None = it is to be scored.

    Raises:
        UserError: the plan is another model's, or does something else than to remove a span.
    """
    if settings.plan is None:
        assert settings.length is not None
        return None if settings.start is None else Span(settings.start, settings.length)
    return span_of(Plan.load(settings.plan))
