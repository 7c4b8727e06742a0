from __future__ import annotations

import pytest
import torch

from lightning_nna.quantization.mracos import mracos, mracos_gradient

CENTROIDS = torch.tensor([-1.0, -0.4, 0.0, 0.1, 1.5], dtype=torch.float64)


def weights() -> torch.Tensor:
    return torch.linspace(-2, 2, 4001, dtype=torch.float64) + 1e-5


@pytest.mark.parametrize("scaled", [True, False])
def test_the_gradient_is_that_of_the_penalty(scaled: bool) -> None:
    w = weights().requires_grad_()
    (expected,) = torch.autograd.grad(mracos(w, CENTROIDS, scaled=scaled).sum(), w)
    found = mracos_gradient(w.detach(), CENTROIDS, scaled=scaled)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("scaled", [True, False])
@pytest.mark.parametrize("centroids", [CENTROIDS, torch.tensor([-1.0, 0.0, 3.0])], ids=str)
def test_what_is_not_a_number_stays_so(centroids: torch.Tensor, scaled: bool) -> None:
    w = torch.tensor([0.2, torch.nan, torch.inf, -torch.inf], dtype=centroids.dtype)
    found = mracos_gradient(w, centroids, scaled=scaled)
    assert found.isnan().tolist() == [False, True, False, False]
    assert found[2:].tolist() == pytest.approx([1.0, -1.0], abs=1e-6)
    assert mracos(w, centroids, scaled=scaled).isnan().tolist() == [False, True, False, False]


@pytest.mark.parametrize("scaled", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "levels", [[-127, -126, -3, 0, 5, 127], [2, 3], [-1, 0, 1, 40], [-9, -4, -2]], ids=str
)
def test_on_whole_numbers_the_table_gives_the_same(
    levels: list[int], dtype: torch.dtype, scaled: bool
) -> None:
    whole = torch.tensor(levels, dtype=dtype)
    w = torch.linspace(-140, 140, 30011, dtype=dtype)
    w = torch.cat([w, whole, torch.arange(-140.0, 141.0, dtype=dtype)]).requires_grad_()
    (expected,) = torch.autograd.grad(mracos(w, whole, scaled=scaled).sum(), w)
    found = mracos_gradient(w.detach(), whole, scaled=scaled)
    at_centroid = torch.isin(w.detach(), whole)
    assert not found[at_centroid].any()
    # At 127 a float32 has steps of 8e-6, and the phase pi times that.
    torch.testing.assert_close(found[~at_centroid], expected[~at_centroid], rtol=1e-4, atol=2e-4)


@pytest.mark.parametrize("scaled", [True, False])
def test_nothing_pulls_at_a_centroid(scaled: bool) -> None:
    assert not mracos(CENTROIDS, CENTROIDS, scaled=scaled).abs().gt(1e-12).any()
    assert not mracos_gradient(CENTROIDS, CENTROIDS, scaled=scaled).any()


def test_every_arch_pulls_alike_at_its_ends_or_is_one_high() -> None:
    beside = torch.cat([CENTROIDS[:-1] + 1e-9, CENTROIDS[1:] - 1e-9])
    slopes = mracos_gradient(beside, CENTROIDS)
    expected = torch.cat([torch.ones(4), -torch.ones(4)]).double()
    torch.testing.assert_close(slopes, expected)
    tops = (CENTROIDS[1:] + CENTROIDS[:-1]) / 2
    torch.testing.assert_close(
        mracos(tops, CENTROIDS, scaled=False), torch.ones(4, dtype=torch.float64)
    )


def test_outside_it_grows_with_the_distance() -> None:
    w = torch.tensor([-3.0, 2.0], dtype=torch.float64)
    assert mracos(w, CENTROIDS).tolist() == [2.0, 0.5]
    assert mracos_gradient(w, CENTROIDS).tolist() == [-1.0, 1.0]


def test_equal_centroids_count_once() -> None:
    twice = CENTROIDS.repeat_interleave(2)
    assert torch.equal(mracos(weights(), twice), mracos(weights(), CENTROIDS))
    alone = torch.tensor([0.5, 0.5], dtype=torch.float64)
    assert torch.equal(mracos(weights(), alone), (weights() - 0.5).abs())
    assert torch.equal(mracos_gradient(weights(), alone), torch.sgn(weights() - 0.5))


@pytest.mark.parametrize(
    ("centroids", "message"),
    [(torch.tensor([1.0, 0.0]), "ascending"), (torch.zeros(0), "an entry")],
)
def test_centroids_that_are_none(centroids: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        mracos(torch.zeros(2), centroids)


@pytest.mark.parametrize("scaled", [True, False])
def test_channels_are_as_each_by_itself(scaled: bool) -> None:
    """Those with fewer values, too, which have one of them several times."""
    twice = torch.tensor([-2.0, -2.0, 0.3, 0.3, 0.3], dtype=torch.float64)
    alone = torch.full((5,), 0.5, dtype=torch.float64)
    centroids = torch.stack([CENTROIDS, twice, alone, 3 * CENTROIDS])
    w = torch.linspace(-5, 5, 4008, dtype=torch.float64).reshape(-1, 4).T.reshape(8, -1)
    rows = w.reshape(4, -1).clone()
    rows[:, :5] = centroids
    for function in (mracos, mracos_gradient):
        expected = [
            function(r, z.unique(), scaled=scaled) for r, z in zip(rows, centroids, strict=True)
        ]
        found = function(rows.reshape(w.shape), centroids, scaled=scaled)
        assert torch.equal(found.reshape(4, -1), torch.stack(expected))
    rows.requires_grad_()
    (expected,) = torch.autograd.grad(mracos(rows, centroids, scaled=scaled).sum(), rows)
    found = mracos_gradient(rows.detach(), centroids, scaled=scaled)
    torch.testing.assert_close(found[:, 5:], expected[:, 5:], rtol=1e-9, atol=1e-9)
    assert not found[:, :5].any()
