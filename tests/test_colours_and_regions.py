"""Colours and regions: matching colours, blending paintings, and masks that say where each goes."""

import pytest
import torch
from conftest import TINY, half_mask, paint, style_loss

import nst_helpers as nst


@pytest.fixture(scope="session")
def trio(pictures) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A photo and two paintings, 48 pixels long."""
    photo, one, other = (
        nst.shrink_to(pictures[name], 48) for name in ("chelsea", "starry_night", "stained_glass")
    )
    return photo, one, other


def grey(image: torch.Tensor) -> torch.Tensor:
    return image.mean(1, keepdim=True).expand(-1, 3, -1, -1)


def halves(photo: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A mask for the left half of ``photo``, and one for the right."""
    size = photo.shape[2:]
    return half_mask(size, left=True), half_mask(size, left=False)


def set_masks(masks, config=TINY, size=(64, 96)) -> nst.Regions | None:
    return nst.find_regions(size, masks, config, torch.device("cpu"))


# Colours ------------------------------------------------------------------------------------------


def covariance(image: torch.Tensor) -> torch.Tensor:
    return torch.cov(image[0].flatten(1), correction=0)


@pytest.mark.parametrize("photo", ["china", "chelsea"])
@pytest.mark.parametrize("painting", ["starry_night", "stained_glass"])
def test_the_match_has_the_targets_mean_and_covariance(pictures, photo, painting):
    target = pictures[photo]
    matched = nst.match_colors(pictures[painting], target)
    assert matched.shape == pictures[painting].shape
    assert matched.dtype == torch.float32
    torch.testing.assert_close(matched.mean((2, 3)), target.mean((2, 3)), atol=1e-4, rtol=0)
    torch.testing.assert_close(covariance(matched), covariance(target), atol=1e-4, rtol=0)


def test_a_picture_matched_to_itself_stays_as_it_is(pictures):
    photo = pictures["china"]
    torch.testing.assert_close(nst.match_colors(photo, photo), photo, atol=1e-4, rtol=0)


def test_a_single_channel_is_matched_too(pictures):
    photo, painting = (pictures[name][:, :1] for name in ("china", "starry_night"))
    matched = nst.match_colors(painting, photo)
    assert matched.mean().item() == pytest.approx(photo.mean().item(), abs=1e-4)
    assert matched.std().item() == pytest.approx(photo.std().item(), abs=1e-3)


def test_grey_pictures_have_a_singular_covariance_and_are_matched_all_the_same(pictures):
    photo = pictures["china"]
    grey_cat = grey(pictures["chelsea"])
    to_grey = nst.match_colors(photo, grey_cat)
    torch.testing.assert_close(covariance(to_grey), covariance(grey_cat), atol=1e-4, rtol=0)
    from_grey = nst.match_colors(grey_cat, photo)
    assert from_grey.isfinite().all()
    torch.testing.assert_close(from_grey.mean((2, 3)), photo.mean((2, 3)), atol=1e-4, rtol=0)


def test_the_noise_of_a_grey_scan_does_not_become_confetti(pictures):
    scan = grey(pictures["chelsea"])
    noise = torch.randn(scan.shape, generator=torch.Generator().manual_seed(0))
    clean = nst.match_colors(scan, pictures["china"])
    noisy = nst.match_colors(scan + 1e-4 * noise, pictures["china"])
    assert (noisy - clean).std() < 0.02


def test_luminance_is_how_bright_the_colours_are():
    patches = torch.eye(3).view(1, 3, 1, 3)  # red, green, blue
    luminance = nst.painted_channels(patches, "luminance")
    torch.testing.assert_close(luminance, torch.tensor([[[[0.299, 0.587, 0.114]]]]))
    for color in ("style", "content"):
        assert torch.equal(nst.painted_channels(patches, color), patches)


def test_the_photo_is_given_the_palette_of_its_painting(trio):
    photo, one, other = trio

    def distance(image, target):
        return (image.mean((2, 3)) - target.mean((2, 3))).norm()

    recolored = nst.recolor(photo, [one], [], TINY)
    assert distance(recolored, one) < distance(photo, one) / 4
    assert recolored.min() >= 0
    assert recolored.max() <= 1
    blended = nst.recolor(photo, [one, other], [], TINY)
    expected = (recolored + nst.recolor(photo, [other], [], TINY)) / 2
    torch.testing.assert_close(blended, expected)


