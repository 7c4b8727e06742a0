"""The pictures of pages on methods: their script draws them all, and the pages show them all."""

from __future__ import annotations

import re
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch

from docs.figures import draw
from tests.conftest import ROOT

FOLDER = ROOT / "docs" / "figures"


@pytest.mark.slow
def test_the_script_writes_every_stored_picture(tmp_path: Path) -> None:
    written = draw.draw(tmp_path)
    stored = sorted(FOLDER.glob("*.svg"))
    assert sorted(path.name for path in written) == [path.name for path in stored]
    for path in [*written, *stored]:
        picture = ElementTree.parse(path).getroot()
        assert picture.tag == "{http://www.w3.org/2000/svg}svg"
        assert len(list(picture.iter("{http://www.w3.org/2000/svg}path"))) > 20
        assert path.stat().st_size < 200_000


def test_pages_show_every_picture_for_light_and_dark() -> None:
    pages = "".join(path.read_text("utf-8") for path in (ROOT / "docs/methods").glob("*.md"))
    shown = re.findall(r"\]\(\.\./figures/(\w+_(light|dark)\.svg)#only-\2\)", pages)
    assert sorted(name for name, _ in shown) == sorted(path.name for path in FOLDER.glob("*.svg"))


def test_the_emulated_layer_is_clipped_and_its_gradient_is_straight_through() -> None:
    run = draw.emulated_layer()
    inside, outside = run.rescaled.flatten().tolist()
    assert inside < 127 < outside
    assert run.q_y.flatten().tolist() == [inside, 127]
    assert bool((run.gradients[0] != 0).all())
    assert torch.equal(run.gradients[1], torch.zeros(4))


def test_a_mask_has_its_fraction_of_zeros_and_weights_return() -> None:
    masks = draw.mask_run()
    assert (~masks[-1]).float().mean().item() == pytest.approx(0.8, abs=0.01)
    assert bool((masks[1:] & ~masks[:-1]).any())
    frozen = masks[int(0.75 * len(masks)) :]
    assert bool((frozen == frozen[-1]).all())


def test_weights_end_at_their_centroids() -> None:
    centroids, weights, hard = draw.codebook_run()
    distances = (weights[:, :, None] - centroids[:, None]).abs().amin(-1)
    assert distances[0].max() > 0.01
    assert distances[int(hard) + 1 :].max() < 1e-6


def test_the_drift_is_after_the_step_alone() -> None:
    drifts = [epoch for epoch, reading in enumerate(draw.drift_run()) if reading.drift]
    assert drifts
    assert 70 <= drifts[0] <= 75
