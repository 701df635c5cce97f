"""Machines: what a step asks of a GPU, float16, GPUs that torch cannot use, Macs, containers.

No GPU is needed. A CPU stands in for one: it takes the path of a GPU, or refuses what a GPU would.
"""

import math
import warnings
from collections import Counter
from dataclasses import replace

import pytest
import torch
from conftest import (
    IMAGES,
    SHALLOW,
    TINY,
    assert_close,
    break_looks,
    fail,
    half_mask,
    last,
    needs_half,
    note_looks,
    paint,
)
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import nst_helpers as nst

CPU = torch.device("cpu")
CUDA = torch.device("cuda")


# Fewer operations on a GPU ------------------------------------------------------------------------


@pytest.fixture
def like_a_gpu(monkeypatch):
    monkeypatch.setattr(nst, "_is_gpu", lambda device: True)


@pytest.mark.parametrize("optimizer", ["lbfgs", "adam"])
@pytest.mark.parametrize("color", ["style", "luminance"])
@pytest.mark.parametrize("masks", [False, True])
def test_a_gpu_paints_the_same_picture(monkeypatch, shallow, pair, optimizer, color, masks):
    content, style = pair
    settings = {"optimizer": optimizer, "color": color, "num_steps": 8}
    styles = [style, 1 - style] if masks else style
    if masks:
        settings["masks"] = [half_mask((42, 64)), half_mask((42, 64), left=False)]
    expected = paint(content, styles, shallow, **settings)
    monkeypatch.setattr(nst, "_is_gpu", lambda device: True)
    assert_close(paint(content, styles, shallow, **settings), expected, atol=0.1 / 255)


@pytest.fixture
def two_regions(vgg, pictures):
    """The targets of a photo and two paintings with a region each, and what is seen in a canvas."""
    config = replace(TINY, style_layer_weights=(1, 2, 0.5, 0))
    canvas, photo, *styles = (nst.resize(picture, (32, 48)) for picture in pictures.values())
    canvas = nst._pad(canvas)
    guides = {layer: torch.ones(2, 1, 1, 1) for layer in config.style_layers}
    regions = nst._Regions(guides, (0.3, 0.7))
    job = nst.Job(photo, styles, config, vgg, scales=[])
    layers = nst._Layers(config.content_layers, config.style_layers, config.style_layer_weights)
    targets = nst._find_targets(vgg, photo, styles, job, layers, regions)
    seen = vgg.look(canvas, config.content_layers, config.style_layers, guides)
    return targets, config, (canvas, *seen)


def test_the_losses_of_a_gpu_are_those_of_the_method(two_regions):
    targets, config, seen = two_regions
    expected = nst._calculate_losses(targets, config, *seen)
    found = nst._FastLosses(targets, config)(*seen)
    for name, loss in expected.items():
        torch.testing.assert_close(found[name], loss, rtol=1e-4, atol=0)


class CountOperations(TorchDispatchMode):
    """Counts what a GPU would be asked to do: views and allocations are Python's alone."""

    FREE = ("view", "detach", "permute", "transpose", "expand", "squeeze", "select", "slice")
    ALSO_FREE = ("alias", "split", "aten.t.", "as_strided", "empty", "reshape", "lift_fresh")

    def __init__(self):
        super().__init__()
        self.operations = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not any(name in str(func) for name in self.FREE + self.ALSO_FREE):
            self.operations[str(func)] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.usefixtures("like_a_gpu")
def test_a_step_on_a_gpu_is_few_operations_and_one_wait(vgg, pair):
    steps = nst.stylize(*pair, replace(TINY, scales=1, num_steps=9), network=vgg)
    for _ in range(6):  # L-BFGS has its whole history by then
        next(steps)
    with CountOperations() as count:
        next(steps)
    assert count.operations.total() <= 160  # 431 on a CPU, at the same scale
    assert count.operations["aten._local_scalar_dense.default"] == 1


