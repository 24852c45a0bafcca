"""Fixtures that several test files share; what they build stands in `tests/tiny.py`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

# Read by the tokenizers library at its first use, before any loader forks.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

torch.set_num_threads(1)  # test processes share the cores; more threads each are far slower


@pytest.fixture(scope="session")
def tiny_mllm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tiny Qwen2.5-VL in Hugging Face format. Read only."""
    from tests.tiny import tiny_mllm_folder

    return tiny_mllm_folder(tmp_path_factory.mktemp("mllm") / "qwen2_5_vl", "qwen2_5_vl")


@pytest.fixture(scope="session")
def tiny_llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tiny LLaVA in Hugging Face format. Read only."""
    from tests.tiny import tiny_mllm_folder

    return tiny_mllm_folder(tmp_path_factory.mktemp("mllm") / "llava", "llava")


@pytest.fixture(scope="session", params=["qwen2_5_vl", "llava"])
def mllm_folder(request: Any) -> Path:
    """One family's folder after the other."""
    folder: Path = request.getfixturevalue(
        {"qwen2_5_vl": "tiny_mllm", "llava": "tiny_llava"}[request.param]
    )
    return folder


@pytest.fixture(scope="session")
def tiny_records(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Record folder of eight images with masks and questions, split "train". Read only."""
    from tests.tiny import tiny_record_folder

    return tiny_record_folder(tmp_path_factory.mktemp("records") / "train")
