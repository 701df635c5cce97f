"""Options: several paintings, regions, luminance, keep, memory, recovery, estimates, devices."""

import math
import re
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from conftest import (
    SHALLOW,
    TINY,
    assert_close,
    break_looks,
    fail,
    free_memory,
    half_mask,
    last,
    mean_change,
    note_looks,
    ours,
    paint,
    replace_looks,
    style_loss,
)

import nst_helpers as nst

GB = 1e9
RATE = 1e-6  # seconds per pixel
OPTIMIZERS = pytest.mark.parametrize("optimizer", ["adam", "lbfgs"])


@pytest.fixture(scope="module")
def trio(pictures):
    """A photo and two paintings."""
    names = ("chelsea", "starry_night", "stained_glass")
    return [nst.shrink_to(pictures[name], 64) for name in names]


def halves(photo):
    return [half_mask(photo.shape[2:], left) for left in (True, False)]


def test_only_the_ratio_of_a_blend_counts(shallow, trio):
    photo, one, other = trio
    blended = partial(paint, photo, network=shallow)
    alone, equal = blended(one), blended([one, other], style_blend="equal")
    assert torch.equal(blended([one, other], style_blend=(7, 0)), alone)
    assert torch.equal(blended([other, one], style_blend=(0, 1)), alone)
    assert torch.equal(blended([one, other], style_blend=(2, 2)), equal)


# Regions, luminance, keep -------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 3])
def test_a_white_mask_changes_nothing(vgg, trio, channels):
    photo, painting, _ = trio
    image = paint(photo, painting, vgg, masks=torch.ones(1, channels, 40, 60))
    assert_close(image, paint(photo, painting, vgg), 2e-3)


