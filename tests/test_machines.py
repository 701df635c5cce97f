"""Machines: what a step asks of a GPU, float16, GPUs that torch cannot use, Macs, containers.

No GPU is needed. A CPU stands in for one: it takes the path of a GPU, or refuses what a GPU would.
"""

import math
import warnings
from dataclasses import replace

import pytest
import torch
from conftest import (
    ARCHES,
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
    replace_looks,
)
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import nst_helpers as nst

CPU = torch.device("cpu")
CUDA = torch.device("cuda")


class CountWaits(TorchDispatchMode):
    """Counts how often Python asks for a number, for which it would wait for a GPU."""

    waits = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.waits += "local_scalar_dense" in str(func)
        return func(*args, **(kwargs or {}))


def test_a_step_waits_for_a_gpu_once(vgg, pair):
    steps = nst.stylize(*pair, replace(TINY, scales=1, num_steps=9), network=vgg)
    for _ in range(6):  # L-BFGS has its whole history by then
        next(steps)
    with CountWaits() as count:
        next(steps)
    assert count.waits == 1


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
    assert sum(look.is_canvas for look in looks) == 5
    assert steps[-1].job.notes == ()
    assert_close(steps[-1].image, expected.image, atol=0.5 / 255)


@needs_half
def test_the_gradient_is_smaller_for_20_steps_after_an_overflow(monkeypatch, half, pair):
    sizes = []

    def overflow_once(gradient):
        sizes.append(gradient.abs().mean().item())
        return gradient * math.inf if len(sizes) == 1 else gradient

    def see(asked, look):
        content, style = look(*asked)
        if asked.is_canvas:
            content["relu2_1"].register_hook(overflow_once)
        return content, style

    replace_looks(monkeypatch, see)
    standing_still = {"learning_rate": 1e-7, "init": "noise"}
    config = replace(SHALLOW, num_steps=25, scales=1, **standing_still)
    photo, painting = (nst.shrink_to(picture, 24) for picture in pair)
    last(nst.stylize(photo, painting, config, network=half))
    expected = [1] + [1 / 8] * 20 + [1] * 5
    assert [size / sizes[0] for size in sizes] == pytest.approx(expected, rel=0.05)


@needs_half
def test_when_the_factor_runs_out_a_run_goes_on_in_float32(monkeypatch, half, pair):
    def see(asked, look):
        seen = look(*asked)
        is_half = asked.network.dtype == torch.float16
        return make_infinite(*seen) if asked.is_canvas and is_half else seen

    replace_looks(monkeypatch, see)
    config = replace(SHALLOW, num_steps=2, scales=1, max_size=24)
    photo, painting = (nst.shrink_to(picture, 24) for picture in pair)
    with pytest.warns(nst.StyleTransferWarning, match=r"1.*float16.*float32"):
        assert last(nst.stylize(photo, painting, config, network=half)).image.isfinite().all()


# GPUs that this torch cannot use ------------------------------------------------------------------


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
