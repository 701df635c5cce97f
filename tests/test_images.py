"""Images: resizing, padding, and matching colours."""

import pytest
import torch

import nst_helpers as nst

# The eight corners of the cube of colours, (1, 3, 2, 4): their covariance is ¼ of the identity.
CORNERS = torch.cartesian_prod(*[torch.tensor([0.0, 1.0])] * 3).T.reshape(1, 3, 2, 4)


def ramp(height: int, width: int) -> torch.Tensor:
    """(1, 1, H, W): from 0 at the left edge of the image to 1 at its right edge."""
    return ((torch.arange(width) + 0.5) / width).expand(1, 1, height, width)


# Sizes --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(12, 20), (37, 53), (60, 100), (20, 80)])
def test_a_resized_ramp_is_a_ramp(size):
    resized = nst.resize(ramp(30, 50), size)
    inside = slice(size[1] // 6, -size[1] // 6)  # the ends of a ramp are rounded
    torch.testing.assert_close(resized[..., inside], ramp(*size)[..., inside], atol=1e-3, rtol=0)


def test_an_image_is_resized_bicubically_and_stays_in_its_range():
    edge = (torch.arange(16) > 7).float().expand(1, 3, 16, 16)
    grey_edge = nst.resize(edge / 2 + 0.25, (16, 64))
    assert grey_edge.min() < 0.24  # bicubic: it overshoots at an edge
    resized = nst.resize(edge, (16, 64))
    assert (resized.min(), resized.max()) == (0, 1)


def test_fine_patterns_turn_grey_when_shrunk():
    checkerboard = (torch.arange(24)[:, None] + torch.arange(24)).remainder(2).float()
    shrunk = nst.resize(checkerboard.expand(1, 3, 24, 24), (10, 10))
    assert shrunk.std() < 0.1


@pytest.mark.parametrize(
    ("size", "long_side", "expected"),
    [
        ((60, 40), 30, (30, 20)),
        ((40, 61), 30, (20, 30)),
        ((60, 40), 100, (60, 40)),
        ((32, 400), 100, (16, 200)),  # at least 16 high
        ((16, 400), 100, (16, 400)),
    ],
)
def test_shrinking_keeps_the_shape_and_16_pixels(size, long_side, expected):
    assert nst.shrink_to(torch.zeros(1, 3, *size), long_side).shape == (1, 3, *expected)


def test_an_image_is_blurred_only_before_it_is_enlarged():
    dot = torch.zeros(1, 3, 9, 9)
    dot[..., 4, 4] = 1
    same, small, soft = (nst._enlarge_softly(dot, (side, side)) for side in (9, 6, 27))
    assert same is dot
    assert torch.equal(small, nst.resize(dot, (6, 6)))
    assert 0.1 < soft.max() < nst.resize(dot, (27, 27)).max() / 2
    # Direct neighbours count half as much as the pixel itself: (½, 1, ½) / 2.
    assert soft[..., 13, 13].mean().item() == pytest.approx(1 / 4, abs=0.02)


# Colours ------------------------------------------------------------------------------------------


def test_colors_are_matched_by_the_symmetric_roots():
    """Other roots would give the same covariance and turn the colours as well."""
    matrix = torch.tensor([[0.5, 0.2, 0.1], [0.2, 0.4, -0.1], [0.1, -0.1, 0.3]])
    image = 0.4 + torch.einsum("ij,bjhw->bihw", matrix, CORNERS - 0.5)
    target = 0.5 + torch.einsum("ij,bjhw->bihw", matrix.flip(0, 1), CORNERS - 0.5)
    torch.testing.assert_close(nst.match_colors(image, target), target)


def test_one_channel_is_shifted_and_stretched():
    image, target = torch.tensor([[[[0.2, 0.4]]]]), torch.tensor([[[[0.3, 0.9, 0.6]]]])
    expected = (image - 0.3) / image.std(correction=0) * target.std(correction=0) + 0.6
    torch.testing.assert_close(nst.match_colors(image, target), expected)


def test_the_noise_of_a_grey_scan_does_not_turn_into_colors(pictures):
    scan = pictures["chelsea"].mean(1, keepdim=True).expand(-1, 3, -1, -1)
    noise = torch.randn(scan.shape, generator=torch.Generator().manual_seed(0))
    clean = nst.match_colors(scan, pictures["china"])
    noisy = nst.match_colors(scan + 1e-4 * noise, pictures["china"])
    assert (noisy - clean).std() < 0.02
