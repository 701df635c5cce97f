"""Half precision, checkpoints, what a run takes, and memory that runs out. No test here holds a stopwatch."""

import re
import warnings
from dataclasses import replace

import pytest
import torch

import nst_helpers as nst

CONFIG = nst.StyleTransferConfig(weights="bundled", precision="float32", max_size=128, num_steps=6)
GB = 1e9


def last(steps):
    *_, step = steps
    return step


def bytes_needed(size, style, network, checkpoint):
    return nst.plan_memory(size, [style], replace(CONFIG, checkpoint=checkpoint), network)[1]


def losses_and_gradient(network, picture, content, style, **options):
    """The losses of ``picture``, and the gradient of their sum, as the loop computes them."""
    with torch.no_grad():
        content_features = network(content, nst.CONTENT_LAYERS, **options)
        grams = network(style, nst.STYLE_LAYERS, grams=nst.STYLE_LAYERS, **options)
    picture = picture.clone().requires_grad_()
    features = network(picture, grams=nst.STYLE_LAYERS, **options)
    losses = nst.calculate_losses(picture, features, content_features, grams, CONFIG)
    (losses["total"] * picture.numel()).backward()
    return {name: loss.item() for name, loss in losses.items()}, picture.grad


# Half precision ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("precision", "bound"), [("bfloat16", 0.03), ("float16", 0.005)])
def test_half_precision_sees_what_float32_sees(vgg, pictures, precision, bound):
    half = nst.VGG19Features(weights="bundled", dtype=getattr(torch, precision))
    trio = pictures["china"].flip(3), pictures["china"], pictures["starry_night"]
    (expected, gradient), (got, half_gradient) = losses_and_gradient(vgg, *trio), losses_and_gradient(half, *trio)
    for name in expected:
        assert got[name] == pytest.approx(expected[name], rel=bound), name
    assert half_gradient.dtype == torch.float32
    assert torch.nn.functional.cosine_similarity(half_gradient.flatten(), gradient.flatten(), 0) > 0.99


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_half_precision_paints_the_same_picture(vgg, pictures, precision):
    """Rounding sends single strokes elsewhere, so the pictures are compared as the eye does: by their losses,
    and after a blur."""
    config = replace(CONFIG, num_steps=30)
    content, style = pictures["china"], pictures["starry_night"]
    half = last(nst.stylize(content, style, replace(config, precision=precision)))
    full = last(nst.stylize(content, style, config, vgg))
    assert half.image.dtype == torch.float32
    difference = torch.nn.functional.avg_pool2d(half.image - full.image, 4).abs().mean()
    assert difference < 0.02
    assert half.losses["total"].item() == pytest.approx(full.losses["total"].item(), rel=0.05)


def test_half_precision_holds_the_largest_features_and_the_smallest_gradients(pictures):
    """The bundled network's features go up to some 20,000, a pixel's part in the loss down to 1e-7 and below."""
    half = nst.VGG19Features(weights="bundled", dtype=torch.float16)
    loud = (pictures["stained_glass"] > 0.5).float()  # as much contrast as a picture can have
    assert max(f.max() for f in half(loud).values()) < 65504 / 16
    start = nst.resize(pictures["china"], (512, 768))
    _, gradient = losses_and_gradient(half, start, start.flip(3), pictures["starry_night"])
    assert gradient.isfinite().all() and (gradient == 0).float().mean() < 0.05


def test_the_loop_scales_its_loss_by_the_pixels_so_that_no_gradient_vanishes(monkeypatch, vgg, pictures):
    """Adam is blind to the factor; without it float16 loses a large picture's gradients, which shrink with its size."""
    scaled, backward = [], torch.Tensor.backward
    monkeypatch.setattr(torch.Tensor, "backward", lambda loss: scaled.append(loss.item()) or backward(loss))
    config = replace(CONFIG, num_steps=1)
    step = last(nst.stylize(pictures["china"], pictures["starry_night"], config, vgg))
    pixels = (step.image.shape[2] + 2 * nst.MARGIN) * (step.image.shape[3] + 2 * nst.MARGIN)
    assert scaled == [pytest.approx(step.losses["total"].item() * 3 * pixels)]


def test_the_type_of_the_convolutions_is_the_one_that_the_device_is_fastest_in(monkeypatch):
    def picked(capability):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        return nst.pick_precision("auto", torch.device("cuda"))

    assert picked((6, 1)) == torch.float32  # no tensor cores
    assert picked((7, 5)) == torch.float16  # a T4
    assert picked((8, 0)) == torch.bfloat16 and picked((9, 0)) == torch.bfloat16
    assert nst.pick_precision("auto", torch.device("mps")) == torch.float32


