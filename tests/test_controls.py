"""The artist's controls: colour, several styles, regions, brush size, start, optimiser, sweeps, timelapse, alpha."""

import io
import warnings
from dataclasses import replace

import matplotlib.pyplot as plt
import pytest
import torch
from PIL import Image

import nst_helpers as nst

CONFIG = nst.StyleTransferConfig(weights="bundled", precision="float32", max_size=128, num_steps=8, scales=2)
PAIRS = [(photo, painting) for photo in ("china", "chelsea") for painting in ("starry_night", "stained_glass")]


def paint(content, style, vgg, **settings):
    for step in nst.stylize(content, style, replace(CONFIG, **settings), vgg):
        image = step.image
    return image


def half_mask(size, left: bool) -> torch.Tensor:
    mask = torch.zeros(1, 3, *size)
    middle = size[1] // 2
    mask[..., slice(None, middle) if left else slice(middle, None)] = 1
    return mask


def style_loss(image, style, vgg):
    grams = vgg(style, nst.STYLE_LAYERS, grams=nst.STYLE_LAYERS)
    return nst.calculate_style_loss(vgg(image), grams, CONFIG.style_layer_weights).item()


# Colour -----------------------------------------------------------------------------------------


def covariance(image):
    return torch.cov(image[0].flatten(1), correction=0)


@pytest.mark.parametrize(("photo", "painting"), PAIRS)
def test_the_linear_match_has_the_targets_mean_and_covariance(pictures, photo, painting):
    matched = nst.match_colors(pictures[painting], pictures[photo])
    torch.testing.assert_close(matched.mean((2, 3)), pictures[photo].mean((2, 3)), atol=1e-4, rtol=0)
    torch.testing.assert_close(covariance(matched), covariance(pictures[photo]), atol=1e-4, rtol=0)


def test_grey_pictures_have_a_singular_covariance_and_are_matched_all_the_same(pictures):
    photo, grey = pictures["china"], pictures["chelsea"].mean(1, keepdim=True).expand(-1, 3, -1, -1)
    to_grey, from_grey = nst.match_colors(photo, grey), nst.match_colors(grey, photo)
    torch.testing.assert_close(covariance(to_grey), covariance(grey), atol=1e-4, rtol=0)
    assert from_grey.isfinite().all()
    torch.testing.assert_close(from_grey.mean((2, 3)), photo.mean((2, 3)), atol=1e-4, rtol=0)
    tinted = grey + 1e-4 * torch.randn(grey.shape)  # a scan's noise must not become confetti
    assert (nst.match_colors(tinted, photo) - from_grey).std() < 0.02


def chroma(image):
    weights = torch.tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)
    return image - (image * weights).sum(1, keepdim=True)


def test_luminance_is_how_bright_the_colours_are():
    patches = torch.eye(3).view(1, 3, 1, 3)  # red, green, blue
    seen = nst._in_color(patches, replace(CONFIG, color="luminance"))
    torch.testing.assert_close(seen.flatten(), torch.tensor([0.299, 0.587, 0.114]))


@pytest.mark.parametrize("photo", ["china", "chelsea"])
def test_luminance_leaves_the_chroma_untouched_and_paints_the_rest(vgg, pictures, photo):
    image = paint(pictures[photo], pictures["starry_night"], vgg, color="luminance")
    torch.testing.assert_close(chroma(image), chroma(pictures[photo]), atol=1e-6, rtol=0)
    assert 0 <= image.min() and image.max() <= 1
    assert (image - pictures[photo]).abs().mean() > 0.02


@pytest.mark.parametrize("color", ["content", "luminance"])
def test_colours_stay_nearer_to_the_photos_than_by_default(vgg, pictures, color):
    photo, painting = pictures["chelsea"], pictures["starry_night"]
    far, near = (
        (paint(photo, painting, vgg, color=name).mean((2, 3)) - photo.mean((2, 3))).norm() for name in ("style", color)
    )
    assert near < far / 2


@pytest.mark.parametrize("color", ["style", "content", "luminance"])
def test_grey_photos_and_paintings_are_painted(vgg, pictures, color):
    photo, painting = pictures["china"], pictures["starry_night"]
    grey_photo, grey_painting = (x.mean(1, keepdim=True).expand(-1, 3, -1, -1) for x in (photo, painting))
    for pair in ((grey_photo, painting), (photo, grey_painting), (grey_photo, grey_painting)):
        image = paint(*pair, vgg, color=color, num_steps=3)
        assert image.isfinite().all() and image.std() > 0.05


