"""Machines: what a step asks of a GPU, float16, devices, Macs, containers, a program's settings.

No GPU is needed. A CPU stands in for one: it takes the path of a GPU, or refuses what a GPU would.
"""

import contextlib
import math
import warnings
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from conftest import (
    IMAGES,
    NAMES,
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


# Devices and dtypes -------------------------------------------------------------------------------

MPS, XPU = torch.device("mps"), torch.device("xpu")


@pytest.fixture
def have(monkeypatch):
    """A machine with these GPUs, on which ``trial`` takes the place of the small convolution."""
    convolve = nst._convolve

    def have(cuda=0, xpu=0, mps=False, capability=(8, 0), trial=convolve):
        for kind, count in (("cuda", cuda), ("xpu", xpu)):
            monkeypatch.setattr(getattr(torch, kind), "is_available", lambda count=count: count > 0)
            monkeypatch.setattr(getattr(torch, kind), "device_count", lambda count=count: count)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setattr(nst, "_convolve", lambda device, dtype: trial(CPU, dtype))

    return have


def test_auto_is_cuda_else_xpu_else_mps_else_the_cpu_and_a_device_must_be_there(have, pair):
    for cuda, xpu, mps, expected in (
        (2, 1, True, "cuda"),
        (0, 1, True, "xpu"),
        (0, 0, True, "mps"),
        (0, 0, False, "cpu"),
    ):
        have(cuda, xpu, mps)
        assert nst._pick_device("auto") == torch.device(expected)
        assert nst._pick_device("cpu") == CPU
    with pytest.raises(ValueError, match=r"^device.*'cpu'.*'cuda'"):
        nst.stylize(*pair, replace(SHALLOW, device="cuda"))
    have(cuda=2, xpu=1)
    for name in ("cuda:1", "xpu", "xpu:0"):
        assert nst._pick_device(name) == torch.device(name)
    for name in ("cuda:2", "xpu:1", "mps"):
        with pytest.raises(ValueError, match=f"^device.*'cuda:1', 'xpu', 'xpu:0'.*'{name}'"):
            nst._pick_device(name)


@pytest.mark.parametrize("gpus", [{"cuda": 1}, {"xpu": 1}, {"mps": True}])
def test_a_gpu_that_fails_a_small_convolution_is_left_alone(have, gpus):
    (name,) = gpus
    have(**gpus, trial=fail(RuntimeError("no kernel image is available\nmore\nlines")))
    with pytest.warns(nst.StyleTransferWarning, match=f"CPU.*'{name}'.*no kernel image") as caught:
        assert nst._pick_device("auto") == CPU
    assert "\n" not in str(caught[0].message)
    with pytest.raises(ValueError, match=f"^device .*'{name}'.*no kernel image"):
        nst._pick_device(name)


def test_a_warning_is_given_every_time(have):
    have(cuda=1, trial=fail(RuntimeError()))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        for _ in range(3):
            nst._pick_device("auto")
    assert len(caught) == 3
    assert {warning.filename for warning in caught} == {__file__}


@pytest.mark.parametrize(
    ("capability", "expected"),
    [((6, 1), "float32"), ((7, 0), "float16"), ((8, 0), "bfloat16"), ((9, 0), "bfloat16")],
)
def test_precision_on_a_gpu_is_what_its_tensor_cores_have(have, capability, expected):
    have(cuda=1, capability=capability)
    assert nst._pick_dtype("auto", CUDA) == getattr(torch, expected)
    assert nst._pick_dtype("float16", CUDA) == torch.float16
    for device in (MPS, CUDA) if capability < (8, 0) else (MPS,):
        with pytest.raises(ValueError, match=rf"^precision.*'float16'.*{device}.*'bfloat16'"):
            nst._pick_dtype("bfloat16", device)


def test_a_gpu_whose_float16_gives_nan_computes_in_float32(have):
    have(cuda=1, capability=(7, 5))  # a GTX 1660 says the same as a T4
    assert nst._pick_dtype("auto", CUDA) == torch.float16
    have(cuda=1, capability=(7, 5), trial=lambda device, dtype: math.nan)
    assert nst._pick_dtype("auto", CUDA) == torch.float32


@pytest.mark.parametrize(("device", "hip"), [(CPU, None), (CUDA, "6.2"), (XPU, None)])
@pytest.mark.parametrize("seconds", [0.5, 0.99, 2])
def test_elsewhere_auto_precision_is_bfloat16_if_that_is_clearly_faster(
    monkeypatch, have, device, hip, seconds
):
    have(cuda=1, xpu=1, capability=(11, 0))  # which means something else on AMD
    monkeypatch.setattr(torch.version, "hip", hip)
    taken = {torch.float32: 1.0, torch.bfloat16: seconds}
    monkeypatch.setattr(
        nst.timeit, "repeat", lambda convolve, **_: [9.0, taken[convolve.args[1]], 9.0]
    )
    monkeypatch.setattr(nst, "_bfloat16_is_faster", nst._bfloat16_is_faster.__wrapped__)  # uncached
    expected = torch.bfloat16 if seconds < 0.8 else torch.float32
    assert nst._pick_dtype("auto", device) == expected
    assert nst._pick_dtype("auto", MPS) == torch.float32


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


# Containers ---------------------------------------------------------------------------------------


@pytest.fixture
def groups(monkeypatch, tmp_path):
    """Control groups: ``groups(lines of /proc/self/cgroup, {file: text})``."""
    monkeypatch.setattr(nst, "_CONTAINER", tmp_path)
    monkeypatch.setattr(nst, "_OWN_GROUPS", tmp_path / "cgroup")

    def make(own, files):
        (tmp_path / "cgroup").write_text(own)
        for name, text in files.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(f"{text}\n")

    return make


HYBRID = "9:name=systemd:/user.slice\n4:cpu,cpuacct:/docker/x\n3:memory:/docker/x\n0::/user.slice\n"


def memory(folder, limit, used=0, cache=0, version=2):
    """A group's files of memory."""
    names = {1: ("limit_in_bytes", "usage_in_bytes"), 2: ("max", "current")}[version]
    statistics = f"anon 5\ninactive_anon 900\ninactive_file {cache}\nslab 7"
    values = zip((*names, "stat"), (limit, used, statistics), strict=True)
    return {f"{folder}/memory.{name}": value for name, value in values}


@pytest.mark.parametrize(
    ("own", "files", "expected"),
    [
        ("0::/\n", {}, 4000),
        ("0::/\n", memory(".", "max"), 4000),
        ("0::/\n", memory(".", 5000), 4000),
        ("0::/\n", memory(".", 1000, 700, 50), 350),
        ("0::/\n", memory(".", 600, 700, 50), 0),
        ("0::/system.slice/slurmstepd.scope/job_1/step_0\n", {}, 4000),
        (
            "0::/system.slice/slurmstepd.scope/job_1/step_0\n",
            memory("system.slice/slurmstepd.scope/job_1", 1000, 100)
            | memory("system.slice/slurmstepd.scope/job_1/step_0", "max"),
            900,
        ),
        ("0::/a/b\n", memory("a", 900, 200) | memory("a/b", 800), 700),
        ("0::/a/b\n", memory("a", 900) | memory("a/b", 300), 300),
        ("0::/a\n", memory("a/b", 800), 4000),  # of another process
        (HYBRID, memory("memory/docker/x", 1000, 300, version=1), 700),
        (HYBRID, memory("memory", 1000, 400, version=1), 600),  # as seen from inside
        (HYBRID, memory("memory/docker/x", 2**63 - 4096, version=1), 4000),
        (HYBRID, memory("memory/user.slice", 1000, version=1), 4000),  # of another process
    ],
)
def test_the_free_memory_is_what_all_groups_leave(monkeypatch, groups, own, files, expected):
    monkeypatch.setattr(nst.psutil, "virtual_memory", lambda: SimpleNamespace(available=4000))
    groups(own, files)
    assert nst._free_bytes(CPU) == expected


def test_without_control_groups_the_machine_has_the_last_word(monkeypatch, tmp_path):
    monkeypatch.setattr(nst, "_OWN_GROUPS", tmp_path / "missing")
    monkeypatch.setattr(nst.psutil, "virtual_memory", lambda: SimpleNamespace(available=4000))
    assert nst._free_bytes(CPU) == 4000


def test_the_free_memory_of_a_gpu_is_what_torch_may_take_or_has_reserved(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (3, 16))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 6)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 4)
    assert nst._free_bytes(CUDA) == 5