@pytest.mark.usefixtures("like_a_gpu")
@pytest.mark.parametrize(
    ("checkpoint", "free", "strips"),
    [("auto", 1e11, [0, 0]), ("auto", 25e6, [0, 1]), ("auto", 18e6, [0, 5]), (False, 1e6, [0, 0])],
)
def test_a_gpu_uses_strips_only_where_memory_is_short(
    monkeypatch, vgg, pair, checkpoint, free, strips
):
    monkeypatch.setattr(nst, "_free_bytes", lambda device: free)
    monkeypatch.setattr(nst, "_check_memory", lambda job: None)
    config = replace(TINY, quality="normal", checkpoint=checkpoint)
    job = nst._make_job(*pair, config, vgg)
    assert [scale.strips for scale in job.scales] == strips


# float16 ------------------------------------------------------------------------------------------


@needs_half
@pytest.mark.slow
def test_a_dark_painting_stays_in_float16(pictures):
    dark = pictures["starry_night"] * 0.03
    photo = nst.shrink_to(pictures["china"], 96)
    config = replace(TINY, max_size=96, scales=1, num_steps=4)
    expected = last(nst.stylize(photo, dark, config))
    found = last(nst.stylize(photo, dark, replace(config, precision="float16")))
    assert found.job.notes == ()
    assert found.job.network.dtype == torch.float16
    assert found.job.factor.value < 1
    for name, loss in expected.losses.items():
        assert found.losses[name].item() == pytest.approx(loss.item(), rel=0.02)


@pytest.fixture(scope="module")
def half():
    return nst.load_network(replace(SHALLOW, precision="float16"))


def make_infinite(content, style):
    content["relu2_1"].register_hook(lambda gradient: gradient * math.inf)
    return content, style


@needs_half
def test_a_step_whose_gradient_overflows_in_float16_is_repeated(monkeypatch, half, pair):
    config = replace(SHALLOW, num_steps=4, scales=1, max_size=24)
    photo, painting = (nst.shrink_to(picture, 24) for picture in pair)
    expected = last(nst.stylize(photo, painting, config, network=half))
    looks = note_looks(monkeypatch)
    break_looks(monkeypatch, 3, make_infinite)
    steps = list(nst.stylize(photo, painting, config, network=half))
    assert [step.number for step in steps] == [1, 2, 3, 4]
    assert sum(of_canvas for *_, of_canvas in looks) == 5
    assert steps[-1].job.notes == ()
    assert steps[-1].job.factor.value == 1 / 8
    assert_close(steps[-1].image, expected.image, atol=0.5 / 255)


def test_the_factor_grows_again_and_runs_out():
    factor = nst._Factor()
    for _ in range(100):
        factor.grow()
    assert factor.value == 1  # never above what is needed
    assert factor.shrink()
    assert factor.shrink()
    for _ in range(nst._STEPS_TO_GROW):
        factor.grow()
    assert factor.value == 1 / 8
    assert [factor.shrink() for _ in range(6)] == [True] * 5 + [False]


@needs_half
def test_when_the_factor_runs_out_a_run_goes_on_in_float32(monkeypatch, half, pair):
    look = nst._FastVGG19.look

    def overflow(self, image, *args, **kwargs):
        seen = look(self, image, *args, **kwargs)
        is_step = image.requires_grad and self.dtype == torch.float16
        return make_infinite(*seen) if is_step else seen

    monkeypatch.setattr(nst._FastVGG19, "look", overflow)
    config = replace(SHALLOW, num_steps=2, scales=1, max_size=24)
    photo, painting = (nst.shrink_to(picture, 24) for picture in pair)
    with pytest.warns(nst.StyleTransferWarning, match=r"1.*float16.*float32"):
        assert last(nst.stylize(photo, painting, config, network=half)).image.isfinite().all()


# GPUs that this torch cannot use ------------------------------------------------------------------

ARCHES = ("sm_70", "sm_75", "sm_80", "sm_86", "sm_90a", "compute_90")