# Several styles ---------------------------------------------------------------------------------


def test_a_blend_with_one_weight_alone_is_that_style_exactly(vgg, pictures):
    photo, one, other = (pictures[name] for name in ("china", "starry_night", "stained_glass"))
    alone = paint(photo, one, vgg)
    for blend in ((1, 0), (7, 0)):
        assert torch.equal(paint(photo, [one, other], vgg, style_blend=blend), alone)
    assert torch.equal(paint(photo, [other, one], vgg, style_blend=(0, 1)), alone)
    assert not torch.equal(paint(photo, [one, other], vgg), alone)


def test_a_blend_lies_between_its_styles_and_only_the_ratio_counts(vgg, pictures):
    photo, one, other = (pictures[name] for name in ("china", "starry_night", "stained_glass"))
    losses = [
        style_loss(paint(photo, [one, other], vgg, style_blend=blend, num_steps=30), one, vgg)
        for blend in ((1, 0), (1, 1), (0, 1))
    ]
    assert losses == sorted(losses)
    halves = [paint(photo, [one, other], vgg, style_blend=x) for x in ("equal", (0.5, 0.5), (2.0, 2.0))]
    assert torch.equal(halves[0], halves[1]) and torch.equal(halves[0], halves[2])


def test_a_blend_costs_no_more_a_step(monkeypatch, vgg, pictures):
    looks, forward = [], nst.VGG19Features.forward

    def count(self, image, *args, **options):
        looks.append(image.requires_grad)
        return forward(self, image, *args, **options)

    monkeypatch.setattr(nst.VGG19Features, "forward", count)
    paint(pictures["china"], [pictures["starry_night"], pictures["stained_glass"]], vgg)
    assert sum(looks) == CONFIG.num_steps


# Regions ----------------------------------------------------------------------------------------


def test_a_mask_of_ones_is_no_mask_exactly(vgg, pictures):
    photo, painting = pictures["chelsea"], pictures["starry_night"]
    plain = paint(photo, painting, vgg)
    for size in (photo.shape[2:], (40, 60)):
        assert torch.equal(paint(photo, painting, vgg, masks=(torch.ones(1, 3, *size),)), plain)


def test_two_half_masks_confine_each_gram_matrix_to_its_half():
    features = torch.rand(1, 4, 6, 8, requires_grad=True)
    guide = torch.cat([half_mask((6, 8), left)[:, :1] for left in (True, False)]) * 2**0.5  # a mean square of 1
    left, right = nst.gram_matrix(features, guide)
    torch.testing.assert_close(left[None], nst.gram_matrix(features[..., :4]))
    torch.testing.assert_close(right[None], nst.gram_matrix(features[..., 4:]))
    (gradient,) = torch.autograd.grad(left.square().sum(), features)
    assert (gradient[..., 4:] == 0).all() and (gradient[..., :4] != 0).all()