def test_a_type_that_the_device_does_not_have_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    with pytest.raises(ValueError, match="one of 'auto', 'float32', 'float16' on cuda, not 'bfloat16'"):
        nst.pick_precision("bfloat16", torch.device("cuda"))
    with pytest.raises(ValueError, match=r"precision must be one of 'auto', .*'bfloat16' on cpu, not 'int8'"):
        replace(CONFIG, device="cpu", precision="int8")


# Checkpoints and strips -------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(129, 70), (192, 64), (65, 33), (16, 90)])
def test_with_checkpoints_losses_and_gradients_are_the_same(monkeypatch, vgg, pictures, size):
    """Strips of 16 rows, so that every block has several; odd heights, so that the last one is odd too."""
    monkeypatch.setattr(nst, "STRIP_ROWS", 16)
    trio = [nst.resize(pictures[name], size) for name in ("chelsea", "china", "starry_night")]
    plain, gradient = losses_and_gradient(vgg, *trio)
    lean, lean_gradient = losses_and_gradient(vgg, *trio, checkpoint=True)
    assert lean == pytest.approx(plain, rel=1e-4)
    assert (lean_gradient - gradient).norm() < 1e-4 * gradient.norm()


@pytest.mark.parametrize("pooling", ["max", "average"])
def test_with_checkpoints_features_are_the_same_in_every_layer(monkeypatch, pooling, pictures):
    monkeypatch.setattr(nst, "STRIP_ROWS", 8)
    network = nst.VGG19Features(("relu1_1", "relu1_2", "relu2_2", "relu3_4", "relu4_4"), "bundled", pooling)
    for layer, features in network(pictures["china"]).items():
        joined = network(pictures["china"], checkpoint=True)[layer]
        torch.testing.assert_close(joined, features, rtol=1e-4, atol=1e-3)


def test_with_checkpoints_nothing_but_the_blocks_outputs_is_kept(vgg, pictures):
    def kept(checkpoint):
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.numel()) or x, lambda x: x):
            vgg(pictures["china"].clone().requires_grad_(), grams=nst.STYLE_LAYERS, checkpoint=checkpoint)
        return sum(sizes)

    assert kept(True) * 5 < kept(False)


def test_with_checkpoints_it_paints_the_same_picture(vgg, pictures):
    run = [
        last(nst.stylize(pictures["china"], pictures["starry_night"], replace(CONFIG, checkpoint=x), vgg))
        for x in (True, False)
    ]
    assert (run[0].image - run[1].image).abs().mean() < 1e-3


def test_pooling_before_the_relu_changes_nothing(vgg, pictures):
    """The network pools first where nobody asks for that ReLU's features; the maximum is the same."""
    asked = nst.VGG19Features((*vgg.layers, "relu1_2", "relu2_2", "relu3_4", "relu4_4"), "bundled")
    names, other = ([*network.network._modules] for network in (vgg, asked))
    assert names.index("pool1") < names.index("relu1_2") and other.index("relu1_2") < other.index("pool1")
    for layer, features in vgg(pictures["china"]).items():
        assert torch.equal(asked(pictures["china"], vgg.layers)[layer], features)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gram_matrix_in_chunks_is_the_plain_one(monkeypatch, dtype):
    features = torch.rand(1, 8, 30, 21, dtype=dtype, requires_grad=True)
    flat = features.detach().float().flatten(2)
    results = []
    for positions in (7, 10**6):
        monkeypatch.setattr(nst, "GRAM_POSITIONS", positions)
        gram = nst.gram_matrix(features)
        (gradient,) = torch.autograd.grad((gram * torch.arange(8.0)).sum(), features)
        torch.testing.assert_close(gram, flat @ flat.mT / (30 * 21))
        results.append(gradient)
    assert results[0].dtype == dtype
    torch.testing.assert_close(*results)


# What a run takes -------------------------------------------------------------------------------


def test_memory_grows_with_the_pixels_and_checkpoints_take_less(vgg):
    style = torch.zeros(1, 3, 16, 16)
    small, large = (bytes_needed((side, side), style, vgg, False) for side in (1024, 2048))
    assert large / small == pytest.approx(4, rel=0.05)
    assert bytes_needed((2048, 2048), style, vgg, True) < 500 * 2056**2
    half = nst.VGG19Features(weights="bundled", dtype=torch.bfloat16)
    assert bytes_needed((512, 512), style, half, False) < 0.7 * bytes_needed((512, 512), style, vgg, False)


def test_a_painting_larger_than_the_photo_counts_at_the_size_it_is_shrunk_to(vgg):
    strip, square = torch.zeros(1, 3, 16, 900), torch.zeros(1, 3, 900, 900)
    tall = bytes_needed((16, 300), square, vgg, False)
    assert tall == pytest.approx(nst.PLAIN_BYTES * 300 * 300 / 2)
    assert bytes_needed((16, 300), strip, vgg, False) < tall / 5