@pytest.fixture
def gpu(monkeypatch):
    """One NVIDIA GPU; returns what a test may change about it."""
    found = {"capability": (8, 0), "arches": ARCHES, "trial": lambda dtype: 576.0}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla Model 7")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: found["capability"])
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: list(found["arches"]))
    monkeypatch.setattr(nst, "_convolve", lambda device, dtype: found["trial"](dtype))
    return found


@pytest.mark.parametrize(
    ("capability", "arches", "is_usable"),
    [
        ((7, 5), ARCHES, True),  # Colab's T4
        ((8, 9), ARCHES, True),  # sm_86 runs on 8.9
        ((12, 0), ARCHES, True),  # compiled from compute_90 when needed
        ((12, 0), ARCHES[:-1], False),
        ((6, 0), ARCHES, False),  # Kaggle's P100
        ((7, 0), ("sm_75", "sm_80", "compute_120"), False),  # a V100 with newer wheels
        ((8, 0), ("sm_86",), False),
    ],
)
def test_a_gpu_that_torch_has_no_code_for_is_left_alone(gpu, capability, arches, is_usable):
    gpu.update(capability=capability, arches=arches)
    if is_usable:
        assert nst._pick_device("auto") == nst._pick_device("cuda") == CUDA
        return
    number = "sm_{}{}".format(*capability)
    with pytest.warns(nst.StyleTransferWarning, match=rf"CPU.*Tesla Model 7 \({number}\)"):
        assert nst._pick_device("auto") == CPU
    for name in ("cuda", "cuda:0"):
        with pytest.raises(ValueError, match=rf"^device .*'{name}'.*Tesla Model 7"):
            nst._pick_device(name)


def test_a_gpu_that_fails_a_small_convolution_is_left_alone(gpu):
    gpu["trial"] = fail(RuntimeError("CUDA error: no kernel image is available\nmore\nlines"))
    with pytest.warns(nst.StyleTransferWarning, match="Model 7.*no kernel image") as caught:
        assert nst._pick_device("auto") == CPU
    assert "\n" not in str(caught[0].message)


def test_capability_means_something_else_on_amd(monkeypatch, gpu):
    monkeypatch.setattr(torch.version, "hip", "6.2")
    gpu.update(capability=(11, 0), arches=("gfx1100",))
    assert nst._pick_device("auto") == CUDA
    monkeypatch.setattr(nst, "_bfloat16_is_faster", lambda device: True)
    assert nst._pick_dtype("auto", CUDA) == torch.bfloat16
    monkeypatch.setattr(nst, "_bfloat16_is_faster", lambda device: False)
    assert nst._pick_dtype("auto", CUDA) == torch.float32


def test_a_gpu_whose_float16_gives_nan_computes_in_float32(gpu):
    gpu["capability"] = (7, 5)  # a GTX 1660 says the same as a T4
    assert nst._pick_dtype("auto", CUDA) == torch.float16
    gpu["trial"] = lambda dtype: math.nan if dtype == torch.float16 else 576.0
    assert nst._pick_dtype("auto", CUDA) == torch.float32


def test_the_trial_is_a_convolution():
    assert nst._convolve(CPU, torch.float32) == 64 * 9


@pytest.mark.parametrize(
    ("device", "expected"), [("cpu", "normal"), ("cuda", "best"), ("mps", "normal")]
)
def test_auto_quality_is_what_the_device_can_afford(device, expected):
    device = torch.device(device)
    assert nst._resolve_quality(nst.StyleTransferConfig(), device).quality == expected
    quick = nst.StyleTransferConfig(quality="quick")
    assert nst._resolve_quality(quick, device) == quick


def test_a_run_and_its_record_have_the_resolved_quality(shallow, pair, tmp_path):
    config = replace(SHALLOW, quality="auto", num_steps=1)
    step = last(nst.stylize(*pair, config, network=shallow))
    assert step.job.config.quality == "normal"
    assert step.picture.shape[3] == 80  # a quarter larger than the result
    record = nst.read_record(nst.save_image(step, tmp_path))
    assert record["settings"]["quality"] == "normal"


