"""Time and memory: what a run takes, what the machine has, and what is chosen for it."""

import math
import warnings
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
from conftest import TINY, fail, half_mask, last

import nst_helpers as nst

CPU = torch.device("cpu")
CUDA = torch.device("cuda")
GB = 1e9
NOWHERE = Path("there", "is", "no", "such", "file")


def pictures_of(size=(16, 16), style_size=(16, 16), styles=1, masks=0) -> nst.Pictures:
    """Pictures of these sizes: what a run takes depends on nothing else."""
    painting = torch.zeros(1, 3, *style_size)
    mask = torch.ones(1, 3, *size)
    return nst.Pictures(torch.zeros(1, 3, *size), [painting] * styles, [mask] * masks)


def bytes_needed(
    size=(512, 512),
    pictures=None,
    config=TINY,
    dtype=torch.float32,
    checkpoint=False,
) -> float:
    pictures = pictures or pictures_of(size)
    in_strips = nst.blocks_in_strips(size, size, checkpoint)
    return nst.bytes_needed(size, pictures, config, dtype, in_strips)


def leave_free(monkeypatch, amount: float) -> None:
    monkeypatch.setattr(nst, "free_memory", lambda device: amount)


# The bytes that a run needs ---------------------------------------------------------------------


def test_memory_grows_with_the_pixels():
    small, large = (bytes_needed((side, side)) for side in (1024, 2048))
    assert large / small == pytest.approx(4, rel=0.05)


def test_checkpoints_and_half_precision_take_less():
    plain = bytes_needed((2048, 2048))
    assert bytes_needed((2048, 2048), checkpoint=True) < plain / 3
    half = bytes_needed((2048, 2048), dtype=torch.bfloat16)
    assert plain / 3 < half < 0.8 * plain


def test_the_more_blocks_are_in_strips_the_less_memory_is_needed():
    pictures = pictures_of((512, 512))
    plain, first, all_of_them = (
        nst.bytes_needed((640, 640), pictures, TINY, torch.float32, in_strips)
        for in_strips in (0, 1, nst.ALL_BLOCKS)
    )
    assert 2 * all_of_them < first < 0.8 * plain


@pytest.mark.parametrize("checkpoint", [False, True])
def test_masks_and_lbfgs_take_more(checkpoint):
    config = replace(TINY, optimizer="adam")
    plain = bytes_needed(config=config, checkpoint=checkpoint)
    by_masks = [
        bytes_needed(
            pictures=pictures_of(styles=count, masks=count), config=config, checkpoint=checkpoint
        )
        for count in (1, 2)
    ]
    assert by_masks[0] > plain
    assert by_masks[1] - by_masks[0] == pytest.approx(by_masks[0] - plain)
    lbfgs = bytes_needed(config=replace(config, optimizer="lbfgs"), checkpoint=checkpoint)
    vector = 3 * 4 * 512 * 512  # bytes of a picture in float32
    assert lbfgs - plain > 2 * nst.LBFGS_HISTORY * vector


def test_a_blend_takes_no_more_than_one_painting():
    assert bytes_needed(pictures=pictures_of(styles=3)) == bytes_needed(pictures=pictures_of())


def test_a_large_painting_counts_at_the_size_that_it_is_looked_at():
    size = (16, 300)
    strip = bytes_needed(size, pictures_of(style_size=(16, 900)))
    square = bytes_needed(size, pictures_of(style_size=(900, 900)))
    smaller = bytes_needed(size, pictures_of(style_size=(300, 300)))
    assert square > 5 * strip
    assert square == pytest.approx(smaller)  # both are looked at with 300 x 300 pixels
    large = pictures_of(style_size=(2000, 2000))
    by_scale = [bytes_needed(size, large, replace(TINY, style_scale=scale)) for scale in (1, 2)]
    assert by_scale[1] == pytest.approx(4 * by_scale[0])
    best = replace(TINY, quality="best", style_scale=5)  # enlarges 900 pixels to 1350
    enlarged = bytes_needed(size, pictures_of(style_size=(900, 900)), best)
    as_large = bytes_needed(size, large, replace(TINY, style_scale=4.5))  # shrinks 2000 to 1350
    assert enlarged == pytest.approx(as_large)


# Checkpoints, and what does not fit -------------------------------------------------------------


def chosen(config: nst.StyleTransferConfig, side: int = 512) -> bool:
    return nst.choose_checkpoint((side, side), pictures_of(), config, CPU, torch.float32)