def test_guides_are_the_masks_by_areas_with_a_mean_square_of_1(monkeypatch, vgg):
    photo, ramp = torch.rand(1, 3, 64, 96), torch.linspace(0, 1, 30).expand(1, 3, 20, 30)
    looks = note_looks(monkeypatch)
    paint(photo, [photo, photo], vgg, masks=[half_mask((64, 96)), ramp], num_steps=1)
    for guide, stride in zip(looks[-1].guides.values(), (1, 2, 4, 8), strict=True):
        assert guide.shape == (2, 1, (64 + 8) // stride, (96 + 8) // stride)
        torch.testing.assert_close(guide.square().mean((1, 2, 3)), torch.ones(2))
        assert guide[1, 0, 2].diff()[4 // stride : -4 // stride].min() >= 0
        left, right = guide[0, 0].chunk(2, 1)
        assert torch.equal(left[:, :-1], torch.full_like(left[:, :-1], left.max()))
        assert torch.equal(right[:, 1:], torch.zeros_like(right[:, 1:]))


def test_a_region_counts_by_its_area_and_its_weight(shallow, pictures):
    """In a photo of three equal thirds, with one painting, no region is further off by itself."""
    photo = nst.resize(pictures["china"], (64, 48)).repeat(1, 1, 1, 3)
    third = torch.zeros_like(photo)
    third[..., 96:] = 1

    def style_loss_of(blend):
        config = replace(SHALLOW, num_steps=1, scales=1, color="content", style_blend=blend)
        given = {"network": shallow, "masks": [third, 1 - third]}
        (step,) = nst.stylize(photo, [pictures["starry_night"]] * 2, config, **given)
        return step.losses["style"].item()

    small, large = style_loss_of((1, 0)), style_loss_of((0, 1))
    assert small / large == pytest.approx(1 / 2, rel=0.2)  # the padding adds to it
    assert style_loss_of("equal") == pytest.approx(small + large)
    assert style_loss_of((3, 1)) == pytest.approx(1.5 * small + 0.5 * large)


def test_each_painting_goes_where_its_mask_is_white(vgg, trio):
    photo, one, other = trio
    image = paint(photo, [one, other], vgg, masks=halves(photo), num_steps=15, scales=1)
    left, right = image.chunk(2, 3)
    assert style_loss(left, one, vgg) < style_loss(right, one, vgg) / 1.3
    assert style_loss(right, other, vgg) < style_loss(left, other, vgg) / 1.3


def test_each_painting_gives_its_palette_where_its_mask_is_white(shallow, trio):
    photo, one, other = trio
    in_one, in_other = (nst.match_colors(photo, style).clamp(0, 1) for style in (one, other))
    left, right = halves(photo)
    grey = torch.full_like(left, 0.5)
    for masks, expected in {
        (left,): torch.where(left > 0, in_one, photo),
        (grey,): (in_one + photo) / 2,
        (left, right): torch.where(left > 0, in_one, in_other),
        (left + right, left + right): (in_one + in_other) / 2,
    }.items():
        styles = [one, other][: len(masks)]
        start = paint(photo, styles, shallow, masks=masks, num_steps=1, learning_rate=1e-7)
        assert_close(start, expected, 1e-4)


def test_a_region_that_the_deepest_style_layer_misses_is_refused(vgg, shallow):
    photo, none = torch.rand(1, 3, 128, 192), torch.zeros(1, 3, 128, 192)
    small, large, red = none.clone(), none.clone(), none.clone()
    small[..., 16:20, 16:20] = large[..., 16:32, 16:32] = red[:, 0] = 1
    run = partial(nst.stylize, photo, [photo, photo], TINY, network=vgg)
    for mask in (none, small):
        with pytest.raises(ValueError, match=rf"^masks\[1\].*8 x 8.*{mask.mean():.2%}"):
            run(masks=[large, mask])
    for mask in (large, large / 10, red):
        run(masks=[mask, large])
    nst.stylize(photo, photo, SHALLOW, network=shallow, masks=small)


def chroma(image):
    weights = torch.tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)
    return image - (image * weights).sum(1, keepdim=True)


@OPTIMIZERS
@pytest.mark.parametrize("quality", ["quick", "normal"])
@pytest.mark.parametrize("learning_rate", [0.2, 9])  # the second takes every pixel to its limits
def test_luminance_keeps_the_chroma_of_each_pixel(shallow, trio, optimizer, quality, learning_rate):
    photo, painting, _ = trio
    settings = {"optimizer": optimizer, "quality": quality, "learning_rate": learning_rate}
    image = paint(photo, painting, shallow, color="luminance", **settings)
    assert_close(chroma(image), chroma(photo), 1e-6)
    assert mean_change(image, photo) > 0.01


@pytest.mark.parametrize("color", ["style", "content", "luminance"])
@pytest.mark.parametrize("quality", ["quick", "normal"])
def test_a_kept_part_is_the_photo_and_the_rest_is_as_without(shallow, pair, color, quality):
    photo = pair[0]
    keep = half_mask(photo.shape[2:])
    kept = paint(*pair, shallow, keep=keep, color=color, quality=quality)
    free = paint(*pair, shallow, color=color, quality=quality)
    assert torch.equal(kept, torch.where(keep == 1, photo, free))
    assert mean_change(free[keep == 0], photo[keep == 0]) > 0.01


def test_keep_may_have_another_size_and_counts_by_the_mean_of_its_channels(shallow, pair):
    photo = pair[0]
    large = paint(*pair, shallow, keep=half_mask((86, 128)))
    assert torch.equal(large[..., :31], photo[..., :31])
    assert torch.equal(paint(*pair, shallow, keep=half_mask((86, 128))[:, :1]), large)
    red = torch.tensor([1.0, 0, 0]).view(1, 3, 1, 1).expand(1, 3, 21, 32)
    expected = photo / 3 + paint(*pair, shallow) * 2 / 3
    assert_close(paint(*pair, shallow, keep=red), expected, 1e-6)


def test_a_painting_may_go_where_the_photo_is_hidden(shallow, trio):
    photo, one, other = trio
    left, right = halves(photo)
    config = replace(SHALLOW, num_steps=2)
    given = {"network": shallow, "masks": [left, right], "cutout": left}
    steps = list(nst.stylize(photo, [one, other], config, **given))
    assert all(step.losses["total"].isfinite() for step in steps)


@pytest.mark.parametrize("color", ["style", "content", "luminance"])
def test_what_is_hidden_of_a_painting_counts_neither_in_style_nor_in_colours(shallow, pair, color):
    photo, painting = pair
    left = half_mask(painting.shape[2:])
    in_white, in_black = painting * left + 1 - left, painting * left
    seen = [
        paint(photo, style, shallow, color=color, visible=left) for style in (in_white, in_black)
    ]
    cropped = paint(photo, painting[..., : painting.shape[3] // 2], shallow, color=color)
    whole = paint(photo, in_white, shallow, color=color)
    assert mean_change(*seen) < 1e-4
    assert mean_change(seen[0], cropped) < 0.02
    assert mean_change(seen[0], whole) > 0.03


def test_each_painting_has_its_own_visible_part(shallow, trio):
    photo, *paintings = trio
    white = torch.ones_like(paintings[0])
    plain = paint(photo, paintings, shallow)
    for mask in (white, white[:, :1]):
        assert_close(paint(photo, paintings, shallow, visible=[mask, None]), plain, atol=1e-3)
    parts = [None, half_mask(paintings[1].shape[2:])]
    assert mean_change(paint(photo, paintings, shallow, visible=parts), plain) > 0.003
    with pytest.raises(ValueError, match=r"visible must .* not 1"):
        paint(photo, paintings, shallow, visible=white)
    with pytest.raises(ValueError, match=r"visible\[1\] must"):
        paint(photo, paintings, shallow, visible=[None, 0 * white])


# Memory -------------------------------------------------------------------------------------------


@OPTIMIZERS
@pytest.mark.parametrize("masks", [False, True])
def test_strips_give_the_same_picture(low_strips, shallow, trio, optimizer, masks):
    photo, *styles = trio
    settings = {"quality": "normal", "optimizer": optimizer, "masks": halves(photo) * masks}
    run = partial(paint, photo, styles, shallow, **settings)
    plain, in_strips = run(checkpoint=False), run(checkpoint=True)
    assert mean_change(plain, photo) > 0.05
    # L-BFGS keeps its history in half precision as well.
    least, most = (0, 1e-5) if optimizer == "adam" else (1e-5, 5e-3)
    assert least <= mean_change(in_strips, plain) < most


SHORT = 0.018 * GB  # enough for the first scale of a small photo alone


@pytest.mark.parametrize(
    ("quality", "checkpoint", "free", "strips"),
    [
        ("quick", "auto", 100 * GB, [0, 0]),
        ("quick", "auto", SHORT, [0, 5]),
        ("quick", False, SHORT, [0, 0]),
        ("quick", True, 100 * GB, [5, 5]),
        ("quick", 64, 100 * GB, [0, 5]),  # from a long side of so many pixels on
        ("quick", 65, SHORT, [0, 0]),
        ("normal", "auto", 100 * GB, [0, 1]),  # larger than the result
        ("normal", False, 100 * GB, [0, 0]),
        ("normal", 80, 100 * GB, [0, 5]),
        ("normal", 81, 100 * GB, [0, 1]),
    ],
)
def test_strips_are_used_where_they_are_asked_for_or_memory_is_short(
    monkeypatch, vgg, pair, quality, checkpoint, free, strips
):
    free_memory(monkeypatch, free)
    looks = note_looks(monkeypatch)
    config = replace(TINY, quality=quality, checkpoint=checkpoint, num_steps=2)
    step = last(nst.stylize(*pair, config, network=vgg))
    assert [scale.blocks_in_strips for scale in step.job.scales] == strips
    assert [look.blocks_in_strips for look in looks if look.is_canvas] == strips


def plain_photo(width, height=None):
    height = round(width * 2 / 3) if height is None else height
    return torch.full((1, 1, 1, 1), 0.5).expand(1, 3, height, width)


def bytes_taken(network, photo, styles=None, masks=(), visible=None, **settings):
    settings = {"optimizer": "adam", "scales": 1, "checkpoint": False, **settings}
    styles = [plain_photo(16, 16)] if styles is None else styles
    given = {"seconds_per_pixel": 1.0, "masks": masks, "visible": visible}
    return nst.estimate(photo, styles, replace(SHALLOW, **settings), network, **given).memory


def test_memory_grows_with_pixels_regions_and_history_and_falls_with_strips(monkeypatch, shallow):
    free_memory(monkeypatch, 100 * GB)
    photo, painting, white = plain_photo(512, 512), plain_photo(16, 16), torch.ones(1, 3, 16, 16)
    taken = partial(bytes_taken, shallow, photo)
    plain = taken()
    assert bytes_taken(shallow, plain_photo(1024, 1024)) / plain == pytest.approx(4, rel=0.05)
    one, two = (taken([painting] * n, masks=[white] * n) for n in (1, 2))
    assert two - one == pytest.approx(one - plain) != 0
    assert taken(visible=white) - plain == pytest.approx((one - plain) / 2)  # without gradients
    assert taken([painting] * 3) == plain  # a blend
    vectors = 2 * 4 * 3 * 4 * 520 * 520  # two for each of four pairs, in float32
    assert vectors <= taken(optimizer="lbfgs") - plain < 1.5 * vectors
    half = nst.load_network(replace(SHALLOW, precision="bfloat16"))
    assert 0.4 * plain < bytes_taken(half, photo) < 0.8 * plain
    larger = partial(taken, scales=2, quality="normal")
    whole, one_block, all_blocks = (larger(checkpoint=given) for given in (False, "auto", True))
    assert all_blocks * 2 < one_block < 0.8 * whole


def test_a_large_painting_takes_memory_at_the_size_that_it_is_seen_at(monkeypatch, shallow):
    free_memory(monkeypatch, 100 * GB)
    taken = partial(bytes_taken, shallow, plain_photo(300, 16))
    small, large = (taken([plain_photo(side, side)]) for side in (300, 900))
    assert small == pytest.approx(large)
    assert small > 5 * taken()
    assert taken([plain_photo(900, 900)], style_scale=2) == pytest.approx(4 * large)


@pytest.mark.parametrize("quality", ["quick", "normal", "best"])
@pytest.mark.parametrize("checkpoint", [False, "auto"])
def test_a_photo_too_large_for_the_memory_is_refused_with_the_largest_that_fits(
    monkeypatch, shallow, pair, quality, checkpoint
):
    free_memory(monkeypatch, 0.3 * GB)
    config = replace(SHALLOW, quality=quality, checkpoint=checkpoint)
    with pytest.raises(ValueError, match=r"^max_size.*0\.3 GB.*3000") as error:
        nst.stylize(plain_photo(3000), pair[1], config, network=shallow)
    largest = int(re.search(r"at most (\d+)", str(error.value))[1])
    photo = plain_photo(largest - 2)
    found = nst.estimate(photo, pair[1], config, shallow, seconds_per_pixel=RATE)
    assert found.memory == pytest.approx(0.3 * GB, rel=0.03)
    free_memory(monkeypatch, 1000)
    with pytest.raises(ValueError, match=r"^No picture.*0\.0 GB.*cpu"):
        nst.stylize(*pair, config, network=shallow)


# Recovery -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_after_a_nan_in_half_precision_a_run_goes_on_in_float32(monkeypatch, pair, value):
    half = nst.load_network(replace(SHALLOW, precision="bfloat16"))
    spoiled = nst.Statistics(torch.full((1, 64, 64), value), torch.ones(1, 64))
    looks = note_looks(monkeypatch)
    break_looks(monkeypatch, 4, lambda content, _: (content, {"relu1_1": spoiled}))
    with pytest.warns(nst.StyleTransferWarning, match=r"4.*bfloat16.*float32.*3") as caught:
        steps = list(nst.stylize(*pair, replace(SHALLOW, scales=1), network=half))
    assert [warning.filename for warning in ours(caught)] == [__file__]
    assert [step.number for step in steps] == [1, 2, 3, 4, 5, 6]
    assert [step.job.notes for step in steps[2:4]] == [(), (str(ours(caught)[0].message),)]
    assert steps[3].losses["total"] < steps[2].losses["total"]  # from the picture of step 3
    dtypes = [look.network.dtype for look in looks if look.is_canvas]
    assert dtypes == [torch.bfloat16] * 4 + [torch.float32] * 3
    assert (half.dtype, steps[0].image.dtype) == (torch.bfloat16, torch.float32)


def test_after_a_nan_in_float32_a_run_ends_with_its_last_picture(monkeypatch, shallow, pair):
    def spoil_gradient(content, style):
        content["relu2_1"].register_hook(lambda gradient: gradient * math.nan)
        return content, style

    break_looks(monkeypatch, 4, spoil_gradient)
    steps = []
    with pytest.raises(FloatingPointError, match=r"4.*float32.*3.*learning_rate"):
        steps.extend(nst.stylize(*pair, SHALLOW, network=shallow))
    assert [step.number for step in steps] == [1, 2, 3]
    assert steps[-1].image.isfinite().all()


def limit_memory(monkeypatch, is_too_much, in_steps=True):
    """Let memory run out at looks with ``is_too_much(width, strips)``: at the canvas, or before."""

    def see(asked, look):
        width = asked.image.shape[3] - 8
        if asked.is_canvas is in_steps and is_too_much(width, asked.blocks_in_strips):
            raise MemoryError
        return look(*asked)

    replace_looks(monkeypatch, see)


WORDS = (
    "HIP out of memory. Tried to allocate 2.00 GiB",
    "MPS backend out of memory (MPS allocated: 5.1 GB)",
    "CUDA driver error: CUDA_ERROR_OUT_OF_MEMORY",
    "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
    "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
    "miopenStatusAllocFailed",
    "FIND was unable to find an engine to execute this computation",
    "Invalid buffer size: 8.21 GB",
    "Failed to allocate private MTLBuffer for size 9000000000",
    "UR error: 39 (UR_RESULT_ERROR_OUT_OF_DEVICE_MEMORY)",
    "Native API failed. Native API returns: -5 (PI_ERROR_OUT_OF_RESOURCES)",
    "could not create a memory object",
    "could not create a primitive",
    "DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes",
    "DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes",
    "std::bad_alloc",
)
ERRORS = [MemoryError(), torch.cuda.OutOfMemoryError("out of memory"), *map(RuntimeError, WORDS)]


@pytest.mark.parametrize("error", ERRORS)
def test_out_of_memory_a_run_goes_on_in_strips(monkeypatch, shallow, pair, error):
    break_looks(monkeypatch, 4, fail(error))
    with pytest.warns(nst.StyleTransferWarning, match=r"64 x 42.*checkpoint") as caught:
        steps = list(nst.stylize(*pair, replace(SHALLOW, scales=1), network=shallow))
    assert [step.number for step in steps] == [1, 2, 3, 4, 5, 6]
    assert [step.job.scales[0].blocks_in_strips for step in steps] == [0, 0, 0, 5, 5, 5]
    assert steps[3].losses["total"] < steps[2].losses["total"]
    assert [step.job.notes for step in steps[2:4]] == [(), (str(ours(caught)[0].message),)]


@pytest.mark.parametrize("in_steps", [True, False])
@pytest.mark.parametrize("width", [24, 48, 96])
def test_strips_take_over_at_any_scale(monkeypatch, shallow, pictures, width, in_steps):
    photo = nst.resize(pictures["china"], (64, 96))
    limit_memory(monkeypatch, lambda w, strips: (w, strips) == (width, 0), in_steps)
    config = replace(SHALLOW, scales=3, num_steps=13)
    with pytest.warns(nst.StyleTransferWarning, match=f"{width} x"):
        steps = list(nst.stylize(photo, pictures["starry_night"], config, network=shallow))
    assert [step.image.shape[3] for step in steps] == [24] * 10 + [48] * 2 + [96]
    assert [step.number for step in steps] == list(range(1, 14))


@pytest.mark.parametrize(
    ("settings", "limit", "width"),
    [
        ({"scales": 3}, 36, 25),
        ({"scales": 3}, 144, 102),
        ({"scales": 3, "checkpoint": True}, 144, 102),
        ({"quality": "best", "checkpoint": True}, 216, 144),
    ],
)
def test_where_even_strips_do_not_fit_the_result_is_smaller(
    monkeypatch, shallow, pictures, settings, limit, width
):
    photo, keep = nst.resize(pictures["china"], (96, 144)), half_mask((96, 144))
    limit_memory(monkeypatch, lambda width, strips: width >= limit)
    config = replace(SHALLOW, num_steps=13, **settings)
    run = nst.stylize(photo, pictures["starry_night"], config, network=shallow, keep=keep)
    with pytest.warns(nst.StyleTransferWarning) as caught:
        steps = list(run)
    assert len(ours(caught)) == (1 if config.checkpoint is True else 2)
    assert steps[-1].job.notes == tuple(str(warning.message) for warning in ours(caught))
    assert [(step.number, step.total) for step in steps] == [(n, 13) for n in range(1, 14)]
    assert steps[-1].progress == pytest.approx(1)
    image, kept = steps[-1].image, slice(None, width // 2 - 1)
    assert f" {image.shape[3]} x {image.shape[2]} " in steps[-1].job.notes[-1]
    assert image.shape[3] == width
    assert torch.equal(image[..., kept], nst.resize(photo, image.shape[2:])[..., kept])


def test_what_a_failed_step_held_is_free_before_the_run_goes_on(monkeypatch, shallow, pair):
    """An error holds the frames that it passed through, and they hold the step's tensors."""
    held = []

    def run_out(content, style):
        features = torch.zeros(10)
        held.append(weakref.ref(features))
        raise MemoryError

    break_looks(monkeypatch, 1, run_out)
    steps = nst.stylize(*pair, SHALLOW, network=shallow)
    with pytest.warns(nst.StyleTransferWarning):
        next(steps)
    assert held[0]() is None


@pytest.mark.filterwarnings("ignore::nst_helpers.StyleTransferWarning")
@pytest.mark.parametrize(
    ("error", "message"), [(MemoryError(), r"\d+ x \d+ pixels"), (RuntimeError("shapes"), "shapes")]
)
def test_memory_too_short_for_any_size_and_other_errors_end_the_run(
    monkeypatch, shallow, pair, error, message
):
    replace_looks(monkeypatch, fail(error))
    with pytest.raises(type(error), match=message):
        last(nst.stylize(*pair, SHALLOW, network=shallow))


SETTINGS = (
    {"optimizer": "adam", "color": "luminance", "noise": 0.1, "num_steps": 15},
    {"num_steps": 13, "scales": 1, "checkpoint": True},
)


def test_threads_take_turns_and_end_with_the_right_pictures(monkeypatch, shallow, pair):
    both_ready, inside, counts = threading.Barrier(2), [], []

    def see(asked, look):
        inside.append(1)
        seen = look(*asked)
        counts.append(len(inside))
        inside.pop()
        return seen

    def run(settings):
        both_ready.wait()
        return paint(*pair, shallow, **settings)

    expected = [paint(*pair, shallow, **settings) for settings in SETTINGS]
    replace_looks(monkeypatch, see)
    with ThreadPoolExecutor(2) as pool:
        assert all(map(torch.equal, pool.map(run, SETTINGS), expected))
    assert max(counts) == 1


# M_MMAP_MAX, M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of glibc's malloc.h
KEPT = {-4: 0, -1: 2**31 - 1}
RETURNED = {-4: 2**16, -1: 2**26, -3: 2**20, "trimmed": True}


@pytest.mark.parametrize("end", ["finished", "closed", "failed"])
@pytest.mark.parametrize("checkpoint", [False, True])
def test_a_run_keeps_freed_memory_and_leaves_nothing_behind_however_it_ends(
    monkeypatch, shallow, pair, end, checkpoint
):
    expected, asked = paint(*pair, shallow), {}
    glibc = SimpleNamespace(
        mallopt=asked.__setitem__, malloc_trim=lambda pad: asked.update(trimmed=True)
    )
    monkeypatch.setattr(nst.sys, "platform", "linux")
    monkeypatch.setattr(nst.ctypes, "CDLL", lambda name: glibc)
    emptied = []
    for gpus in (torch.cuda, torch.xpu):
        monkeypatch.setattr(gpus, "empty_cache", partial(emptied.append, gpus))
    steps = nst.stylize(*pair, replace(SHALLOW, checkpoint=checkpoint), network=shallow)
    next(steps)
    assert bool(emptied) == checkpoint
    assert asked == (RETURNED if checkpoint else KEPT)  # strips are for where memory is short
    asked.clear()
    if end == "finished":
        last(steps)
    elif end == "closed":
        steps.close()
    else:
        break_looks(monkeypatch, 1, fail(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            next(steps)
    assert asked == RETURNED
    assert emptied[-2:] == [torch.cuda, torch.xpu]
    monkeypatch.setattr(nst.sys, "platform", "win32")
    monkeypatch.setattr(nst.ctypes, "CDLL", fail(OSError()))  # other C libraries are left alone
    assert torch.equal(paint(*pair, shallow), expected)


# Estimates, devices, dtypes -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("device", "quality", "checkpoint", "free", "slowdowns"),
    [
        ("cpu", "quick", False, 8 * GB, [1, 1]),
        ("cpu", "quick", True, 8 * GB, [2.2, 2.2]),
        ("cpu", "normal", "auto", 8 * GB, [1, 1.15]),
        ("cpu", "normal", False, 8 * GB, [1, 1]),
        # Any other device does as a GPU: strips only where memory is short.
        ("meta", "normal", "auto", 8 * GB, [1, 1]),
        ("meta", "normal", "auto", 0.45 * GB, [1, 1.15]),
        ("meta", "normal", "auto", 0.2 * GB, [1, 2.2]),
    ],
)
def test_the_estimate_adds_up_the_scales(monkeypatch, device, quality, checkpoint, free, slowdowns):
    free_memory(monkeypatch, free)
    monkeypatch.setattr(nst, "paint", fail(AssertionError("a picture was painted")))
    config = replace(SHALLOW, quality=quality, checkpoint=checkpoint, num_steps=40)
    photo, network = plain_photo(300), nst.load_network(SHALLOW).to(device)
    found = nst.estimate(photo, photo, config, network, seconds_per_pixel=RATE)
    expected = 11 * RATE * (107 + 8) * (160 + 8)  # the trial that finds the balance
    for scale, slowdown in zip(nst.plan_scales((200, 300), config), slowdowns, strict=True):
        height, width = scale.size
        share = 0.65 if scale.is_shallow else 1  # without the fourth block
        expected += share * slowdown * RATE * (scale.steps + 1) * (height + 8) * (width + 8)
    assert found.seconds == pytest.approx(expected)
    assert (found.free, found.seconds_per_pixel) == (free, RATE)


def test_the_estimate_is_of_what_stylize_is_given(shallow, pair):
    """Its pictures too: with a start, all steps are at the finest scale."""
    estimate = partial(nst.estimate, *pair, SHALLOW, shallow, seconds_per_pixel=RATE)
    assert estimate(start=pair[0]).seconds > 1.5 * estimate().seconds
    for name in ("masks", "keep", "start", "visible"):
        with pytest.raises(ValueError, match=f"^{name}"):
            estimate(**{name: pair[0][..., :15]})


def test_the_estimate_times_the_fastest_of_a_few_small_steps(monkeypatch, shallow, pictures):
    clock = [0.0]
    speeds = iter([100, 5, 1, 3])  # the first steps of a process are slow

    def see(asked, look):
        if asked.is_canvas:
            clock[0] += next(speeds) * RATE * (192 + 8) * (128 + 8)
        return look(*asked)

    replace_looks(monkeypatch, see)
    monkeypatch.setattr(nst.time, "perf_counter", lambda: clock[0])
    found = nst.estimate(plain_photo(900), pictures["starry_night"], SHALLOW, shallow)
    assert found.seconds_per_pixel == pytest.approx(RATE)