def test_where_no_mask_is_white_the_photo_keeps_its_palette(trio):
    photo, one, other = trio
    left, right = halves(photo)
    middle = photo.shape[3] // 2
    in_one, in_other = (nst.recolor(photo, [style], [], TINY) for style in (one, other))
    recolored = nst.recolor(photo, [one], [left], TINY)
    torch.testing.assert_close(recolored[..., :middle], in_one[..., :middle])
    torch.testing.assert_close(recolored[..., middle:], photo[..., middle:])
    both = nst.recolor(photo, [one, other], [left, right], TINY)
    torch.testing.assert_close(both[..., middle:], in_other[..., middle:])
    # Where two masks overlap, each painting has its part.
    everywhere = torch.ones_like(left)
    overlapping = nst.recolor(photo, [one, other], [everywhere, everywhere], TINY)
    torch.testing.assert_close(overlapping, (in_one + in_other) / 2)


@pytest.mark.parametrize("color", ["content", "luminance"])
def test_colours_stay_nearer_to_the_photos_than_the_paintings_do(vgg, trio, color):
    photo, painting, _ = trio
    target = photo.mean((2, 3))
    far = paint(photo, painting, vgg, color="style", num_steps=8).mean((2, 3)) - target
    near = paint(photo, painting, vgg, color=color, num_steps=8).mean((2, 3)) - target
    assert near.norm() < far.norm() / 1.5


@pytest.mark.parametrize("color", ["style", "content", "luminance"])
def test_grey_photos_and_paintings_are_painted(vgg, trio, color):
    photo, painting, _ = trio
    for content, style in ((grey(photo), painting), (photo, grey(painting))):
        image = paint(content, style, vgg, color=color, num_steps=2)
        assert image.isfinite().all()
        assert image.std() > 0.05


# Several paintings --------------------------------------------------------------------------------


def test_a_blend_with_one_weight_alone_is_that_painting_exactly(vgg, trio):
    photo, one, other = trio
    alone = paint(photo, one, vgg, num_steps=3)
    for styles, blend in (([one, other], (1, 0)), ([one, other], (7, 0)), ([other, one], (0, 1))):
        image = paint(photo, styles, vgg, num_steps=3, style_blend=blend)
        assert torch.equal(image, alone)
    assert not torch.equal(paint(photo, [one, other], vgg, num_steps=3), alone)


def test_only_the_ratio_of_a_blend_counts(vgg, trio):
    photo, *styles = trio
    equal = paint(photo, styles, vgg, num_steps=3, style_blend="equal")
    for blend in ((0.5, 0.5), (2.0, 2.0)):
        assert torch.equal(paint(photo, styles, vgg, num_steps=3, style_blend=blend), equal)


@pytest.mark.slow
def test_a_blend_lies_between_its_paintings(vgg, trio):
    photo, one, other = trio
    losses = []
    for blend in ((1, 0), (1, 1), (0, 1)):
        image = paint(photo, [one, other], vgg, style_blend=blend, num_steps=25)
        losses.append(style_loss(image, one, vgg))
    assert losses == sorted(losses)


def test_a_blend_costs_no_more_a_step(monkeypatch, vgg, trio):
    photo, *styles = trio
    looks_at_canvas = []
    forward = nst.VGG19Features.forward

    def count(self, image, *args, **kwargs):
        looks_at_canvas.append(image.requires_grad)
        return forward(self, image, *args, **kwargs)

    monkeypatch.setattr(nst.VGG19Features, "forward", count)
    paint(photo, styles, vgg, num_steps=3)
    assert sum(looks_at_canvas) == 3


# Regions ------------------------------------------------------------------------------------------


def test_a_mask_of_ones_is_no_mask_exactly(vgg, trio):
    photo, painting, _ = trio
    plain = paint(photo, painting, vgg, num_steps=3)
    for size in (photo.shape[2:], (40, 60)):
        image = paint(photo, painting, vgg, num_steps=3, masks=[torch.ones(1, 3, *size)])
        torch.testing.assert_close(image, plain, atol=2e-3, rtol=0)


def test_without_masks_there_are_no_regions():
    assert set_masks([]) is None


