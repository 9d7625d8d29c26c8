"""Package metadata. The folder ``kernels/`` is installed as ``uctrans.kernels``."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent

PACKAGE_SOURCE = (ROOT / "uctrans/__init__.py").read_text(encoding="utf-8")
VERSION = re.search(r'^__version__ = "(.+)"$', PACKAGE_SOURCE, re.MULTILINE)[1]

# find_packages walks the two real trees; the link uctrans/kernels exists for plain checkouts and editors only.
PACKAGES = [name for name in find_packages(include=["uctrans", "uctrans.*"]) if not name.startswith("uctrans.kernels")]
KERNEL_PACKAGES = [f"uctrans.{name}" for name in find_packages(include=["kernels", "kernels.*"])]

TRAINING = ["monai>=1.4", "jsonargparse[signatures]>=4.35", "PyYAML", "tqdm", "tensorboard", "matplotlib", "defusedxml"]
HUB = ["huggingface_hub>=0.24"]
EXPORT = ["onnx", "onnxscript", "onnxruntime"]
BENCHMARK = ["pytest", "pytest-benchmark"]
# PyTorch's builds for CUDA bring the Triton they work with, and no other; on a CPU only tests run the kernels.
INTERPRETER = ["triton>=3.6; platform_system == 'Linux'"]
DEV = ["pytest", "pytest-xdist", "hypothesis", "ruff", "pre-commit", "build", *INTERPRETER]

setup(
    name="uctrans",
    version=VERSION,
    description="UCTransNet for medical image segmentation, over fused channel-attention operators",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    project_urls={"Paper": "https://arxiv.org/abs/2109.04335"},
    python_requires=">=3.11",
    packages=PACKAGES + KERNEL_PACKAGES,
    package_dir={"uctrans": "uctrans", "uctrans.kernels": "kernels"},
    package_data={
        "uctrans": ["py.typed"],  # also for uctrans.kernels
        "uctrans.data": ["folds/*.json"],
        "uctrans.models": ["pretrained/*/*"],
    },
    install_requires=[
        "torch>=2.11",
        "numpy",
        "einops",
        "safetensors",
        "scikit-image",
    ],
    extras_require={
        "training": TRAINING,
        "hub": HUB,
        "export": EXPORT,
        "benchmark": BENCHMARK,
        "dev": DEV + BENCHMARK + TRAINING + HUB + EXPORT,
    },
    entry_points={"console_scripts": ["uctrans = uctrans.cli:main"]},
    classifiers=[
        "Programming Language :: Python :: 3 :: Only",
        "Topic :: Scientific/Engineering :: Image Processing",
        "Intended Audience :: Science/Research",
    ],
)