@pytest.mark.parametrize(("free", "expected"), [(100 * GB, False), (0.5 * GB, True)])
def test_checkpoints_come_where_memory_is_short_or_they_are_asked_for(monkeypatch, vgg, free, expected):
    monkeypatch.setattr(nst, "free_memory", lambda device: free)
    style = torch.zeros(1, 3, 16, 16)
    assert nst.plan_memory((512, 512), [style], CONFIG, vgg)[0] is expected
    for asked in (True, False):
        assert nst.plan_memory((512, 512), [style], replace(CONFIG, checkpoint=asked), vgg)[0] is asked


def test_a_size_that_cannot_fit_is_refused_with_the_largest_that_would(monkeypatch, vgg, pictures):
    monkeypatch.setattr(nst, "free_memory", lambda device: 0.3 * GB)
    huge = torch.zeros(1, 3, 2000, 3000)
    with pytest.raises(ValueError, match=r"max_size must be at most (\d+) for the 0\.3 GB.*cpu, not 3000") as error:
        nst.stylize(huge, pictures["starry_night"], CONFIG, vgg)
    fitting = int(str(error.value).split("at most ")[1].split()[0])
    assert 300 < fitting < 3000
    for side, fits in ((fitting, True), (fitting + 2, False)):
        size = round(side * 2 / 3), side
        assert (bytes_needed(size, pictures["starry_night"], vgg, True) <= 0.3 * GB) is fits


def test_without_checkpoints_what_fits_only_with_them_is_refused_too(monkeypatch, vgg, pictures):
    """Linux lets a process take more than there is and then kills it without a word, so it is said beforehand."""
    content, style = nst.resize(pictures["china"], (400, 600)), pictures["starry_night"]
    monkeypatch.setattr(nst, "free_memory", lambda device: 0.4 * GB)
    nst.stylize(content, style, CONFIG, vgg)
    with pytest.raises(ValueError, match=r"max_size must be at most \d+ .*not 600"):
        nst.stylize(content, style, replace(CONFIG, checkpoint=False), vgg)