def test_guides_have_the_size_of_their_layer_and_a_mean_square_of_one():
    masks = [half_mask((64, 96)), torch.rand(1, 3, 30, 40)]
    regions = set_masks(masks)
    assert set(regions.guides) == set(TINY.style_layers)
    for layer, guide in regions.guides.items():
        stride = nst.stride_of(layer)
        height, width = (side + 2 * nst.MARGIN for side in (64, 96))
        assert guide.shape == (2, 1, height // stride, width // stride)
        torch.testing.assert_close(guide.square().mean((1, 2, 3)), torch.ones(2))


def test_a_region_counts_by_its_weight_times_its_area():
    def shares(masks, blend="equal"):
        config = nst.StyleTransferConfig(style_blend=blend)
        return set_masks(masks, config).shares

    left, right = halves(torch.zeros(1, 3, 64, 96))
    stripes = torch.cat([half_mask((64, 48))] * 2, 3)
    assert shares([left, stripes]) == pytest.approx([0.5, 0.5], rel=0.1)  # the margin adds a little
    assert shares([left, stripes], (3, 1)) == pytest.approx([0.75, 0.25], rel=0.1)
    assert shares([torch.ones_like(left)]) == pytest.approx([1])
    third = torch.zeros_like(left)
    third[..., 64:] = 1
    assert shares([third, 1 - third]) == pytest.approx([1 / 3, 2 / 3], rel=0.1)
    assert shares([left, right], (1, 0)) == pytest.approx([0.5, 0], rel=0.1)  # not what it covers


def test_a_mask_is_the_mean_of_its_channels():
    red = torch.zeros(1, 3, 64, 96)
    red[:, 0] = 1
    in_red = set_masks([red])
    in_grey = set_masks([torch.full_like(red, 1 / 3)])
    assert in_red.shares == pytest.approx(in_grey.shares)


@pytest.mark.slow
def test_each_painting_goes_where_its_mask_is_white(vgg, pictures):
    photo, one, other = (pictures[name] for name in ("chelsea", "starry_night", "stained_glass"))
    photo = nst.shrink_to(photo, 96)
    image = paint(photo, [one, other], vgg, masks=halves(photo), num_steps=30)
    middle = image.shape[3] // 2
    left, right = image[..., :middle], image[..., middle:]
    assert style_loss(left, one, vgg) < style_loss(right, one, vgg) / 1.3
    assert style_loss(right, other, vgg) < style_loss(left, other, vgg) / 1.3


def test_the_order_of_paintings_with_their_masks_does_not_matter(vgg, trio):
    photo, one, other = trio
    left, right = halves(photo)
    image = paint(photo, [one, other], vgg, masks=[left, right], num_steps=2)
    swapped = paint(photo, [other, one], vgg, masks=[right, left], num_steps=2)
    crossed = paint(photo, [other, one], vgg, masks=[left, right], num_steps=2)
    assert (image - swapped).abs().mean() < 1e-3
    assert (image - crossed).abs().mean() > 3e-3


@pytest.mark.slow
def test_what_no_mask_covers_keeps_more_of_the_photo(vgg, pictures):
    photo = nst.shrink_to(pictures["china"], 96)
    image = paint(photo, pictures["starry_night"], vgg, masks=[halves(photo)[0]], num_steps=30)
    change = (image - photo).abs().mean((0, 1, 2))
    middle = photo.shape[3] // 2
    assert change[middle + 16 :].mean() < 0.75 * change[: middle - 16].mean()


def test_soft_edges_count_partly(vgg, trio):
    photo, one, other = trio
    ramp = torch.linspace(0, 1, photo.shape[3]).expand_as(photo)
    image = paint(photo, [one, other], vgg, masks=[1 - ramp, ramp], num_steps=2)
    assert image.isfinite().all()
    hard = paint(photo, [one, other], vgg, masks=halves(photo), num_steps=2)
    assert not torch.equal(image, hard)
    guide = set_masks([ramp], size=photo.shape[2:]).guides["relu1_1"][0, 0, 10]
    assert guide[10] < guide[25] < guide[40]


@pytest.mark.parametrize("settings", [{}, {"content_layers": ("relu2_1",)}])
def test_regions_go_with_checkpoints_and_with_a_layer_for_both(monkeypatch, vgg, trio, settings):
    monkeypatch.setattr(nst, "STRIP_ROWS", 16)
    photo, *styles = trio
    settings = {"masks": halves(photo), "num_steps": 2, **settings}
    in_strips = paint(photo, styles, vgg, **settings, checkpoint=True)
    plain = paint(photo, styles, vgg, **settings, checkpoint=False)
    assert (in_strips - plain).abs().mean() < 1e-3


@pytest.mark.parametrize("color", ["content", "luminance"])
def test_regions_go_with_the_photos_colours(vgg, trio, color):
    photo, *styles = trio
    masks = halves(photo)
    image = paint(photo, styles, vgg, masks=masks, color=color, num_steps=2)
    assert image.shape == photo.shape
    assert not torch.equal(image, paint(photo, styles, vgg, color=color, num_steps=2))