@pytest.mark.parametrize(("share", "expected"), [(3, False), (1, True), (0.5, True)])
def test_auto_takes_checkpoints_where_memory_is_short(monkeypatch, share, expected):
    config = replace(TINY, checkpoint="auto")
    leave_free(monkeypatch, share * bytes_needed(config=config))
    assert chosen(config) is expected


@pytest.mark.parametrize("asked", [True, False])
@pytest.mark.parametrize("free", [0.001 * GB, 1000 * GB])
def test_a_checkpoint_that_is_named_is_what_is_done(monkeypatch, asked, free):
    leave_free(monkeypatch, free)
    assert chosen(replace(TINY, checkpoint=asked)) is asked


def test_each_scale_is_painted_with_checkpoints_or_without_as_its_memory_needs(
    monkeypatch, vgg, pair
):
    seen = []
    forward = nst.VGG19Features.forward

    def note(self, image, *args, **options):
        if image.requires_grad:
            seen.append((image.shape[3] > 60, options["blocks_in_strips"]))
        return forward(self, image, *args, **options)

    monkeypatch.setattr(nst.VGG19Features, "forward", note)
    config = replace(TINY, checkpoint="auto", num_steps=4)
    photo_size = pair[0].shape[2:]
    needed = nst.bytes_needed(photo_size, nst.Pictures(pair[0], pair[1:]), config, vgg.dtype, 0)
    leave_free(monkeypatch, 1.8 * needed)  # more than half goes at full size, and less before
    result = last(nst.stylize(*pair, config, network=vgg))
    assert set(seen) == {(False, 0), (True, nst.ALL_BLOCKS)}
    assert result.record["settings"]["checkpoint"] == "auto"


def test_a_size_that_cannot_fit_is_refused_with_the_largest_that_would(monkeypatch, vgg):
    free = 0.3 * GB
    leave_free(monkeypatch, free)
    pictures = pictures_of((2000, 3000))
    config = replace(TINY, max_size=3000, checkpoint="auto")
    with pytest.raises(ValueError, match="max_size") as error:
        nst.stylize(pictures.content, pictures.styles, config, network=vgg)
    text = str(error.value)
    assert "0.3 GB" in text
    assert "3000" in text
    largest = int(text.split("at most ")[1].split()[0])
    assert 300 < largest < 3000
    for side, fits in ((largest, True), (largest + 2, False)):
        size = round(side * 2 / 3), side
        assert (bytes_needed(size, pictures, config, checkpoint=True) <= free) is fits


def test_without_checkpoints_what_fits_only_with_them_is_refused(monkeypatch, vgg):
    pictures = pictures_of((400, 600))
    plain = bytes_needed((400, 600), pictures)
    leave_free(monkeypatch, 0.9 * plain)
    for checkpoint in ("auto", True):
        config = replace(TINY, checkpoint=checkpoint)
        nst.stylize(pictures.content, pictures.styles, config, network=vgg)
        nst.estimate(pictures.content, pictures.styles, config, vgg, rate=1e-6)
    config = replace(TINY, checkpoint=False)
    with pytest.raises(ValueError, match="max_size") as error:
        nst.stylize(pictures.content, pictures.styles, config, network=vgg)
    assert "600" in str(error.value)
    with pytest.raises(ValueError, match="max_size"):
        nst.estimate(pictures.content, pictures.styles, config, vgg, rate=1e-6)


# The estimate -----------------------------------------------------------------------------------

RATE = 1e-6  # seconds a pixel


@pytest.fixture
def no_trial(monkeypatch) -> None:
    monkeypatch.setattr(nst, "paint_scale", fail(AssertionError("a picture was painted")))


@pytest.mark.usefixtures("no_trial")
def test_the_estimate_adds_up_the_scales(monkeypatch, vgg):
    leave_free(monkeypatch, 8 * GB)
    pictures = pictures_of((300, 400))
    arguments = (pictures.content, pictures.styles)
    config = replace(TINY, num_steps=40, checkpoint=False)
    plan = nst.plan_scales((300, 400), config.num_steps, config)
    work = RATE * sum(scale.work for scale in plan)
    assert len(plan) == 2
    found = nst.estimate(*arguments, config, vgg, rate=RATE)
    assert work <= found.seconds < 1.2 * work
    assert found.memory == bytes_needed((300, 400), pictures)
    assert found.free == 8 * GB
    doubled = nst.estimate(*arguments, config, vgg, rate=2 * RATE)
    assert doubled.seconds == pytest.approx(2 * found.seconds)
    lean = nst.estimate(*arguments, replace(config, checkpoint=True), vgg, rate=RATE)
    assert lean.seconds > 1.5 * found.seconds
    assert lean.memory < found.memory


