"""What scores cost."""

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from benchmarks.ratios import Ratio, interleaved


def scoring_model() -> tuple[PreTrainedModel, torch.Tensor, str]:
    """A Llama of 32 blocks, calibration samples for it, and what they are in words."""
    from transformers import LlamaConfig

    from llmprune.models.loading import new_model

    config = LlamaConfig(
        vocab_size=4096,
        hidden_size=384,
        intermediate_size=1024,
        num_hidden_layers=32,
        num_attention_heads=6,
        tie_word_embeddings=True,
    )
    model = new_model(config, seed=0).eval()
    tokens = torch.randint(config.vocab_size, (4, 256), generator=torch.Generator().manual_seed(0))
    size = sum(p.numel() for p in model.parameters())
    return model, tokens, f"{config.num_hidden_layers} blocks, {size / 1e6:.1f} M parameters, 4 samples of 256 tokens"


def score_by(model: PreTrainedModel, tokens: torch.Tensor, names: Sequence[str]) -> None:
    """Score a model by some criteria."""
    from llmprune.pruning.scoring.criterion import ScoringJob
    from llmprune.pruning.scoring.scorer import Scorer

    job = ScoringJob(model.config, torch.device("cpu"))
    scorer = Scorer(model, names, job, batch_size=len(tokens))
    scorer.update(tokens)
    scorer.scores()


def removal_perplexity(runs: int) -> Ratio:
    """Perplexity of every single removal, together, over one pass for each with its block skipped."""
    from llmprune.models.block_hooks import shortened
    from llmprune.models.causal_lm import token_losses

    model, tokens, words = scoring_model()
    layers = model.config.num_hidden_layers

    @torch.no_grad()
    def one_by_one() -> None:
        for block in range(layers):
            with shortened(model, [other for other in range(layers) if other != block]):
                loss, count = token_losses(model(input_ids=tokens, use_cache=False).logits, tokens)
            (loss.sum() / count.sum()).exp().item()

    def together() -> None:
        score_by(model, tokens, ["perplexity"])

    return interleaved(together, one_by_one, runs, 0.60, f"perplexity of all removals / one pass each ({words})")


def all_criteria(runs: int) -> Ratio:
    """All criteria of blocks at once over the dearest alone."""
    model, tokens, words = scoring_model()
    names = of_blocks()
    return interleaved(
        lambda: score_by(model, tokens, names),
        lambda: score_by(model, tokens, ["perplexity"]),
        runs,
        1.25,
        f"all {len(names)} criteria of blocks / perplexity of all removals alone ({words})",
    )


def unit_scores(runs: int) -> Ratio:
    """All criteria of blocks and of units over those of blocks alone."""
    from llmprune.pruning.scoring.settings import LayerScoringConfig

    model, tokens, words = scoring_model()
    blocks, everything = of_blocks(), LayerScoringConfig().names(model.config)
    return interleaved(
        lambda: score_by(model, tokens, everything),
        lambda: score_by(model, tokens, blocks),
        runs,
        1.15,
        f"{len(everything)} criteria / the {len(blocks)} of blocks alone ({words})",
    )


def of_blocks() -> list[str]:
    """The criteria that score blocks, sub-layers or spans."""
    from llmprune.pruning.scoring.all_criteria import CRITERIA
    from llmprune.pruning.scoring.criterion import ScoreSection

    return [name for name in CRITERIA if CRITERIA[name].section is not ScoreSection.UNITS]