# Macs ---------------------------------------------------------------------------------------------


class Apple(torch.Tensor):
    """A tensor on a device without float64; what is computed from it is there too."""

    device = torch.device("mps")

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        return super().__torch_function__(func, types, args, kwargs or {})


class LikeAMac(TorchFunctionMode):
    """The CPU, but what is moved to "mps" or made there cannot be float64, as on Apple's GPUs.

    The words are those of pytorch's issue 122602.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        name = getattr(func, "__name__", "")
        if name == "cpu":
            return args[0].as_subclass(torch.Tensor)
        values = [*args, *kwargs.values()]
        to_mps = any(isinstance(value, torch.device) and value.type == "mps" for value in values)
        if to_mps and name == "to":
            args = (args[0], *(CPU if value == Apple.device else value for value in args[1:]))
        if to_mps and "device" in kwargs:
            kwargs["device"] = CPU
        result = func(*args, **kwargs)
        is_there = to_mps or any(isinstance(value, Apple) for value in values)
        if not isinstance(result, torch.Tensor) or not is_there:
            return result
        if result.dtype == torch.float64:
            raise TypeError("Cannot convert a MPS Tensor to float64 dtype")
        return result if isinstance(result, Apple) else result.as_subclass(Apple)


@pytest.mark.parametrize("optimizer", ["lbfgs", "adam"])
@pytest.mark.parametrize("color", ["style", "content", "luminance"])
def test_nothing_is_in_float64_on_a_mac(monkeypatch, shallow, tmp_path, color, optimizer):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(nst.VGG19Features, "device", Apple.device)
    mask = half_mask((42, 64))
    config = replace(SHALLOW, color=color, optimizer=optimizer, device="mps")
    files = [IMAGES / "china.jpg", IMAGES / "starry_night.jpg", IMAGES / "stained_glass.jpg"]
    with LikeAMac():
        photo, *paintings = (nst.load_image(file, 64, device="mps") for file in files)
        assert all(isinstance(picture, Apple) for picture in (photo, *paintings))
        given = {"masks": [mask, 1 - mask], "keep": mask}
        step = last(nst.stylize(photo, paintings, config, network=shallow, **given))
        assert isinstance(step.picture, Apple)
        nst.save_image(step, tmp_path)
        assert nst.estimate(photo, paintings, config, shallow).seconds > 0
        sources = {"photo": files[0], "painting": files[1]}
        panel = nst.Panel(config, sources, tmp_path, network=shallow)
        assert "64 x 43 pixels" in panel.chosen.value


def test_the_stand_in_for_a_mac_refuses_float64():
    with LikeAMac():
        image = torch.ones(2).to(Apple.device)
        for convert in (torch.Tensor.double, lambda tensor: tensor.to(torch.float64)):
            with pytest.raises(TypeError, match="float64"):
                convert(image)
        assert (image + 1).cpu().double().dtype == torch.float64


# Containers ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("limit", "expected"),
    [("250000 100000", 2), ("350000 100000", 3), ("50000 100000", 1), ("max 100000", 7), (None, 7)],
)
def test_a_run_has_as_many_threads_as_its_container_has_cpus(
    monkeypatch, tmp_path, shallow, pair, limit, expected
):
    monkeypatch.setattr(nst, "_CONTAINER", tmp_path)
    if limit is not None:
        (tmp_path / "cpu.max").write_text(f"{limit}\n")
    threads = [7]
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads[-1])
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    last(nst.stylize(*pair, SHALLOW, network=shallow))
    assert threads == [7, expected, 7]


# Warnings -----------------------------------------------------------------------------------------


def test_a_warning_is_given_every_time(monkeypatch, gpu):
    gpu["capability"] = (3, 5)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        for _ in range(3):
            nst._pick_device("auto")
    assert len(caught) == 3
    assert {warning.filename for warning in caught} == {__file__}