@pytest.mark.usefixtures("no_trial")
def test_the_estimate_knows_masks_a_start_and_a_great_many_steps(vgg):
    photo = torch.zeros(1, 3, 300, 400)
    styles = [torch.zeros(1, 3, 16, 16)] * 2
    masks = [half_mask((300, 400), left) for left in (True, False)]
    config = replace(TINY, num_steps=40)
    plain = nst.estimate(photo, styles, config, vgg, rate=RATE)
    assert nst.estimate(photo, styles, config, vgg, masks=masks, rate=RATE).memory > plain.memory
    going_on = nst.estimate(photo, styles, config, vgg, start=photo, rate=RATE)
    assert going_on.seconds > plain.seconds  # every step at full size
    many = nst.estimate(photo, styles, replace(config, num_steps=10**9), vgg, rate=RATE)
    assert many.seconds > 10**7 * plain.seconds


@pytest.mark.usefixtures("no_trial")
@pytest.mark.parametrize(
    ("problem", "name"),
    [
        ({"masks": [torch.ones(1, 3, 64, 64)] * 2}, "masks"),
        ({"masks": [torch.zeros(1, 3, 64, 64)]}, "masks[0]"),
        ({"keep": torch.ones(1, 1, 64, 64)}, "keep"),
        ({"start": "photo.png"}, "start"),
    ],
)
def test_the_estimate_refuses_what_a_run_refuses(vgg, pair, problem, name):
    messages = []
    for call in (
        lambda: nst.estimate(*pair, TINY, vgg, rate=RATE, **problem),
        lambda: nst.stylize(*pair, TINY, network=vgg, **problem),
    ):
        with pytest.raises(ValueError, match=name.partition("[")[0]) as error:
            call()
        messages.append(str(error.value))
    assert name in messages[0]
    assert messages[0] == messages[1]


@pytest.mark.slow
def test_the_estimate_accepts_a_small_mask_on_a_large_photo(pictures):
    """Seen at the size of the trial, it would be too small for the deepest layer."""
    layers = ("relu1_1", "relu5_1")
    config = replace(TINY, max_size=512, style_layers=layers, style_layer_weights=(1, 1))
    network = nst.VGG19Features((*config.content_layers, *layers), weights="bundled")
    photo = nst.resize(pictures["china"], (342, 512))
    mask = torch.zeros_like(photo)
    mask[..., 155:187, 240:272] = 1  # 32 x 32
    arguments = {"masks": [mask], "keep": 1 - mask}
    nst.stylize(photo, pictures["starry_night"], config, network=network, **arguments)
    found = nst.estimate(photo, pictures["starry_night"], config, network, **arguments)
    assert found.seconds > 0
    assert found.memory > 0


def test_the_estimate_repeats_none_of_the_runs_warnings(vgg, pictures):
    photo, painting = pictures["china"], pictures["starry_night"]
    square = torch.ones(1, 3, 64, 64)
    config = replace(TINY, style_scale=3, seed=7)
    arguments = {"masks": [square], "keep": square, "start": square}
    with pytest.warns(nst.SettingsWarning) as said:
        nst.stylize(photo, painting, config, network=vgg, **arguments)
    assert len(said) == 5
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        nst.estimate(photo, painting, config, vgg, **arguments)


@pytest.mark.parametrize("color", nst.COLORS)
def test_the_rate_is_what_a_pixel_of_the_fastest_step_takes(monkeypatch, vgg, pair, color):
    clock = [0.0]
    speeds = iter([100, 5, 1, 3, *[2] * 100])  # the first steps of a process are slow ones
    forward = nst.VGG19Features.forward

    def tick(self, image, *args, **options):
        if image.requires_grad:
            clock[0] += next(speeds) * RATE * image[0, 0].numel()
        return forward(self, image, *args, **options)

    monkeypatch.setattr(nst.VGG19Features, "forward", tick)
    monkeypatch.setattr(nst.time, "perf_counter", lambda: clock[0])
    config = replace(TINY, color=color)
    pictures = nst.gather_pictures(*pair, masks=[torch.ones_like(pair[0])], keep=pair[0])
    assert nst.measure_rate(pictures, config, vgg) == pytest.approx(RATE)