def test_guides_have_a_mean_square_of_one_and_shares_are_weights_times_areas():
    masks = half_mask((64, 96), True), torch.cat([half_mask((64, 48), True)] * 2, 3)
    config = replace(CONFIG, masks=masks, style_blend=(3, 1))
    guides, shares = nst.find_regions((64, 96), config, torch.device("cpu"))
    assert list(guides) == list(nst.STYLE_LAYERS)
    for layer, side in zip(guides, (1, 2, 4, 8, 16), strict=True):
        assert guides[layer].shape == (2, 1, (64 + 8) // side, (96 + 8) // side)
        torch.testing.assert_close(guides[layer].square().mean((1, 2, 3)), torch.ones(2))
    assert shares == pytest.approx([1.5 * 0.5, 0.5 * 0.5], rel=0.1)  # the margin moves the areas a little
    assert nst.find_regions((64, 96), CONFIG, torch.device("cpu")) == ()


def test_each_style_goes_where_its_mask_is_white(vgg, pictures):
    photo, one, other = (pictures[name] for name in ("chelsea", "starry_night", "stained_glass"))
    masks = tuple(half_mask(photo.shape[2:], left) for left in (True, False))
    image = paint(photo, [one, other], vgg, masks=masks, num_steps=30)
    middle = image.shape[3] // 2
    left, right = image[..., :middle], image[..., middle:]
    assert style_loss(left, one, vgg) < style_loss(right, one, vgg) / 2
    assert style_loss(right, other, vgg) < style_loss(left, other, vgg) / 2


def test_what_no_mask_covers_keeps_more_of_the_photo(vgg, pictures):
    photo = pictures["china"]
    image = paint(photo, pictures["starry_night"], vgg, masks=(half_mask(photo.shape[2:], True),), num_steps=30)
    change, middle = (image - photo).abs().mean((0, 1, 2)), photo.shape[3] // 2
    assert change[middle + 16 :].mean() < 0.7 * change[: middle - 16].mean()


def test_soft_edges_count_partly(vgg, pictures):
    photo = pictures["china"]
    ramp = torch.linspace(0, 1, photo.shape[3]).expand_as(photo)
    image = paint(photo, [pictures["starry_night"], pictures["stained_glass"]], vgg, masks=(1 - ramp, ramp))
    assert image.isfinite().all()


@pytest.mark.parametrize("settings", [{}, {"checkpoint": True}, {"content_layers": ("relu2_1",)}])
def test_regions_go_with_checkpoints_and_with_a_layer_for_both(monkeypatch, vgg, pictures, settings):
    monkeypatch.setattr(nst, "STRIP_ROWS", 16)
    photo, styles = pictures["chelsea"], [pictures["starry_night"], pictures["stained_glass"]]
    masks = tuple(half_mask(photo.shape[2:], left) for left in (True, False))
    settings = {"content_layers": ("relu4_2",), "num_steps": 3} | settings
    image = paint(photo, styles, vgg, masks=masks, **settings)
    plain = paint(photo, styles, vgg, masks=masks, **settings | {"checkpoint": False})
    assert (image - plain).abs().mean() < 1e-3


def test_a_kept_part_is_the_photo_bit_for_bit(vgg, pictures):
    photo = pictures["china"]
    keep = half_mask(photo.shape[2:], True)
    for color in ("style", "luminance"):
        image = paint(photo, pictures["starry_night"], vgg, keep=keep, color=color)
        assert torch.equal(image[keep == 1], photo[keep == 1])
        assert (image - photo)[keep == 0].abs().mean() > 0.02
    image = paint(photo, pictures["starry_night"], vgg, keep=half_mask((50, 76), True))  # of another size
    assert torch.equal(image[..., :60], photo[..., :60])


def test_what_is_kept_changes_nothing_elsewhere(vgg, pictures):
    photo, painting = pictures["china"], pictures["starry_night"]
    keep = half_mask(photo.shape[2:], True)
    kept, free = paint(photo, painting, vgg, keep=keep), paint(photo, painting, vgg)
    assert torch.equal(kept[keep == 0], free[keep == 0])


def test_an_empty_region_and_one_too_small_are_refused_before_the_loop(vgg, pictures):
    photo, painting = pictures["china"], pictures["starry_night"]
    empty = torch.zeros_like(photo)
    small = empty.clone()
    small[..., 40:44, 40:44] = 1
    for mask, white in ((empty, "0.00% white"), (small, r"0\.15% white")):
        config = replace(CONFIG, masks=(torch.ones_like(photo), mask))
        with pytest.raises(ValueError, match=rf"masks\[1\] must be white on at least 16 x 16 .*relu5_1.*{white}"):
            nst.stylize(photo, [painting, painting], config, vgg)
    shallow = {"style_layers": ("relu1_1", "relu2_1"), "style_layer_weights": (1, 1)}  # to these, 4 pixels are enough
    assert paint(photo, painting, vgg, masks=(small,), num_steps=2, **shallow).isfinite().all()


def test_a_mask_of_another_shape_is_stretched_with_a_warning(vgg, pictures):
    photo, painting = pictures["china"], pictures["starry_night"]
    square = torch.ones(1, 3, 64, 64)
    for settings in ({"masks": (square,)}, {"keep": 1 - half_mask((64, 64), True)}):
        with pytest.warns(UserWarning, match=r"64 x 64 pixels is stretched to the photo's 128 x 85"):
            nst.stylize(photo, painting, replace(CONFIG, **settings), vgg)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        nst.stylize(photo, painting, replace(CONFIG, masks=(torch.ones(1, 3, 43, 64),)), vgg)


def test_a_count_of_weights_or_masks_that_is_not_that_of_the_styles_is_refused(vgg, pictures):
    photo, painting = pictures["china"], pictures["starry_night"]
    with pytest.raises(ValueError, match=r"style_blend must be one for each of 2 styles, not \(1, 2, 3\)"):
        nst.stylize(photo, [painting, painting], replace(CONFIG, style_blend=(1, 2, 3)), vgg)
    with pytest.raises(ValueError, match="masks must be one for each of 2 styles, not '1 masks'"):
        nst.stylize(photo, [painting, painting], replace(CONFIG, masks=(torch.ones_like(photo),)), vgg)
    with pytest.raises(ValueError, match="style_blend must be one for each of 0 styles"):
        nst.stylize(photo, [], CONFIG, vgg)


# Brush size -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("scale", "expected"), [(1, [91, 128]), (0.5, [45, 64]), (3, [273, 384]), (9, [400, 400])])
def test_the_style_is_looked_at_in_the_size_asked_for_and_never_enlarged(monkeypatch, vgg, pictures, scale, expected):
    sizes, forward = [], nst.VGG19Features.forward

    def note(self, image, layers, **options):
        if tuple(layers) == nst.STYLE_LAYERS and not image.requires_grad:
            sizes.append(max(image.shape))
        return forward(self, image, layers, **options)

    monkeypatch.setattr(nst.VGG19Features, "forward", note)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        paint(pictures["china"], torch.rand(1, 3, 300, 400), vgg, style_scale=scale, num_steps=2)
    assert sizes == pytest.approx(expected, abs=1)


def test_larger_strokes_than_the_painting_has_pixels_for_are_said(vgg, pictures):
    photo, painting = pictures["china"], pictures["starry_night"]
    with pytest.warns(UserWarning, match=r"style_scale=2 takes a painting of 256 pixels, and this one has 128"):
        nst.stylize(photo, painting, replace(CONFIG, style_scale=2), vgg)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        nst.stylize(photo, painting, replace(CONFIG, style_scale=0.5), vgg)
        nst.stylize(photo, torch.rand(1, 3, 200, 256), replace(CONFIG, style_scale=2), vgg)
        nst.stylize(photo, nst.shrink_to(painting, 64), CONFIG, vgg)  # by default a small painting is fine


# Start and optimiser ----------------------------------------------------------------------------


def start(pictures, vgg, **settings):
    settings = {"num_steps": 1, "scales": 1, "learning_rate": 1e-6} | settings
    return paint(pictures["china"], pictures["starry_night"], vgg, **settings)


def test_the_start_is_what_init_names(vgg, pictures):
    photo, painting = pictures["china"], pictures["starry_night"]
    torch.testing.assert_close(start(pictures, vgg), photo, atol=1e-5, rtol=0)
    stretched = nst.resize(painting, photo.shape[2:])
    torch.testing.assert_close(start(pictures, vgg, init="style"), stretched, atol=1e-5, rtol=0)
    torch.testing.assert_close(start(pictures, vgg, init=photo.flip(3)), photo.flip(3), atol=1e-5, rtol=0)
    noise = start(pictures, vgg, init="noise")
    assert noise.mean() == pytest.approx(0.5, abs=0.02) and 0.2 < noise.std() < 0.3
    assert torch.equal(noise, start(pictures, vgg, init="noise"))
    assert not torch.equal(noise, start(pictures, vgg, init="noise", seed=1))


def test_a_picture_is_gone_on_from_at_its_own_size_and_up(vgg, pictures):
    assert [x.size for x in nst.plan_scales((85, 128), replace(CONFIG, scales=3))] == [(42, 64), (60, 91), (85, 128)]
    for size, expected in (((85, 128), 1), ((60, 91), 2), ((50, 70), 2), ((42, 64), 3), ((170, 256), 1)):
        config = replace(CONFIG, scales=3, init=torch.rand(1, 3, *size))
        plan = nst.plan_scales((85, 128), config)
        assert len(plan) == expected and sum(scale.steps for scale in plan) == config.num_steps


def test_going_on_from_a_broken_off_run_gets_further(vgg, pictures):
    photo, painting = pictures["chelsea"], pictures["starry_night"]
    for step in nst.stylize(photo, painting, replace(CONFIG, num_steps=20), vgg):
        if step.number == 12:
            break
    assert step.image.shape[2] < photo.shape[2]
    image = paint(photo, painting, vgg, init=step.image, num_steps=20)
    assert image.shape == photo.shape
    assert style_loss(image, painting, vgg) < style_loss(nst.resize(step.image, photo.shape[2:]), painting, vgg)


def test_without_a_content_weight_no_detail_of_the_photo_comes_in(vgg, pictures):
    settings = {"init": "noise", "num_steps": 9, "scales": 3, "learning_rate": 1e-6}
    with_photo, without = (start(pictures, vgg, content_weight=weight, **settings) for weight in (1, 0))
    edges = pictures["china"] - nst.resize(nst.resize(pictures["china"], (42, 64)), (85, 128))

    def correlation(image):
        return torch.corrcoef(torch.stack([image.flatten(), edges.flatten()]))[0, 1]

    assert correlation(with_photo) > 0.2 > 0.05 > correlation(without).abs()


@pytest.mark.parametrize(("photo", "painting"), PAIRS)
def test_lbfgs_descends_on_every_pair_at_one_scale_and_at_many(vgg, pictures, photo, painting):
    content, style = pictures[photo], pictures[painting]
    for scales in (1, 2):
        totals = []
        for step in nst.stylize(content, style, replace(CONFIG, optimizer="lbfgs", scales=scales, num_steps=24), vgg):
            totals.append(step.losses["total"].item())
        assert totals[-1] < totals[0] / 4 and max(totals) == totals[0]
    adam = paint(content, style, vgg, num_steps=24)
    assert style_loss(step.image, style, vgg) < 1.1 * style_loss(adam, style, vgg)


def test_the_first_step_of_lbfgs_is_as_far_as_adams(vgg, pictures):
    settings = {"num_steps": 2, "scales": 1, "learning_rate": 0.01}
    far = []
    for optimizer in ("adam", "lbfgs"):
        config = replace(CONFIG, optimizer=optimizer, **settings)
        step = next(nst.stylize(pictures["china"], pictures["starry_night"], config, vgg))
        far.append((step.image - pictures["china"]).abs().mean().item())
    assert far[1] == pytest.approx(far[0], rel=0.1)


def test_a_small_picture_and_a_large_one_look_alike(vgg):
    """The style losses of the large one, shrunk, are those of the small one within a factor of two."""
    images = {}
    for size in (96, 192):
        photo, painting = (nst.load_image(f"images/{name}", size) for name in ("china.jpg", "starry_night.jpg"))
        images[size] = paint(photo, painting, vgg, num_steps=40, scales="auto")
    painting = nst.load_image("images/starry_night.jpg", 96)
    small, large, before = (
        style_loss(image, painting, vgg)
        for image in (images[96], nst.shrink_to(images[192], 96), nst.load_image("images/china.jpg", 96))
    )
    assert large < 2 * small and large < before / 5


# Sweeps, timelapse, transparency ----------------------------------------------------------------


def test_a_sweep_paints_a_labelled_sheet_of_every_combination(vgg, pictures):
    plt.close("all")
    content = pictures["china"]
    config = replace(CONFIG, num_steps=2)
    sheet = nst.sweep(content, pictures["starry_night"], config, vgg, style_weight=(3, 300), tv_weight=(0, 2, 50))
    assert list(sheet) == [f"style_weight = {s}, tv_weight = {t}" for s in (3, 300) for t in (0, 2, 50)]
    expected = paint(content, pictures["starry_night"], vgg, num_steps=2, style_weight=300, tv_weight=2)
    assert torch.equal(sheet["style_weight = 300, tv_weight = 2"], expected)
    axes = plt.gcf().axes
    assert [ax.get_title() for ax in axes] == list(sheet)
    assert axes[0].get_gridspec().get_geometry() == (2, 3)
    plt.close("all")


def test_a_sweep_of_sizes_and_of_networks_does_what_it_says(vgg, pictures):
    content, style = pictures["china"], pictures["starry_night"]
    sheet = nst.sweep(content, style, replace(CONFIG, num_steps=2), vgg, max_size=(64, 128))
    assert [max(image.shape) for image in sheet.values()] == [64, 128]
    sheet = nst.sweep(content, style, replace(CONFIG, num_steps=2), pooling=("max", "average"))
    assert not torch.equal(*sheet.values())
    plt.close("all")


def test_pictures_among_the_values_of_a_sweep_are_called_by_a_number(vgg, pictures):
    photo = pictures["china"]
    sheet = nst.sweep(
        photo, pictures["starry_night"], replace(CONFIG, num_steps=1), vgg, init=("content", photo, photo)
    )
    assert list(sheet) == ["init = content", "init = 2", "init = 3"]
    plt.close("all")


def test_a_bad_value_in_a_sweep_is_said_before_the_first_run(monkeypatch, vgg, pictures):
    monkeypatch.setattr(nst, "_paint", None)  # no run may start
    for values, message in (
        ({"style_weight": (1, -1)}, "style_weight must be a number of at least 0, not -1"),
        ({"style_blend": ((1,), (1, 2))}, "style_blend must be one for each of 1 styles"),
        ({"pooling": ("max", "average")}, "network must be made with pooling='average'"),
        ({}, "sweep must be given one or two settings"),
        ({"seed": (1,), "noise": (0,), "tv_weight": (1,)}, "sweep must be given one or two settings"),
    ):
        with pytest.raises(ValueError, match=message):
            nst.sweep(pictures["china"], pictures["starry_night"], CONFIG, vgg, **values)


def test_a_timelapse_has_every_picture_at_the_last_ones_size_and_holds_the_last(tmp_path):
    images = [torch.full((1, 3, 20 + 2 * i, 40 + 4 * i), i / 4) for i in range(5)]
    path = nst.save_timelapse(images, tmp_path)
    assert path.suffix == ".webp" and path.name.startswith("stylized_output_")
    with Image.open(path) as film:
        assert film.n_frames == 5 and film.size == (56, 28) and film.info["loop"] == 0
        times, shades = [], []
        for number in range(5):
            film.seek(number)
            film.load()
            times.append(film.info["duration"])
            shades.append(film.convert("RGB").getpixel((20, 10))[0])
    assert times[-1] >= 10 * times[0] and len(set(times[:-1])) == 1
    assert shades == pytest.approx([0, 64, 128, 191, 255], abs=4)
    with pytest.raises(ValueError, match="images must be a list of at least one picture"):
        nst.save_timelapse([], tmp_path)


def transparent_photo(kind: str) -> bytes:
    picture = Image.new("RGBA", (60, 40), (200, 30, 30, 255))
    picture.paste((0, 0, 0, 0), (0, 0, 30, 40))
    if kind == "palette":
        picture = picture.quantize()
    elif kind == "grey":
        picture = picture.convert("LA")
    elif kind == "turned":
        picture = picture.transpose(Image.Transpose.ROTATE_90)
    exif = Image.Exif()
    exif[0x0112] = 6 if kind == "turned" else 1
    data = io.BytesIO()
    picture.save(data, "PNG", exif=exif)
    return data.getvalue()


@pytest.mark.parametrize("kind", ["colour", "palette", "grey", "turned"])
def test_a_transparent_photo_comes_back_as_transparent(tmp_path, kind):
    photo = transparent_photo(kind)
    image = nst.load_image(photo, 30)
    assert image.shape == (1, 3, 20, 30)
    with Image.open(nst.save_image(image, tmp_path, photo)) as saved:
        assert saved.mode == "RGBA" and saved.size == (30, 20)
        assert [saved.getpixel((x, 10))[3] for x in (5, 25)] == [0, 255]
    with Image.open(nst.save_image(image, tmp_path)) as saved:
        assert saved.mode == "RGB"


def test_an_opaque_photo_gives_an_opaque_picture(tmp_path, pictures):
    with Image.open(nst.save_image(pictures["china"], tmp_path, "images/china.jpg")) as saved:
        assert saved.mode == "RGB"


def test_the_estimate_knows_several_styles_and_masks(vgg, pictures):
    photo, styles = pictures["china"], [pictures["starry_night"], pictures["stained_glass"]]
    masks = tuple(half_mask(photo.shape[2:], left) for left in (True, False))
    plain = nst.estimate(photo, styles, CONFIG, vgg)
    guided = nst.estimate(photo, styles, replace(CONFIG, masks=masks), vgg)
    assert guided.memory > plain.memory and guided.seconds > 0
    size, large = photo.shape[2:], torch.zeros(1, 3, 2000, 2000)
    by_scale = [nst.plan_memory(size, [large], replace(CONFIG, style_scale=x), vgg)[1] for x in (1, 3)]
    assert by_scale[1] > 5 * by_scale[0]
    lean, lbfgs = (nst.plan_memory(size, styles, replace(CONFIG, optimizer=x), vgg)[1] for x in ("adam", "lbfgs"))
    assert lbfgs - lean > 24 * nst.LBFGS_HISTORY * photo[0, 0].numel()  # two vectors of three floats a step and pixel
