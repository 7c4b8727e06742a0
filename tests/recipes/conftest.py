"""A corpus in AN4's layout that is made in a moment, and configurations composed as Hydra does."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf

CONF = Path(__file__).resolve().parents[2] / "recipes" / "conf"
TEXTS = ("YES", "NO", "GO ON", "STOP", "A B", "NINE")

SMALL_NETWORK = (
    "model.network.frame_stack=4",
    "model.network.frame_stride=4",
    "model.network.encoder_size=16",
    "model.network.embedding_size=8",
    "model.network.predictor_size=16",
    "model.network.joint_size=16",
)
"""Overrides that make any model of recipes/conf quick to train."""


@pytest.fixture(scope="session")
def small_an4(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder like AN4's: eight speakers of noise in training, two in test."""
    root = tmp_path_factory.mktemp("an4")
    random = np.random.default_rng(0)
    for split, speakers in (("train", 8), ("test", 2)):
        rows = []
        for speaker in (f"{split}{number}" for number in range(speakers)):
            (root / split / speaker).mkdir(parents=True)
            for number, text in enumerate(TEXTS[:3]):
                name = f"{speaker}-{number}"
                samples = random.normal(0, 0.1, 4000 + 800 * number)
                soundfile.write(root / split / speaker / f"{name}.flac", samples, 16000)
                rows.append(f"{name}\t{speaker}\t{text}\n")
        (root / f"{split}.tsv").write_text("".join(rows))
    return root


@pytest.fixture
def compose_config(tmp_path: Path) -> Callable[..., DictConfig]:
    """Compose a configuration with its run folder and cache in the test's folder."""

    def composed(name: str, *overrides: str) -> DictConfig:
        with initialize_config_dir(str(CONF), version_base="1.3"):
            config = compose(name, overrides=[f"run_dir={tmp_path / 'run'}", *overrides])
        OmegaConf.set_readonly(config, False)
        return config

    return composed