def test_the_estimate_adds_up_the_scales(monkeypatch, vgg, pictures):
    """With a clock that lets 1 µs a pixel pass in a step, the seconds follow by hand."""
    clock = [0.0]

    def stylize(content, style, config, network):
        pixels = (content.shape[2] + 8) * (content.shape[3] + 8)
        for _ in range(config.num_steps):
            clock[0] += 1e-6 * pixels
            yield nst.Step(1, content, {"total": torch.zeros(())})

    monkeypatch.setattr(nst, "stylize", stylize)
    monkeypatch.setattr(nst.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(nst, "free_memory", lambda device: 8 * GB)
    content, config = nst.resize(pictures["china"], (300, 400)), replace(CONFIG, num_steps=9, scales=2)
    plan = nst.plan_scales((300, 400), config)
    expected = sum((s.steps + 1) * 1e-6 * (s.size[0] + 8) * (s.size[1] + 8) for s in plan)
    told = nst.estimate(content, pictures["starry_night"], config, vgg)
    assert told.seconds == pytest.approx(expected, rel=1e-3)
    assert told.memory == bytes_needed((300, 400), pictures["starry_night"], vgg, False)
    assert told.free == 8 * GB
    lean = nst.estimate(content, pictures["starry_night"], replace(config, checkpoint=True), vgg)
    assert lean.seconds > told.seconds and lean.memory < told.memory


def test_the_estimate_is_made_with_real_steps_too(vgg, pictures):
    told = nst.estimate(pictures["china"], pictures["starry_night"], CONFIG, vgg)
    assert 0 < told.seconds < 600 and 0 < told.memory < told.free


# Memory that runs out ---------------------------------------------------------------------------

KINDS = {
    "Python": MemoryError(),
    "CUDA": torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    "MPS": RuntimeError("MPS backend out of memory (MPS allocated: 8 GB)."),
    "Linux": RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: 9 bytes"),
    "oneDNN": RuntimeError("could not create a primitive"),
    "Windows": RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: not enough memory: 9 bytes"),
}


def short_of_memory(monkeypatch, error, too_large, while_plain_only):
    """Let the losses of pictures for which ``too_large(width)`` run out of memory."""
    network_forward = nst.VGG19Features.forward

    def forward(self, image, layers=None, *, grams=(), checkpoint=False):
        if too_large(image.shape[3] - 2 * nst.MARGIN) and image.requires_grad and not (checkpoint and while_plain_only):
            raise error
        return network_forward(self, image, layers, grams=grams, checkpoint=checkpoint)

    monkeypatch.setattr(nst.VGG19Features, "forward", forward)


@pytest.mark.parametrize("error", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("scale", [0, 1, 2])
def test_where_memory_runs_out_checkpoints_take_over_at_any_scale(monkeypatch, vgg, pictures, scale, error):
    config = replace(CONFIG, scales=3, num_steps=9)
    width = nst.plan_scales(pictures["china"].shape[2:], config)[scale].size[1]
    short_of_memory(monkeypatch, error, lambda w: w == width, while_plain_only=True)
    with pytest.warns(UserWarning, match=rf"Memory ran out at {width} x \d+ pixels: .*with checkpoints") as told:
        steps = list(nst.stylize(pictures["china"], pictures["starry_night"], config, vgg))
    assert len(told) == 1
    assert [step.number for step in steps] == list(range(1, 10))
    assert steps[-1].image.shape == pictures["china"].shape


@pytest.mark.parametrize("scale", [0, 1, 2])
def test_where_even_checkpoints_do_not_fit_the_picture_ends_smaller(monkeypatch, vgg, pictures, scale):
    config = replace(CONFIG, scales=3, num_steps=9)
    width = nst.plan_scales(pictures["china"].shape[2:], config)[scale].size[1]
    short_of_memory(monkeypatch, MemoryError(), lambda w: w >= width, while_plain_only=False)
    with pytest.warns(UserWarning) as told:
        steps = list(nst.stylize(pictures["china"], pictures["starry_night"], config, vgg))
    assert [step.number for step in steps] == list(range(1, 10))
    assert "with checkpoints" in str(told[0].message) and len(told) == 2
    assert re.search(r"the result will have \d+ x \d+\.", str(told[1].message))
    image = steps[-1].image
    assert 0.5 * width < image.shape[3] < width and 0 <= image.min() and image.max() <= 1
    assert image.std() > 0.05


def test_memory_that_runs_out_in_the_middle_of_a_scale_costs_no_step(monkeypatch, vgg, pictures):
    calls = []
    backward = torch.Tensor.backward

    def fail_once(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == 4:
            raise MemoryError
        return backward(self, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "backward", fail_once)
    with pytest.warns(UserWarning, match="Memory ran out"):
        steps = list(nst.stylize(pictures["china"], pictures["starry_night"], replace(CONFIG, scales=1), vgg))
    assert [step.number for step in steps] == list(range(1, 7))
    jump = (steps[3].image - steps[2].image).abs().mean()  # it goes on from the picture that there was
    assert jump < 3 * (steps[1].image - steps[0].image).abs().mean()


def test_memory_too_short_for_any_size_is_said(monkeypatch, vgg, pictures):
    short_of_memory(monkeypatch, MemoryError(), lambda w: True, while_plain_only=False)
    with warnings.catch_warnings(), pytest.raises(MemoryError, match="no smaller picture can be painted"):
        warnings.simplefilter("ignore")
        last(nst.stylize(pictures["china"], pictures["starry_night"], CONFIG, vgg))


def test_any_other_error_is_not_taken_for_memory(monkeypatch, vgg, pictures):
    short_of_memory(monkeypatch, RuntimeError("something else"), lambda w: True, while_plain_only=False)
    with pytest.raises(RuntimeError, match="something else"):
        last(nst.stylize(pictures["china"], pictures["starry_night"], CONFIG, vgg))


def test_the_c_librarys_settings_are_put_back(monkeypatch, vgg, pictures):
    calls = []

    class Library:
        def mallopt(self, option, value):
            calls.append((option, value))

        def malloc_trim(self, pad):
            calls.append("trim")

    monkeypatch.setattr(nst.ctypes, "CDLL", lambda name: Library())
    monkeypatch.setattr(nst.sys, "platform", "linux")
    usual = [*nst.MALLOC_USUAL.items(), "trim"]
    for keep, options in ((True, nst.MALLOC_KEEP), (False, nst.MALLOC_GIVE_BACK)):
        calls.clear()
        with pytest.raises(KeyError), nst._allocator(keep):
            assert calls == [*options.items()]
            raise KeyError
        assert calls == [*options.items(), *usual] and {*options} <= {*nst.MALLOC_USUAL}
        calls.clear()
        last(
            nst.stylize(
                *[pictures[x] for x in ("china", "chelsea")], replace(CONFIG, scales=2, checkpoint=not keep), vgg
            )
        )
        assert calls == [*options.items(), *usual] * 2


def test_other_c_libraries_and_systems_are_left_alone(monkeypatch):
    monkeypatch.setattr(nst.ctypes, "CDLL", lambda name: object())
    for platform in ("linux", "darwin"):
        monkeypatch.setattr(nst.sys, "platform", platform)
        with nst._allocator(keep=True):
            pass
