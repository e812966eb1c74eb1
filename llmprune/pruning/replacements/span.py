"""The span of blocks that is replaced."""

from dataclasses import dataclass

from llmprune.plans.plan import KeptBlock, Plan
from llmprune.pruning.replacements.settings import BlockReplacementConfig
from llmprune.utils.errors import UserError


@dataclass(frozen=True)
class Span:
    """A span of neighbouring blocks.

    Attributes:
        start: number of the first block.
        length: number of blocks.
    """

    start: int
    length: int

    @property
    def end(self) -> int:
        """The number of the first block after the span."""
        return self.start + self.length

    def __contains__(self, block: int) -> bool:
        """Whether a block is in the span."""
        return self.start <= block < self.end

    def __str__(self) -> str:
        return f"block {self.start}" if self.length == 1 else f"blocks {self.start} to {self.end - 1}"

    def check_within(self, layers: int) -> None:
        """Raise ``UserError`` unless the span is within a model of ``layers`` blocks and other blocks stay."""
        if self.length < 1 or self.start < 0 or self.end > layers:
            raise UserError(
                f"a span of {self.length} blocks from block {self.start} on does not lie within the model's blocks, 0 "
                f"to {layers - 1}"
            )
        if self.length == layers:
            raise UserError("the span is the whole model: something has to stay")

    def kept(self, layers: int, offsets: tuple[int, ...] = ()) -> tuple[KeptBlock, ...]:
        """The blocks that stay of ``layers`` blocks: those outside the span, and those at ``offsets`` within it."""
        inside = {self.start + offset for offset in offsets}
        return tuple(KeptBlock.whole(block) for block in range(layers) if block not in self or block in inside)


def span_of(plan: Plan) -> Span:
    """The span that a plan removes.

    Raises:
        UserError: the plan does not only remove one span.
    """
    removed = sorted(set(range(plan.source.layers)) - {block.attention for block in plan.blocks})
    if not removed:
        raise UserError("the plan removes no block: there is nothing to replace")
    span = Span(removed[0], len(removed))
    if (
        plan.hidden is not None
        or plan.vocabulary is not None
        or plan.skipped
        or plan.factors
        or plan.blocks != span.kept(plan.source.layers)
    ):
        raise UserError("the plan does more than to remove neighbouring blocks: make it with `--method span`")
    return span


def given_span(settings: BlockReplacementConfig) -> Span | None:
    """The span in the settings; None = the span is to be found by scores.

    Raises:
        UserError: the plan can't be read, or does not only remove one span.
    """
    if settings.plan is None:
        assert settings.length is not None
        return None if settings.start is None else Span(settings.start, settings.length)
    return span_of(Plan.load(settings.plan))
