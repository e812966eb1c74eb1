"""Quantisation of weights to four bits by GPTQ (arXiv:2210.17323), through llm-compressor.

llm-compressor can be installed with Composer's pinned versions. It works on CPUs and GPUs, one block after the other,
and writes the compressed-tensors format, which Transformers and vLLM read.
"""

import logging
import math
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GenerationConfig, PretrainedConfig, PreTrainedModel

from llmprune.data.calibration import calibration_samples
from llmprune.data.calibration_settings import CalibrationConfig
from llmprune.models.companions import GENERATION, copy_companions
from llmprune.models.loading import load_any_model, load_tokenizer
from llmprune.models.own_model_types import needs_code
from llmprune.models.source import find_folder, longest_input, read_config
from llmprune.utils.checksums import record
from llmprune.utils.errors import UserError
from llmprune.utils.files import make_readable
from llmprune.utils.outputs import output_folder, refuse_existing, refuse_replacing
from llmprune.utils.progress import Progress

log = logging.getLogger(__name__)

BITS = 4
DAMPENING = 0.01  # added to the diagonal of the Hessian, as a share of the diagonal's mean


@dataclass(frozen=True)
class QuantizeConfig:
    """Settings for the quantisation of weights.

    Attributes:
        data: calibration samples; the papers use 128 samples of 2048 tokens.
        group_size: number of weights of a row that share a scale.
        activation_order: whether the columns with the largest activations are quantised first.
        dtype: dtype of the scales and of the unquantised parts (embeddings, output layer, norms); None = as stored, but
            bfloat16 instead of float32, in which these parts would be larger than all others.
    """

    data: CalibrationConfig = field(default_factory=lambda: CalibrationConfig(samples=128, length=2048))
    group_size: int = 128
    activation_order: bool = True
    dtype: torch.dtype | None = None


def quantize(model: Path | str, out: Path | str, config: QuantizeConfig, *, overwrite: bool = False) -> int:
    """Quantise every linear layer except the output layer; the result loads with ``AutoModelForCausalLM``.

    Args:
        model: Hugging Face folder or hub name.
        out: folder to write.
        config: settings of the quantisation.
        overwrite: whether ``out`` may be replaced.

    Returns:
        Size of the written weights in bytes.

    Raises:
        UserError: llm-compressor is not installed, the groups do not fit, the samples can't be read, ``out`` exists.
    """
    _require_library()
    refuse_existing(Path(out), overwrite)
    folder = find_folder(model)
    refuse_replacing(out, [folder.path, *filter(None, [config.data.path])])
    source = read_config(folder)
    _check(source, config)
    samples = calibration_samples(config.data, load_tokenizer(folder))
    limit = longest_input(source)
    if limit is not None and samples.shape[1] > limit:
        raise UserError(f"samples of {samples.shape[1]} tokens are too long: the model takes {limit}")
    loaded = load_any_model(folder, dtype=config.dtype or _sixteen_bits(source))
    log.info("quantising %s to %d bits by %d samples of %d tokens", model, BITS, *samples.shape)
    with output_folder(out, overwrite) as written:
        _compress(loaded, samples, config)
        log.info("writing the quantised weights")
        _save(loaded, folder.path, written)
        record(written)
        return sum(file.stat().st_size for file in written.glob("*.safetensors"))


def _require_library() -> None:
    """Check that llm-compressor is installed, and disable its messages.

    Raises:
        UserError: it is not installed.
    """
    try:
        import compressed_tensors  # noqa: F401
        import datasets  # noqa: F401
        import llmcompressor  # noqa: F401
        from loguru import logger
    except ImportError:
        raise UserError("the package llmcompressor is not installed: pip install -e '.[quantize]'") from None
    logger.disable("llmcompressor")


def _compress(loaded: PreTrainedModel, samples: Tensor, config: QuantizeConfig) -> None:
    """Quantise a model's weights in place, with samples of shape [samples, length]."""
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.quantization import GPTQModifier

    last = loaded.get_output_embeddings()
    output = [name for name, module in loaded.named_modules() if module is last]
    weights = QuantizationArgs(
        num_bits=BITS,
        type="int",
        symmetric=True,
        strategy="group",
        group_size=config.group_size,
        actorder="group" if config.activation_order else None,
        observer="minmax",
    )
    with _progress_shown():
        oneshot(
            model=loaded,
            dataset=Dataset.from_dict(
                {"input_ids": samples.tolist(), "attention_mask": torch.ones_like(samples).tolist()}
            ),
            recipe=GPTQModifier(
                config_groups={"weights": QuantizationScheme(targets=["Linear"], weights=weights)},
                ignore=[*output, "re:.*[.]gate$"],  # the output layer, and the routers of mixtures of experts
                dampening_frac=DAMPENING,
            ),
            max_seq_length=samples.shape[1],
            num_calibration_samples=len(samples),
            pipeline="sequential",
        )


@contextmanager
def _progress_shown() -> Iterator[None]:
    """Show one progress of all blocks in the place of llm-compressor's two bars for each block."""
    from llmcompressor.pipelines.sequential import pipeline

    progress = Progress(desc="quantising", unit="samples in blocks")

    def counted(items: Sequence[int], desc: str) -> Iterator[int]:
        if found := re.match(r"\(\d+/(\d+)\)", desc):  # "(3/31): Calibrating"
            progress.total = 2 * int(found[1]) * len(items)
        for item in items:
            yield item
            progress.update()

    before, pipeline.tqdm = pipeline.tqdm, counted
    try:
        with progress:
            yield
    finally:
        pipeline.tqdm = before


def _save(loaded: PreTrainedModel, source: Path, folder: Path) -> None:
    """Write a quantised model, and copy the other files of its source's folder."""
    loaded.generation_config = GenerationConfig()  # Transformers would refuse to save many; the file is copied
    loaded.save_pretrained(folder, save_compressed=True)
    (folder / GENERATION).unlink(missing_ok=True)
    copy_companions(source, folder)
    if (source / "llmprune").is_dir():
        shutil.copytree(source / "llmprune", folder / "llmprune")
    for file in folder.glob("*.safetensors"):  # the library makes them readable by the owner only
        make_readable(file)


def _sixteen_bits(source: PretrainedConfig) -> torch.dtype:
    """The 16-bit dtype that a model is stored in; bfloat16 if it is stored in another dtype."""
    return source.dtype if source.dtype in (torch.float16, torch.bfloat16) else torch.bfloat16


def _check(source: PretrainedConfig, config: QuantizeConfig) -> None:
    """Check by its config alone whether a model can be quantised in groups of this size; no weights are read.

    Raises:
        UserError: it is quantised already, has no linear layers or has its own code, or the groups do not fit its rows.
    """
    if getattr(source, "quantization_config", None) is not None:
        raise UserError("the model is quantised already")
    if needs_code(source):
        raise UserError(
            "the model has a modelling file of its own, which llm-compressor can't trace: quantise the model without "
            "richer heads or replacement module"
        )
    if config.group_size < 1:
        raise UserError(f"the group size is {config.group_size}; it must be positive")
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(source, trust_remote_code=False)
    output = model.get_output_embeddings()
    rows = {m.in_features for m in model.modules() if isinstance(m, nn.Linear) and m is not output}
    if not rows:
        raise UserError(f"the model ({source.model_type}) has no linear layers that could be quantised")
    if any(length % config.group_size for length in rows):
        fitting = math.gcd(*rows, config.group_size)
        raise UserError(
            f"groups of {config.group_size} do not fit rows of {', '.join(map(str, sorted(rows)))} weights: choose a "
            f"group size that divides them all, such as {fitting}"
        )