def test_the_rate_is_measured_on_a_small_picture_and_once(monkeypatch, vgg, pictures):
    photo = nst.resize(pictures["china"], (600, 900))
    sizes = []

    def paint(image, scale, *_, **__):
        for _ in range(scale.steps):
            sizes.append(max(scale.size))
            yield image, image, {"total": torch.zeros(())}

    monkeypatch.setattr(nst, "paint_scale", paint)
    config = replace(TINY, max_size=900, checkpoint=False)
    nst.estimate(photo, pictures["starry_night"], config, vgg)
    assert max(sizes) < 300
    assert len(sizes) < 10


# The memory that is free ------------------------------------------------------------------------


def write_files(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def container_memory(folder: Path, process: str = "") -> float:
    """What the files in ``folder`` leave a process, whose own file of groups says ``process``."""
    file = folder / "process"
    file.write_text(process)
    return nst.container_memory(folder, file)


def version_2(group: str, limit: object, used: int, cache: int = 0) -> dict[str, str]:
    return {
        f"{group}memory.max": f"{limit}\n",
        f"{group}memory.current": f"{used}\n",
        f"{group}memory.stat": f"anon 5\ninactive_anon 900000\ninactive_file {cache}\nslab 7\n",
    }


def version_1(group: str, limit: object, used: int, cache: int = 0) -> dict[str, str]:
    stat = f"cache 5\ninactive_file 7\ntotal_inactive_file {cache}\ntotal_active_file 900000\n"
    return {
        f"memory/{group}memory.limit_in_bytes": f"{limit}\n",
        f"memory/{group}memory.usage_in_bytes": f"{used}\n",
        f"memory/{group}memory.stat": stat,
    }


@pytest.mark.parametrize(
    ("version", "process"),
    [
        (version_2, "0::/\n"),
        (version_1, "12:cpu,cpuacct:/\n5:memory:/\n1:name=systemd:/\n"),
    ],
)
def test_inside_a_container_its_limit_counts(tmp_path, version, process):
    """There its own group is the root of what it can see."""
    write_files(tmp_path, version("", 1000, 700, cache=50))
    assert container_memory(tmp_path, process) == 350  # the cache is given back if need be
    assert nst.container_memory(tmp_path, NOWHERE) == 350
    write_files(tmp_path, version("", 1000, 1200))
    assert container_memory(tmp_path, process) == 0  # and never less


@pytest.mark.parametrize(
    ("version", "process"),
    [
        (version_2, "0::/user/{}\n"),
        (version_1, "7:cpu:/elsewhere\n4:memory:/user/{}\n2:pids:/user\n"),
    ],
)
def test_the_tightest_of_the_groups_around_a_process_counts(tmp_path, version, process):
    write_files(tmp_path, version("user/inner/", 5000, 1000))
    write_files(tmp_path, version("user/", 2000, 1500, cache=100))
    write_files(tmp_path, version("user/other/", 10, 9))  # another one's
    write_files(tmp_path, version("elsewhere/", 10, 9))
    assert container_memory(tmp_path, process.format("inner")) == 600
    write_files(tmp_path, version("user/inner/", 1200, 1000))
    assert container_memory(tmp_path, process.format("inner")) == 200


def test_without_a_limit_or_without_groups_it_is_infinite(tmp_path):
    assert nst.container_memory(NOWHERE, NOWHERE) == math.inf
    assert container_memory(tmp_path, "0::/\n") == math.inf
    write_files(tmp_path, version_2("", "max", 700))
    assert container_memory(tmp_path, "0::/\n") == math.inf
    write_files(tmp_path, version_1("", 2**63 - 4096, 700))  # how version 1 says it
    assert container_memory(tmp_path, "4:memory:/\n") > 2**62


def test_half_of_the_files_are_no_limit(tmp_path):
    write_files(tmp_path, {"memory.max": "1000\n"})
    assert container_memory(tmp_path, "0::/\n") == math.inf
    write_files(tmp_path, {"memory.current": "300\n"})
    assert container_memory(tmp_path, "0::/\n") == 700  # no statistic is no cache


def test_the_smaller_of_machine_and_container_is_free(monkeypatch):
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=8 * GB))
    for container, expected in ((2 * GB, 2 * GB), (math.inf, 8 * GB), (16 * GB, 8 * GB)):
        monkeypatch.setattr(nst, "container_memory", lambda container=container: container)
        assert nst.free_memory(CPU) == expected


def test_on_a_gpu_what_torch_holds_without_need_is_free_too(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (3 * GB, 16 * GB))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 6 * GB)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 4 * GB)
    assert nst.free_memory(CUDA) == 5 * GB


