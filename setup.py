"""Package metadata. `constraints.txt` pins the tested set; the ranges here say what may work."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION = re.search(  # read, not imported: an isolated build has none of the dependencies
    r'^__version__ = "(.+)"$', (ROOT / "biascare" / "version.py").read_text(), re.MULTILINE
)
assert VERSION, "biascare/version.py holds no __version__ line"
README = ROOT / "README.md"

# What nothing here imports stands here only where something that we import loads it; the comment
# beside it says what.
REQUIRES = [
    # training
    "torch>=2.6",
    "torchvision>=0.21",  # image processors of transformers and segment-anything load it
    "deepspeed>=0.17",
    "transformers>=5.0",
    "peft>=0.18",
    "accelerate>=1.0",  # peft loads it at every start
    "safetensors>=0.4.3",
    "ninja",  # DeepSpeed compiles its communication op at first use
    # models and data
    "segment-anything>=1.0",
    "datasets>=4.0",
    "pycocotools>=2.0.8",
    "pillow>=10.1",
    "numpy>=1.26",
    "scipy>=1.11",
    # configuration and what a person sees
    "pydantic>=2.10",
    "PyYAML>=6.0",
    "rich>=13.7",
    "tensorboard>=2.16",
    "matplotlib>=3.8",
    "Jinja2>=3.1",
    "MarkupSafe>=2.1",
    # scores
    "scikit-learn>=1.5",
    "sacrebleu>=2.4",
    "rouge-score>=0.1.2",
]

# The click page and its server.
UI = [
    "fastapi>=0.115",
    "uvicorn>=0.30",
    "python-multipart>=0.0.20",  # FastAPI reads uploads with it
]

EXTRAS = {
    "medical": ["pydicom>=3.0", "nibabel>=5.2"],
    "cluster": ["ray>=2.40"],
    "ui": UI,
    "dev": [
        *UI,
        "httpx2>=2.0",  # FastAPI's own client for tests loads it
        "pydicom>=3.0",
        "nibabel>=5.2",
        "psutil>=6.0",
        # second implementations that scores are compared with
        "fairlearn>=0.12",
        "monai>=1.4",
        "pytest>=8.3",
        "pytest-timeout>=2.3",
        "pytest-xdist>=3.6",
        "hypothesis>=6.100",
        "ruff>=0.12",
        "mypy>=1.15",
        "types-PyYAML",
        "pre-commit>=4.0",
    ],
}

setup(
    name="biascare",
    version=VERSION.group(1),
    description="Bias-aware training of a multimodal medical foundation model (BiasCareVL)",
    long_description=README.read_text(encoding="utf-8") if README.exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE*"],
    python_requires=">=3.10",
    packages=find_packages(include=["biascare", "biascare.*", "data_prep", "data_prep.*"]),
    package_data={"biascare": ["py.typed", "reports/*.jinja", "server/page/*"]},
    install_requires=REQUIRES,
    extras_require=EXTRAS,
    classifiers=[
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Medical Science Apps.",
    ],
)
