"""``dynamic_loading``: weights of domains that follow their losses, or a schedule."""

from collections.abc import Iterable

from composer import Callback
from composer.core import Time

from llmprune.callbacks.dynamic_loading import DynamicLoading
from llmprune.config.section_registry import SECTIONS
from llmprune.data.format import EVAL, TRAIN
from llmprune.data.mixing import PPM, domain_weights
from llmprune.data.weight_updates import DynamicLoadingConfig, check_updates, read_references
from llmprune.training.section import Build, Inputs, Section
from llmprune.utils.errors import UserError


@SECTIONS.register("dynamic_loading")
class DynamicLoadingSection(Section[DynamicLoadingConfig]):
    """Weights of domains that follow their evaluation losses, or a schedule."""

    name = "dynamic_loading"
    settings = DynamicLoadingConfig
    decides = ("train.eval_interval",)  # the mix changes after evaluations
    mixes = True

    def check_inputs(self, inputs: Inputs) -> None:
        """Check that the domains have what the update rule needs; the reference losses are read now."""
        own, config, data = self.own, self.config, inputs.data.manifest
        own.references = read_references(own.references)  # the run keeps the values, even if the file changes later
        domains = sorted(data.domains)
        if own.update == "schedule" and config.data.weights is not None:
            raise UserError("dynamic_loading.schedule has the weights of the whole run: leave data.weights out")
        parts = domain_weights({domain: data.samples(domain, TRAIN) for domain in domains}, config.data.weights)
        drawn = {domain: part / PPM for domain, part in zip(domains, parts, strict=True) if part}
        check_updates(own, domains, drawn, [d for d in domains if data.samples(d, EVAL)])
        if own.update_delay < (ahead := config.data.workers * config.data.prefetch):
            raise UserError(
                f"dynamic_loading.update_delay is {own.update_delay}, but {ahead} batches may be loaded already "
                "(data.workers × data.prefetch): raise it"
            )
        if not Time.from_timestring(config.train.eval_interval).value:
            raise UserError("dynamic_loading changes weights after evaluations: set train.eval_interval")

    def callbacks(self, build: Build) -> Iterable[Callback]:
        """The callback ``DynamicLoading``."""
        assert build.stream is not None
        return [DynamicLoading(self.own, build.stream, build.evaluated.values())]