KINDS = {
    "Python": MemoryError(),
    "CUDA": torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    "MPS": RuntimeError("MPS backend out of memory (MPS allocated: 8 GB)."),
    "Linux": RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried 9 bytes."),
    "Windows": RuntimeError("DefaultCPUAllocator: not enough memory: you tried 9 bytes."),
    "oneDNN": RuntimeError("could not create a primitive"),
}


@pytest.mark.parametrize("error", KINDS.values(), ids=KINDS)
def test_each_platforms_words_for_memory_that_ran_out_are_known(error):
    assert nst.is_out_of_memory(error)


@pytest.mark.parametrize(
    "error", [RuntimeError("shapes do not match"), ValueError("memory"), KeyboardInterrupt()]
)
def test_other_errors_are_not_taken_for_memory(error):
    assert not nst.is_out_of_memory(error)


# Devices and precisions -------------------------------------------------------------------------


def have_devices(monkeypatch, gpus: int = 0, mps: bool = False, capability=(8, 0)) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)


@pytest.mark.parametrize(
    ("gpus", "mps", "expected"), [(1, True, "cuda"), (0, True, "mps"), (0, False, "cpu")]
)
def test_auto_takes_cuda_else_mps_else_the_cpu(monkeypatch, gpus, mps, expected):
    have_devices(monkeypatch, gpus, mps)
    assert nst.pick_device() == nst.pick_device("auto") == torch.device(expected)
    assert nst.pick_device("cpu") == nst.pick_device(CPU) == CPU


def test_a_device_that_is_not_here_is_refused_with_those_that_are(monkeypatch):
    have_devices(monkeypatch)
    for name in ("cuda", "mps", "cuda:0", "gpu"):
        with pytest.raises(ValueError, match="device") as error:
            nst.pick_device(name)
        assert repr(name) in str(error.value)
        assert "cpu" in str(error.value)
    have_devices(monkeypatch, gpus=2)
    assert nst.pick_device("cuda:1") == torch.device("cuda:1")
    with pytest.raises(ValueError, match="device") as error:
        nst.pick_device("cuda:2")
    assert "cuda:1" in str(error.value)


def test_a_device_that_is_not_here_is_said_when_a_run_starts(monkeypatch, pair):
    have_devices(monkeypatch)
    config = replace(TINY, device="cuda")
    with pytest.raises(ValueError, match="device") as error:
        nst.stylize(*pair, config)
    assert "'cuda'" in str(error.value)


@pytest.mark.parametrize(
    ("capability", "expected"),
    [
        ((6, 1), torch.float32),  # no tensor cores
        ((7, 5), torch.float16),  # a T4
        ((8, 0), torch.bfloat16),
        ((9, 0), torch.bfloat16),
    ],
)
def test_auto_precision_on_a_gpu_is_what_its_tensor_cores_take(monkeypatch, capability, expected):
    have_devices(monkeypatch, 1, capability=capability)
    assert nst.pick_precision("auto", CUDA) == expected


@pytest.mark.parametrize(
    ("is_faster", "expected"), [(True, torch.bfloat16), (False, torch.float32)]
)
def test_auto_precision_on_a_cpu_is_what_proves_faster(monkeypatch, is_faster, expected):
    monkeypatch.setattr(nst, "bfloat16_is_faster", lambda: is_faster)
    assert nst.pick_precision("auto", CPU) == expected
    assert nst.pick_precision("float32", CPU) == torch.float32
    assert nst.pick_precision("auto", torch.device("mps")) == torch.float32


@pytest.mark.parametrize("ratio", [0.5, 0.99, 2])
def test_bfloat16_must_be_clearly_faster(monkeypatch, ratio):
    seconds = {torch.float32: 1.0, torch.bfloat16: ratio}
    monkeypatch.setattr(
        nst.timeit, "repeat", lambda convolve, **_: [9.0, seconds[convolve.args[0].dtype], 9.0]
    )
    nst.bfloat16_is_faster.cache_clear()
    try:
        assert nst.bfloat16_is_faster() is (ratio < 0.8)
    finally:
        nst.bfloat16_is_faster.cache_clear()


def test_a_precision_that_the_device_lacks_is_refused_with_those_that_it_has(monkeypatch):
    have_devices(monkeypatch, 1, capability=(7, 5))
    for name, device in (("bfloat16", CUDA), ("bfloat16", torch.device("mps")), ("int8", CPU)):
        with pytest.raises(ValueError, match="precision") as error:
            nst.pick_precision(name, device)
        assert repr(name) in str(error.value)
        assert "'float16'" in str(error.value)
        assert str(device) in str(error.value)


