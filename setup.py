"""Installation of llmprune.

The ranges say what it may work with; ``requirements/pinned.txt`` says what the tests run with. mosaicml 0.32.1 is the
newest and decides torch (< 2.7.1).
"""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent

setup(
    name="llmprune",
    version=re.search(r'__version__ = "(.+)"', (ROOT / "llmprune" / "__init__.py").read_text())[1],  # type: ignore[index]
    description="Prune large language models and train them back, on Composer",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11,<3.13",
    package_data={"llmprune": ["py.typed"], "llmprune.reporting": ["templates/*.html"]},
    packages=find_packages(include=["llmprune*", "data_prep*"]),
    install_requires=[
        "mosaicml[tensorboard]>=0.32.1,<0.33",
        "mosaicml-streaming>=0.13,<0.14",
        "torch>=2.7,<2.7.1",
        "transformers>=4.57.3,<5",
        "tokenizers>=0.22,<0.23",
        "huggingface_hub>=0.36,<1",
        "safetensors>=0.6",
        "omegaconf>=2.3",
        "lion-pytorch>=0.2",
        "catalogue>=2.0.10,<3",
        "docstring_parser>=0.16",
        "matplotlib>=3.9",
        "psutil>=5.9",
        "lm-eval[hf]>=0.4.9",
        "datasets>=4",
        "pyarrow>=18",
        "filelock>=3.16",
        "accelerate>=1.10",
        "peft>=0.17",
        "bitsandbytes>=0.48",
        "sacrebleu>=2.4",
        "rouge-score>=0.1.2",
        "scipy>=1.14",
        "tenacity>=8",
        "rapidfuzz>=3.9",
        "chardet<6",  # what requests accepts
        "jinja2>=3.1",
        "nvidia-ml-py>=12",
        "typer>=0.16",
        "zstandard>=0.23",
        "numpy>=2.1,<2.2",
        "gguf>=0.17",
    ],
    extras_require={
        "demo": ["gradio>=6"],
        "quantize": ["llmcompressor>=0.9,<0.10"],
        "gpu": ["flash-attn>=2.8"],
        "wandb": ["wandb>=0.18,<0.19"],
        "dev": [
            "pytest",
            "pytest-xdist",
            "hypothesis",
            "ruff",
            "mypy",
            "import-linter",
            "playwright",
            "moto[s3]",
            "flask",
            "flask-cors",
            "nbclient",
            "nbformat",
            "ipykernel",
        ],
    },
    entry_points={"console_scripts": ["llmprune=llmprune.cli:main"]},
)