@pytest.fixture
def threads(monkeypatch):
    """How many threads torch has, and had, on a machine with eight CPUs."""
    numbers = [7]
    monkeypatch.setattr(torch, "get_num_threads", lambda: numbers[-1])
    monkeypatch.setattr(torch, "set_num_threads", numbers.append)
    monkeypatch.setattr(nst.psutil, "cpu_count", lambda: 8)
    return numbers


CPU_1 = ("cpu.cfs_quota_us", "cpu.cfs_period_us")


@pytest.mark.parametrize(
    ("own", "files", "expected"),
    [
        ("0::/\n", {}, 7),
        ("0::/\n", {"cpu.max": "max 100000"}, 7),
        ("0::/\n", {"cpu.max": "250000 100000"}, 2),
        ("0::/\n", {"cpu.max": "50000 100000"}, 1),
        ("0::/a/b\n", {"a/b/cpu.max": "max 100000", "a/cpu.max": "350000 100000"}, 3),
        (HYBRID, {f"cpu/docker/x/{CPU_1[0]}": 300000, f"cpu/docker/x/{CPU_1[1]}": 100000}, 3),
        (HYBRID, {f"cpu/{CPU_1[0]}": 200000, f"cpu/{CPU_1[1]}": 100000}, 2),
        (HYBRID, {f"cpu/{CPU_1[0]}": -1, f"cpu/{CPU_1[1]}": 100000}, 7),
    ],
)
def test_a_step_has_as_many_threads_as_the_groups_have_cpus(
    threads, groups, shallow, pair, own, files, expected
):
    groups(own, files)
    last(nst.stylize(*pair, replace(SHALLOW, num_steps=1), network=shallow))
    assert threads == [7, expected, 7, expected, 7]  # the last one to see that the run has ended