def test_nothing_is_timed_when_settings_are_made(monkeypatch):
    monkeypatch.setattr(nst, "bfloat16_is_faster", fail(AssertionError("something was timed")))
    nst.StyleTransferConfig(precision="auto", device="cpu")
    nst.StyleTransferConfig(precision="bfloat16", device="cuda")


# What the C library does with freed memory ------------------------------------------------------


@pytest.fixture
def calls(monkeypatch) -> list:
    """What the C library is asked, on any machine."""
    asked = []

    class Library:
        def mallopt(self, option, value):
            asked.append((option, value))

        def malloc_trim(self, pad):
            asked.append("trim")

    monkeypatch.setattr(nst.ctypes, "CDLL", lambda name: Library())
    monkeypatch.setattr(nst.sys, "platform", "linux")
    return asked


KEEP = [*nst.HeapOptions.KEEP]
GIVE_BACK = [*nst.HeapOptions.GIVE_BACK]
PUT_BACK = [*nst.HeapOptions.USUAL, "trim"]


def taken(calls: list) -> list:
    """What was asked since the last look."""
    found = [*calls]
    calls.clear()
    return found


def test_every_option_that_is_changed_is_put_back():
    changed = {option for option, _ in (*KEEP, *GIVE_BACK)}
    assert changed <= {option for option, _ in nst.HeapOptions.USUAL}


@pytest.mark.parametrize(("keep", "options"), [(True, KEEP), (False, GIVE_BACK)])
def test_a_run_that_fails_puts_the_options_back(calls, keep, options):
    def run():
        with nst.heap_options(keep_freed_blocks=keep):
            assert taken(calls) == options
            raise KeyError

    with pytest.raises(KeyError):
        run()
    assert taken(calls) == PUT_BACK


def test_the_last_of_several_runs_puts_the_options_back_once(calls):
    heap = nst.HeapOptions()
    heap.begin(True)
    heap.begin(True)
    assert taken(calls) == KEEP * 2
    heap.end(True)
    assert "trim" not in calls
    assert taken(calls) == KEEP  # as they were, for the other
    heap.end(True)
    assert taken(calls) == PUT_BACK


def test_while_one_run_is_short_of_memory_blocks_are_given_back(calls):
    heap = nst.HeapOptions()
    heap.begin(True)
    heap.begin(False)
    assert taken(calls) == KEEP + GIVE_BACK
    heap.begin(True)
    assert taken(calls) == GIVE_BACK
    heap.end(False)
    assert taken(calls) == KEEP  # nobody is short any more
    heap.end(True)
    heap.end(True)
    assert taken(calls)[-len(PUT_BACK) :] == PUT_BACK


@pytest.mark.parametrize("first_ends_first", [True, False])
def test_two_interleaved_runs_share_the_options(calls, vgg, pair, first_ends_first):
    config = replace(TINY, num_steps=2, scales=1, checkpoint=False)
    runs = [nst.stylize(*pair, config, network=vgg) for _ in range(2)]
    for run in runs:
        next(run)
    assert taken(calls) == KEEP * 2
    if not first_ends_first:
        runs.reverse()
    assert len(list(runs[0])) == 1
    assert "trim" not in taken(calls)
    assert next(runs[1]).number == 2
    runs[1].close()  # as a cell that is stopped does
    assert taken(calls) == PUT_BACK


@pytest.mark.parametrize(("checkpoint", "options"), [(False, KEEP), (True, GIVE_BACK)])
def test_a_run_with_checkpoints_gives_blocks_back(calls, vgg, pair, checkpoint, options):
    config = replace(TINY, num_steps=2, scales=1, checkpoint=checkpoint)
    last(nst.stylize(*pair, config, network=vgg))
    assert taken(calls) == options + PUT_BACK


@pytest.mark.parametrize("platform", ["linux", "darwin", "win32"])
def test_other_c_libraries_and_systems_are_left_alone(monkeypatch, platform):
    def library(name):
        if platform != "linux":
            raise AssertionError("this system has no such library")
        return object()  # musl, which has no such functions

    monkeypatch.setattr(nst.ctypes, "CDLL", library)
    monkeypatch.setattr(nst.sys, "platform", platform)
    with nst.heap_options(keep_freed_blocks=True):
        pass
