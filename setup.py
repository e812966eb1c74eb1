"""Installation of llmprune.

The pins are the versions that the tests run with. mosaicml 0.32.1 is the newest and decides torch (< 2.7.1).
"""

from setuptools import find_packages, setup

setup(
    name="llmprune",
    version="0.1.0",
    description="Prune large language models and train them back, on Composer",
    python_requires=">=3.11,<3.13",
    package_data={"llmprune.report": ["templates/*.html"]},
    packages=find_packages(include=["llmprune*", "data_prep*"]),
    install_requires=[
        "mosaicml[tensorboard]==0.32.1",
        "mosaicml-streaming==0.13.0",
        "torch==2.7.0",
        "transformers==4.57.3",
        "tokenizers==0.22.2",
        "huggingface_hub==0.36.2",
        "safetensors==0.8.0",
        "omegaconf==2.4.0",
        "lion-pytorch==0.2.5",
        "catalogue==2.0.10",
        "matplotlib==3.11.2",
        "psutil==7.2.2",
        "lm-eval[hf]==0.4.13",
        "datasets==4.4.1",
        "pyarrow==26.0.1",
        "filelock==4.2.11",
        "accelerate==1.12.0",
        "peft==0.18.0",
        "bitsandbytes==0.48.2",
        "sacrebleu==2.6.0",
        "rouge-score==0.1.2",
        "scipy==1.15.3",
        "rapidfuzz==3.14.6",
        "chardet<6",  # what requests accepts
        "jinja2==3.1.6",
        "nvidia-ml-py==13.590.44",
        "typer==0.29.1",
        "zstandard==0.25.0",
        "numpy==2.1.3",
    ],
    extras_require={
        "demo": ["gradio==6.17.3"],
        "quantize": ["llmcompressor==0.9.0"],
        "gpu": ["flash-attn==2.8.3"],
        "wandb": ["wandb==0.18.7"],
        "dev": [
            "pytest==9.2.0",
            "pytest-xdist==3.8.0",
            "hypothesis==6.168.5",
            "ruff==0.17.6",
            "mypy==2.4.1",
            "import-linter==2.11",
            "playwright==1.65.2",
            "moto[s3]==5.2.5",
            "flask==3.1.3",
            "flask-cors==6.0.5",
        ],
    },
    entry_points={"console_scripts": ["llmprune=llmprune.cli:main"]},
)