def test_interleaved_runs_leave_the_threads_of_the_caller(groups, shallow, pair):
    groups("0::/\n", {"cpu.max": "100000 100000"})
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        runs = [nst.stylize(*pair, SHALLOW, network=shallow) for _ in range(2)]
        for run in (*runs, *runs):
            next(run)
        for run in runs:
            last(run)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("precision", "busy", "expected"),
    [
        ("auto", 0.3, 7),  # one of eight CPUs stays free anyway
        ("auto", 1.4, 7),
        ("auto", 1.6, 6),
        ("auto", 5, 3),
        ("auto", 60, 1),
        ("float32", 5, 7),  # the same bits, however busy the machine is
    ],
)
def test_steps_use_the_cores_that_other_processes_leave(
    monkeypatch, threads, shallow, pair, precision, busy, expected
):
    seconds = iter(range(100))
    clock = [0.0]
    monkeypatch.setattr(nst.time, "perf_counter", lambda: clock.append(next(seconds)) or clock[-1])
    work = lambda: SimpleNamespace(user=clock[-1] * (busy + 1), system=0.0, idle=9.0)  # noqa: E731
    monkeypatch.setattr(nst.psutil, "cpu_times", work)
    monkeypatch.setattr(nst.time, "process_time", lambda: clock[-1])
    steps = nst.stylize(*pair, replace(SHALLOW, precision=precision), network=shallow)
    next(steps)
    next(steps)
    next(steps)
    assert threads[1::2] == [7, expected, expected]


# What a program may have set ----------------------------------------------------------------------


@contextlib.contextmanager
def default_device(name):
    torch.set_default_device(name)
    try:
        yield
    finally:
        torch.set_default_device(None)


@contextlib.contextmanager
def default_dtype(dtype):
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize(
    "around",
    [
        lambda: default_device("meta"),
        lambda: torch.device("meta"),
        torch.inference_mode,
        torch.no_grad,
        lambda: default_dtype(torch.float64),
    ],
)
@pytest.mark.parametrize(
    "settings", [{"noise": 0.1}, {"color": "luminance", "optimizer": "adam", "checkpoint": True}]
)
def test_what_is_set_around_a_run_does_not_reach_into_it(tmp_path, shallow, around, settings):
    def paint_file(network):
        config = replace(SHALLOW, num_steps=3, **settings)
        photo, painting = (nst.load_image(IMAGES / name, 32) for name in NAMES[:2])
        return last(nst.stylize(photo, painting, config, network=network, keep=photo))

    expected = paint_file(shallow).image
    with around():
        step = paint_file(nst.load_network(SHALLOW))
        nst.save_image(step, tmp_path)
    assert torch.equal(step.image, expected)


@pytest.mark.parametrize("name", ["StyleTransferConfig", "VGG19Features"])
def test_after_a_reload_the_error_says_so(monkeypatch, shallow, pair, name):
    monkeypatch.setattr(nst, name, type(name, (), {}))  # a new class of the same name
    with pytest.raises(ValueError, match=r"reloaded: make config and network anew\b"):
        nst.stylize(*pair, SHALLOW, network=shallow)
