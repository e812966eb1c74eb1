"""Whether training can resume from a run's checkpoints under a config."""

from transformers import PretrainedConfig

from llmprune.checkpoints.run_folder import Manifest, RunFolder
from llmprune.config.job_files import load_recorded
from llmprune.config.schema import Config
from llmprune.config.section_registry import all_sections
from llmprune.models.families import family_of, richer_heads_of
from llmprune.models.loading import load_model_config
from llmprune.utils.errors import UserError


def check_same_run(run: RunFolder, manifest: Manifest, config: Config, model_config: PretrainedConfig) -> None:
    """Check that training can resume from a run's checkpoints under ``config``.

    Raises:
        UserError: the model, the data, their order, the seed, the batch size, or a ``fixed`` key of a section differs.
    """
    saved, before = Manifest.load(run.checkpoints), load_recorded(run.config)
    if not isinstance(before, Config):
        raise UserError(f"{run.config} is of no run that trains: use another run.folder")
    family = family_of(model_config)
    saved_config = load_model_config(run.checkpoints / "model")
    if saved.family != family.name or family.shape(saved_config) != family.shape(model_config):
        raise UserError(
            f"the checkpoints in {run.checkpoints} are of a {saved.family} model with "
            f"{family.shape(saved_config)}; the config's model has {family.shape(model_config)}: resume with the model "
            "that the run began with, or use another folder"
        )
    for key, was, now in (
        ("model.richer_heads", richer_heads_of(saved_config), richer_heads_of(model_config)),
        *(
            (f"{name}.{key}", *((kept.sections.get(name) or {}).get(key) for kept in (saved, manifest)))
            for name, section in all_sections().items()
            for key in section.fixed
        ),
        ("run.seed", before.run.seed, config.run.seed),
        ("train.global_batch_size", before.train.global_batch_size, config.train.global_batch_size),
        *(
            (f"data.{key}", getattr(before.data, key), getattr(config.data, key))
            for key in ("weights", "partitions", "shuffle_window", "document_boundaries")
        ),
        ("data (its contents)", saved.data["contents"][:12], manifest.data["contents"][:12]),
    ):
        if was != now:
            raise UserError(
                f"the checkpoints in {run.checkpoints} are of a run with {key} {was}; the config asks for {now}: keep "
                "what the run began with, or use another run.folder"
            )
