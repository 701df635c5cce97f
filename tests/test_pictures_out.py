"""Pictures out: saved whole or not at all, and a PNG that remembers how it was painted."""

import errno
import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import warnings
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import IMAGES, NO_SPACE, ROOT, TINY, encoded, fail, last, record_in
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin

import nst_helpers as nst

NOW = "stylized_output_20261122_101112"
IN_A_RUN = replace(TINY, num_steps=2, scales=1)


@pytest.fixture(scope="session")
def step(vgg, pair) -> nst.Step:
    """The last step of a run."""
    return last(nst.stylize(*pair, IN_A_RUN, network=vgg))


@pytest.fixture
def one_second(monkeypatch) -> None:
    """The clock stands still, as far as names of files go."""
    monkeypatch.setattr(nst.time, "strftime", lambda form: NOW)


def without_hard_links(monkeypatch) -> None:
    """As on a memory card."""
    refused = PermissionError(errno.EPERM, "Operation not permitted")
    monkeypatch.setattr(os, "link", fail(refused))


def grey(level: int) -> torch.Tensor:
    return torch.full((1, 3, 16, 16), level / 255)


def with_settings(step: nst.Step, **changes) -> nst.Step:
    """The step as if it had been painted with other settings."""
    record = {**step.record, "settings": {**step.record["settings"], **changes}}
    return replace(step, record=record)


# Saving -----------------------------------------------------------------------------------------


def test_on_the_way_out_numbers_are_clamped_and_rounded():
    image = torch.tensor([-0.5, 0.5, 1.5]).view(1, 3, 1, 1).expand(1, 3, 2, 2)
    assert nst.to_pil(image).getpixel((0, 0)) == (0, 128, 255)


@settings(max_examples=25, deadline=None)
@given(st.integers(16, 70), st.integers(16, 70), st.integers(0, 2**32 - 1))
def test_a_picture_survives_saving_and_loading_bit_for_bit(tmp_path_factory, width, height, seed):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    image = nst.load_image(Image.fromarray(pixels))
    assert np.array_equal(np.asarray(nst.to_pil(image)), pixels)
    path = nst.save_image(image, tmp_path_factory.mktemp("out"))
    assert torch.equal(nst.load_image(path), image)


def test_a_picture_is_named_after_the_time(tmp_path):
    before = nst.time.strftime("stylized_output_%Y%m%d_%H%M%S")
    path = nst.save_image(grey(0), tmp_path)
    after = nst.time.strftime("stylized_output_%Y%m%d_%H%M%S")
    assert path.parent == tmp_path
    assert before <= path.stem <= after
    assert path.suffix == ".png"


@pytest.mark.parametrize("has_links", [True, False])
@pytest.mark.usefixtures("one_second")
def test_no_other_file_is_overwritten(monkeypatch, tmp_path, has_links):
    if not has_links:
        without_hard_links(monkeypatch)
    folder = tmp_path / "new" / "folder"
    paths = [nst.save_image(grey(level), folder) for level in range(3)]
    assert [path.name for path in paths] == [f"{NOW}.png", f"{NOW}_2.png", f"{NOW}_3.png"]
    assert sorted(folder.iterdir()) == sorted(paths)  # and no draft
    for level, path in enumerate(paths):
        assert torch.equal(nst.load_image(path), grey(level))


@pytest.mark.usefixtures("one_second")
def test_runs_that_end_in_the_same_second(tmp_path):
    """Several runs end in the same second"""
    images = [grey(level) for level in range(16)]
    threads = [threading.Thread(target=nst.save_image, args=(image, tmp_path)) for image in images]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    saved = sorted(nst.load_image(path).mean().item() for path in tmp_path.iterdir())
    assert saved == pytest.approx([level / 255 for level in range(16)])


@pytest.mark.parametrize("has_links", [True, False])
def test_a_picture_gets_its_name_when_it_is_whole(monkeypatch, tmp_path, step, has_links):
    """So whenever the program is killed, what is called .png is a picture."""
    calls = []

    def note(name, function):
        def noting(source, target, **options):
            assert torch.equal(nst.load_image(source), (step.image * 255).round() / 255)
            assert list(tmp_path.glob("*.png")) == []
            calls.append(name)
            return function(source, target, **options)

        return noting

    if has_links:
        monkeypatch.setattr(os, "link", note("link", os.link))
    else:
        without_hard_links(monkeypatch)
        for name in ("rename", "replace"):
            monkeypatch.setattr(os, name, note(name, getattr(os, name)))
    path = nst.save_image(step, tmp_path)
    assert len(calls) == 1
    assert list(tmp_path.iterdir()) == [path]


def fail_on_the_way(monkeypatch, place: str) -> None:
    if place == "name":
        for name in ("link", "rename", "replace"):
            monkeypatch.setattr(os, name, fail(NO_SPACE))
        for name in ("rename", "replace", "hardlink_to"):
            monkeypatch.setattr(Path, name, fail(NO_SPACE))
    elif place == "open":
        monkeypatch.setattr(Path, "open", fail(NO_SPACE))
    else:
        monkeypatch.setattr(os, place, fail(NO_SPACE))


PLACES = ["mkdir", "open", "fsync", "name"]


@pytest.mark.parametrize("place", PLACES)
def test_a_disk_that_is_full_before_the_run(monkeypatch, tmp_path, place):
    """The disk is full, or the folder read-only, before the run"""
    folder = tmp_path / "outputs"
    with monkeypatch.context() as patch:
        fail_on_the_way(patch, place)
        with pytest.raises(OSError, match=NO_SPACE.strerror) as error:
            nst.prepare_output_folder(folder)
    assert str(folder) in str(error.value)
    assert [path for path in tmp_path.rglob("*") if path != folder] == []
    assert nst.prepare_output_folder(folder) == folder
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("place", PLACES)
def test_a_disk_that_is_full_when_the_picture_is_saved(monkeypatch, tmp_path, step, place):
    """The disk is full, or the folder read-only, when the picture is saved"""
    folder = tmp_path / "full"
    with monkeypatch.context() as patch:
        fail_on_the_way(patch, place)
        with pytest.raises(OSError, match=NO_SPACE.strerror) as error:
            nst.save_image(step, folder)
    assert str(folder) in str(error.value)
    assert "save_image(" in str(error.value)  # how to save it elsewhere
    assert [path for path in tmp_path.rglob("*") if path != folder] == []
    elsewhere = nst.save_image(step, tmp_path / "elsewhere")
    assert torch.equal(nst.load_image(elsewhere), (step.image * 255).round() / 255)


def test_a_file_where_the_folder_should_be_is_an_os_error(tmp_path):
    taken = tmp_path / "outputs"
    taken.write_text("mine")
    for write in (nst.prepare_output_folder, lambda folder: nst.save_image(grey(0), folder)):
        with pytest.raises(OSError, match="exists") as error:
            write(taken)
        assert str(taken) in str(error.value)
    assert taken.read_text() == "mine"


def test_a_folder_that_vanishes_is_made_again(tmp_path):
    folder = nst.prepare_output_folder(tmp_path / "outputs")
    folder.rmdir()
    assert nst.save_image(grey(0), folder).is_file()


@pytest.mark.parametrize("picture", [torch.zeros(3, 20, 20), np.zeros((20, 20, 3)), "china.jpg"])
def test_what_is_no_picture_is_not_saved(tmp_path, picture):
    with pytest.raises(ValueError, match="picture"):
        nst.save_image(picture, tmp_path / "outputs")
    assert list(tmp_path.iterdir()) == []


# Transparency -----------------------------------------------------------------------------------


def transparent_photo(kind: str) -> bytes:
    """60 x 40 pixels, the left half transparent."""
    picture = Image.new("RGBA", (60, 40), (200, 30, 30, 255))
    picture.paste((0, 0, 0, 0), (0, 0, 30, 40))
    exif = Image.Exif()
    if kind == "palette":
        picture = picture.quantize()
    elif kind == "grey":
        picture = picture.convert("LA")
    elif kind == "turned":
        picture = picture.transpose(Image.Transpose.ROTATE_90)
        exif[0x0112] = 6  # the EXIF orientation
    return encoded(picture, exif=exif)


@pytest.mark.parametrize("kind", ["colour", "palette", "grey", "turned"])
def test_a_transparent_photo_comes_back_as_transparent(tmp_path, kind):
    photo = transparent_photo(kind)
    image = nst.load_image(photo, 30)
    assert image.shape == (1, 3, 20, 30)
    with Image.open(nst.save_image(image, tmp_path, photo=photo)) as saved:
        assert saved.mode == "RGBA"
        assert saved.size == (30, 20)
        assert [saved.getpixel((x, 10))[3] for x in (5, 25)] == [0, 255]
        assert torch.equal(nst.load_image(saved.convert("RGB")), image)  # the alpha alone is new
    with Image.open(nst.save_image(image, tmp_path)) as saved:
        assert saved.mode == "RGB"


def test_an_opaque_photo_gives_an_opaque_picture(tmp_path, pictures):
    path = nst.save_image(pictures["china"], tmp_path, photo=IMAGES / "china.jpg")
    with Image.open(path) as saved:
        assert saved.mode == "RGB"


def test_a_photo_that_is_gone_when_the_picture_is_saved(tmp_path, step):
    """The photo's file is gone when the picture is saved"""
    gone = tmp_path / "gone.png"
    with pytest.warns(nst.PictureWarning, match=r"gone\.png"):
        path = nst.save_image(step, tmp_path / "out", photo=gone, paintings=[gone])
    assert nst.load_image(path).shape == step.image.shape
    record = record_in(path)
    assert record["photo"]["sha256"] is None
    assert record["paintings"][0]["sha256"] is None


# Timelapse --------------------------------------------------------------------------------------


def test_a_timelapse_has_every_picture_at_the_last_ones_size_and_holds_the_last(tmp_path):
    images = [torch.full((1, 3, 20 + 2 * i, 40 + 4 * i), i / 4) for i in range(5)]
    path = nst.save_timelapse(images, tmp_path)
    assert path.suffix == ".webp"
    assert list(tmp_path.iterdir()) == [path]
    times = []
    shades = []
    with Image.open(path) as film:
        assert film.n_frames == 5
        assert film.size == (56, 28)
        assert film.info["loop"] == 0
        for number in range(5):
            film.seek(number)
            film.load()
            times.append(film.info["duration"])
            shades.append(film.convert("RGB").getpixel((20, 10))[0])
    assert len(set(times[:-1])) == 1
    assert times[-1] >= 10 * times[0]
    assert shades == pytest.approx([0, 64, 128, 191, 255], abs=4)


def test_a_timelapse_of_nothing_is_refused_by_name(tmp_path):
    with pytest.raises(ValueError, match="images"):
        nst.save_timelapse([], tmp_path)


# A copy on disk while it is painted -------------------------------------------------------------

SCRIPT = """
import sys
import nst_helpers as nst
config = nst.StyleTransferConfig(
    weights="bundled", precision="float32", device="cpu", max_size=64, num_steps=10**6, scales=1
)
photo, painting = (nst.load_image(path, config.max_size) for path in sys.argv[1:3])
for step in nst.autosave(nst.stylize(photo, painting, config), sys.argv[3]):
    print(step.number, flush=True)
"""


@pytest.mark.slow
def test_a_killed_run(tmp_path):
    """The program is killed, or the power fails"""
    sources = [str(IMAGES / name) for name in ("china.jpg", "starry_night.jpg")]
    command = [sys.executable, "-c", SCRIPT, *sources, str(tmp_path)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as run:
        for line in run.stdout:
            if int(line) == 3:
                run.kill()
    assert run.returncode == -signal.SIGKILL
    (path,) = tmp_path.iterdir()
    assert re.fullmatch(r"stylized_output_\d{8}_\d{6}\.partial\.png", path.name)
    assert nst.load_image(path).std() > 0.05
    assert nst.settings_from_png(path).num_steps == 10**6
    record = record_in(path)
    assert record["step"] >= 1
    assert record["finished"] is False


@pytest.fixture
def clock(monkeypatch) -> list[float]:
    """What time.monotonic() says: the one number in this list."""
    now = [1000.0]
    monkeypatch.setattr(nst.time, "monotonic", lambda: now[0])
    return now


def steps_of(step: nst.Step, count: int) -> list[nst.Step]:
    """``count`` steps such as ``stylize`` yields."""
    steps = []
    for number in range(1, count + 1):
        record = {**step.record, "step": number, "finished": number == count}
        steps.append(replace(step, number=number, total=count, record=record))
    return steps


def test_the_copy_is_renewed_every_20_seconds_and_removed_at_the_end(clock, tmp_path, step):
    seen = []
    passed_on = []
    for given_step in nst.autosave(steps_of(step, 6), tmp_path):
        (path,) = tmp_path.iterdir()  # never two of them, never half of one
        assert path.name.endswith(".partial.png")
        seen.append(record_in(path)["step"])
        passed_on.append(given_step.number)
        clock[0] += 9
    assert passed_on == [1, 2, 3, 4, 5, 6]
    assert seen == [1, 1, 1, 4, 4, 4]
    assert list(tmp_path.iterdir()) == []


def test_the_older_copy_is_there_until_the_newer_is_whole(monkeypatch, clock, tmp_path, step):
    copies = []
    fsync = os.fsync

    def note(descriptor):
        copies.append(len(list(tmp_path.glob("*.partial.png"))))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", note)
    for _ in nst.autosave(steps_of(step, 3), tmp_path):
        clock[0] += 21
    assert copies == [0, 1, 1]


def test_the_copy_of_a_run_that_breaks_off_stays(tmp_path, step):
    def broken_run():
        yield from steps_of(step, 3)[:2]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        list(nst.autosave(broken_run(), tmp_path))
    (path,) = tmp_path.iterdir()
    assert path.name.endswith(".partial.png")
    assert record_in(path)["finished"] is False


def test_a_disk_that_is_full_during_the_run(monkeypatch, clock, tmp_path, step):
    """The disk is full during the run"""
    steps = nst.autosave(steps_of(step, 4), tmp_path)
    next(steps)
    (first_copy,) = tmp_path.iterdir()
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail(NO_SPACE))
        clock[0] += 21
        with pytest.warns(nst.RecoveryWarning, match=NO_SPACE.strerror):
            assert next(steps).number == 2
        clock[0] += 9
        assert next(steps).number == 3  # not tried anew at each step
    assert list(tmp_path.iterdir()) == [first_copy]
    assert [later.number for later in steps] == [4]
    assert list(tmp_path.iterdir()) == []


def test_a_copy_that_somebody_has_removed_is_not_missed(tmp_path, step):
    copy_on_disk = nst.PartialPicture(tmp_path)
    copy_on_disk.remove()  # there is none yet
    copy_on_disk.update(step)
    copy_on_disk.path.unlink()
    copy_on_disk.remove()
    copy_on_disk.remove()
    assert list(tmp_path.iterdir()) == []


def test_a_copy_that_cannot_be_removed_does_not_stop_the_run(monkeypatch, clock, tmp_path, step):
    """As on Windows, while another program shows it."""
    unlink = Path.unlink

    def refuse(path, *arguments, **options):
        if path.name.endswith(".partial.png"):
            raise PermissionError(13, "Permission denied")
        unlink(path, *arguments, **options)

    monkeypatch.setattr(Path, "unlink", refuse)
    steps = nst.autosave(steps_of(step, 3), tmp_path)
    assert next(steps).number == 1
    clock[0] += 21
    with pytest.warns(nst.RecoveryWarning, match="Permission denied"):
        passed_on = [later.number for later in steps]
    assert passed_on == [2, 3]


# The picture remembers --------------------------------------------------------------------------


def repaint(sources: list[Path], config: nst.StyleTransferConfig, network=None) -> nst.Step:
    photo, painting = (nst.load_image(source, config.max_size) for source in sources)
    return last(nst.stylize(photo, painting, config, network=network))


def test_a_files_name_in_place_of_a_folder_is_refused(tmp_path, pair):
    with pytest.raises(ValueError, match="folder") as error:
        nst.save_image(pair[0], tmp_path / "out.png")
    assert "out.png" in str(error.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("photo_width", [640, 48])
def test_the_same_picture_again(tmp_path, vgg, photo_width):
    """You want to know how a picture was made, or to make it again

    A photo smaller than max_size is not enlarged, and the painting is loaded at max_size then.
    """
    photo = tmp_path / "photo.png"
    with Image.open(IMAGES / "china.jpg") as original:
        height = round(photo_width * original.height / original.width)
        original.resize((photo_width, height)).save(photo)
    sources = [photo, IMAGES / "starry_night.jpg"]
    config = replace(TINY, max_size=72, noise=0.1, seed=7, color="content", checkpoint=False)
    step = repaint(sources, config, vgg)
    path = nst.save_image(step, tmp_path / "out", photo=sources[0], paintings=sources[1:])
    again = nst.settings_from_png(path)
    assert again == nst.settings_from_png(path.read_bytes())
    assert torch.equal(repaint(sources, again).image, step.image)


def test_the_record_says_how_the_picture_came_about(tmp_path, vgg, pair, step):
    sources = [IMAGES / "china.jpg", IMAGES / "starry_night.jpg"]
    path = nst.save_image(step, tmp_path, photo=sources[0], paintings=sources[1:])
    record = record_in(path)
    assert record == nst.read_record(path) == nst.read_record(path.read_bytes())
    assert nst.StyleTransferConfig(**record["settings"]) == nst.settings_from_png(path)
    described = [record["photo"], *record["paintings"]]
    assert [known["sha256"] for known in described] == [
        hashlib.sha256(source.read_bytes()).hexdigest() for source in sources
    ]
    assert [known["size"] for known in described] == [[*image.shape[:1:-1]] for image in pair]
    assert record["version"] == 2
    assert record["step"] == IN_A_RUN.num_steps
    assert record["finished"] is True
    assert record["seconds"] >= 0
    assert record["notes"] == []
    assert record["weights"] == {"source": "bundled", "sha256": vgg.sha256}
    assert record["packages"]["torch"] == torch.__version__
    assert record["threads"] == torch.get_num_threads()
    assert str(ROOT) not in json.dumps(record)


def test_of_sources_that_are_no_files_the_record_has_their_bytes(tmp_path, step):
    data = (IMAGES / "china.jpg").read_bytes()
    painting = Image.new("RGB", (20, 30), "red")
    path = nst.save_image(step, tmp_path, photo=data, paintings=[painting])
    record = record_in(path)
    assert record["photo"]["sha256"] == hashlib.sha256(data).hexdigest()
    assert record["paintings"][0]["sha256"] == hashlib.sha256(painting.tobytes()).hexdigest()
    assert record_in(nst.save_image(step, tmp_path))["photo"]["sha256"] is None


def test_a_picture_on_the_way_says_that_it_is_not_finished(vgg, pair, tmp_path):
    first = next(nst.stylize(*pair, IN_A_RUN, network=vgg))
    record = record_in(nst.save_image(first, tmp_path))
    assert record["step"] == 1
    assert record["finished"] is False


def test_the_record_belongs_to_the_step_and_not_to_its_pixels(tmp_path, step):
    for image in (step.image, step.image.clone(), nst.load_image(nst.save_image(step, tmp_path))):
        with Image.open(nst.save_image(image, tmp_path)) as picture:
            assert picture.text == {}
    brighter = replace(step, image=(step.image + 0.1).clamp(0, 1))
    assert record_in(nst.save_image(brighter, tmp_path)) == step.record


def test_what_auto_came_to_is_what_is_remembered(monkeypatch, vgg, pair):
    names = ("precision", "device", "weights", "checkpoint", "scales")
    config = replace(IN_A_RUN, scales=2, **dict.fromkeys(names[:4], "auto"))
    steps = nst.stylize(*pair, config, network=vgg)
    remembered = last(steps).record["settings"]
    assert [remembered[name] for name in names] == ["float32", "cpu", "bundled", False, 2]

    def only_at_full_size(size, *_):
        return max(size) == 64

    monkeypatch.setattr(nst, "choose_checkpoint", only_at_full_size)
    mixed = last(nst.stylize(*pair, config, network=vgg))
    assert mixed.record["settings"]["checkpoint"] == "auto"


def test_given_settings_replace_those_in_the_file(tmp_path, step):
    path = nst.save_image(step, tmp_path)
    changed = nst.settings_from_png(path, num_steps=99, weights="torchvision")
    expected = replace(nst.settings_from_png(path), num_steps=99, weights="torchvision")
    assert changed == expected
    with pytest.raises(ValueError, match="num_steps"):
        nst.settings_from_png(path, num_steps=0)


def test_a_picture_painted_with_pictures_and_weights_of_ones_own(tmp_path, vgg, pair):
    """It was painted with a mask, or with weights, of your own"""
    photo, painting = pair
    mask = torch.rand(1, 3, *photo.shape[2:])
    for name, own in {"keep": mask, "masks": [mask], "start": painting}.items():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", nst.SettingsWarning)  # the start is stretched
            steps = nst.stylize(photo, painting, IN_A_RUN, network=vgg, **{name: own})
        path = nst.save_image(last(steps), tmp_path)
        remembered = record_in(path)["own_pictures"][name]
        picture = own[0] if name == "masks" else own
        digest = hashlib.sha256(picture.numpy().tobytes()).hexdigest()
        assert remembered == ([digest] if name == "masks" else digest)
        with pytest.warns(nst.SettingsWarning, match=name) as said:
            assert nst.settings_from_png(path).num_steps == IN_A_RUN.num_steps
        assert len(said) == 1


def test_weights_of_ones_own_must_be_given_again(tmp_path, step):
    digest = f"sha256:{'ab' * 32}"
    path = nst.save_image(with_settings(step, weights=digest), tmp_path)
    with pytest.raises(ValueError, match="weights") as error:
        nst.settings_from_png(path)
    assert digest in str(error.value)
    assert nst.settings_from_png(path, weights="my_vgg19.pth").weights == "my_vgg19.pth"


weight = st.floats(0, 1e6) | st.integers(0, 10**6)
positive = st.floats(1e-6, 100)


@settings(max_examples=25, deadline=None)
@given(
    st.fixed_dictionaries(
        {
            "num_steps": st.integers(1, 10**9),
            "scales": st.just("auto") | st.integers(1, 5),
            "content_weight": st.floats(0.1, 1e6),
            "style_weight": weight,
            "tv_weight": weight,
            "color": st.sampled_from(nst.COLORS),
            "style_scale": st.floats(0.1, 1),
            "style_blend": st.just("equal") | st.tuples(positive),
            "optimizer": st.sampled_from(nst.OPTIMIZERS),
            "learning_rate": positive,
            "init": st.sampled_from(nst.STARTS),
            "noise": positive,
            "seed": st.integers(0, 2**63 - 1),
        }
    )
)
def test_settings_survive_the_png_to_the_last_bit(tmp_path_factory, step, values):
    config = replace(TINY, checkpoint=False, **values)
    painted = with_settings(step, **json.loads(json.dumps(nst.asdict(config))))
    path = nst.save_image(painted, tmp_path_factory.mktemp("out"))
    assert nst.settings_from_png(path) == config


# A PNG on another machine, of another version, from elsewhere -----------------------------------


@pytest.fixture
def no_gpu(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)


@pytest.mark.usefixtures("no_gpu")
@pytest.mark.parametrize("device", ["cuda", "cuda:1", "mps"])
@pytest.mark.parametrize("precision", ["float16", "bfloat16", "float32"])
def test_a_picture_of_a_gpu_is_read_on_a_machine_without(tmp_path, step, device, precision):
    path = nst.save_image(with_settings(step, device=device, precision=precision), tmp_path)
    assert nst.read_record(path)["settings"]["device"] == device
    with pytest.warns(nst.SettingsWarning, match=device):
        config = nst.settings_from_png(path)
    assert config.device == "auto"
    nst.pick_precision(config.precision, nst.pick_device(config.device))  # it can be painted
    assert config.num_steps == IN_A_RUN.num_steps


def test_a_precision_that_the_gpu_here_lacks_becomes_auto(monkeypatch, tmp_path, step):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))  # a T4
    path = nst.save_image(with_settings(step, device="cuda", precision="bfloat16"), tmp_path)
    with pytest.warns(nst.SettingsWarning, match="bfloat16") as said:
        config = nst.settings_from_png(path)
    assert len(said) == 1
    assert config.device == "cuda"
    assert config.precision == "auto"


SETTINGS_1 = {  # as version 1 wrote them
    "max_size": 300,
    "num_steps": 75,
    "scales": "auto",
    "content_weight": 2.5,
    "style_weight": 30.0,
    "tv_weight": 2.0,
    "color": "luminance",
    "style_scale": 0.5,
    "style_blend": [2, 1],
    "masks": [],
    "keep": None,
    "init": "noise",
    "optimizer": "lbfgs",
    "learning_rate": 0.02,
    "content_layers": ["relu4_2"],
    "style_layers": ["relu1_1", "relu2_1"],
    "style_layer_weights": [4.0, 2.0],
    "pooling": "average",
    "weights": "bundled",
    "precision": "float32",
    "checkpoint": False,
    "device": "cpu",
    "noise": 0.0,
    "seed": 3,
}
RECORD_1 = {
    "version": 1,
    "settings": SETTINGS_1,
    "photo": {"sha256": "ab" * 32, "size": [300, 200]},
    "paintings": [{"sha256": None, "size": [300, 237]}],
    "weights": {"source": "bundled", "sha256": "cd" * 32},
    "packages": {"torch": "2.9.0", "torchvision": "0.24.0", "pillow": "12.0.0"},
    "threads": 2,
    "step": 75,
    "finished": True,
    "seconds": 21.3,
    "notes": [],
}


def png_with(text: str, **options) -> bytes:
    """A PNG with this text where its record would be."""
    texts = PngImagePlugin.PngInfo()
    texts.add_text("style_transfer", text, **options)
    return encoded(Image.new("RGB", (20, 20)), pnginfo=texts)


def png_of_version_1(**changes) -> bytes:
    return png_with(json.dumps(RECORD_1 | {"settings": SETTINGS_1 | changes}))


def test_a_png_of_version_1_is_still_read():
    data = png_of_version_1()
    assert nst.read_record(data) == RECORD_1
    config = nst.settings_from_png(data)
    pictures = ("masks", "keep")  # which are no settings any more
    expected = {name: value for name, value in SETTINGS_1.items() if name not in pictures}
    as_json = json.loads(json.dumps(nst.asdict(config)))
    assert {name: as_json[name] for name in expected} == expected


@pytest.mark.parametrize(
    ("name", "value", "called"),
    [
        ("masks", [f"sha256:{'ef' * 32}"], "masks"),
        ("keep", f"sha256:{'ef' * 32}", "keep"),
        ("init", f"sha256:{'ef' * 32}", "start"),  # as it is called today
    ],
)
def test_pictures_among_the_settings_of_version_1_must_be_given_again(name, value, called):
    with pytest.warns(nst.SettingsWarning, match=called) as said:
        config = nst.settings_from_png(png_of_version_1(**{name: value}))
    assert len(said) == 1
    assert config.num_steps == SETTINGS_1["num_steps"]
    assert config.init in nst.STARTS


@pytest.mark.usefixtures("no_gpu")
def test_a_png_of_version_1_of_a_gpu_is_read_without_one():
    data = png_of_version_1(device="cuda", precision="float16")
    with pytest.warns(nst.SettingsWarning, match="cuda"):
        assert nst.settings_from_png(data).device == "auto"


def test_weights_of_ones_own_of_version_1_must_be_given_again():
    with pytest.raises(ValueError, match="weights"):
        nst.settings_from_png(png_of_version_1(weights=f"sha256:{'ef' * 32}"))


def record_with(**changes) -> str:
    """A record in today's format, with as little as can be."""
    return json.dumps({"version": 2, "settings": {"weights": "bundled"}} | changes)


def settings_with(**changes) -> str:
    return record_with(settings={"weights": "bundled"} | changes)


ELSEWHERE = {
    "no JSON": "{",
    "a list": "[]",
    "a number": "1",
    "nothing": "null",
    "deep": "[" * 60_000,
    "oversized": record_with() + " " * 70_000,
    "a long number": '{"version": ' + "9" * 50_000 + "}",
    "newer": record_with(version=3),
    "a version of another kind": record_with(version=["2"] * 1000),
    "no version": '{"settings": {"weights": "bundled"}}',
    "no settings": '{"version": 2}',
    "no settings in version 1": '{"version": 1}',
    "settings of another kind": record_with(settings=[1]),
    "a path": settings_with(weights="/etc/passwd"),
    "a path in version 1": record_with(version=1, settings={"weights": "/etc/passwd"}),
    "weights of another kind": settings_with(weights=["bundled"]),
    "no weights": record_with(settings={}),
    "a setting of the wrong kind": settings_with(num_steps="many"),
    "a setting out of range": settings_with(num_steps=0),
    "a long value": settings_with(color="very " * 10_000 + "\n blue"),
    "unhashable layers": settings_with(style_layers=[[1], {}]),
    "an unknown setting": settings_with(__class__=1),
    "a setting called self": settings_with(self=1, cls=2),
    "a setting with a long name": settings_with(**{"num_steps\n" * 5000: 1}),
    "not a number": '{"version": 2, "settings": {"weights": "bundled", "style_weight": NaN}}',
    "a device that is none": settings_with(device="cuda:0; rm -rf /"),
}


@pytest.mark.parametrize("text", ELSEWHERE.values(), ids=ELSEWHERE)
def test_settings_from_elsewhere(tmp_path, text):
    """A PNG from elsewhere is given to `settings_from_png`"""
    path = tmp_path / "elsewhere.png"
    path.write_bytes(png_with(text))
    with pytest.raises(ValueError, match=r"elsewhere\.png") as error:
        nst.settings_from_png(path)
    assert len(str(error.value)) < 1000
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "own",
    [{"masks": 7, "keep": [[]]}, ["masks"], "masks", 1],
    ids=["odd", "list", "text", "number"],
)
def test_odd_pictures_of_ones_own_do_no_harm(own):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", nst.SettingsWarning)
        config = nst.settings_from_png(png_with(record_with(own_pictures=own)))
    assert config == nst.StyleTransferConfig(weights="bundled")


def many_texts() -> bytes:
    texts = PngImagePlugin.PngInfo()
    for number in range(70):
        texts.add_text(f"text{number}", "a" * 10**6, zip=True)
    return encoded(Image.new("RGB", (20, 20)), pnginfo=texts)


NO_RECORDS = {
    "a text that swells": png_with("a" * 10**7, zip=True),
    "many texts that swell": many_texts(),
    "a picture without a record": (IMAGES / "chelsea.png").read_bytes(),
    "a photo": (IMAGES / "china.jpg").read_bytes(),
    "nothing": b"",
    "the start of another format": b"GIF89a",
    "the start of a PNG": b"\x89PNG\r\n\x1a\n",
}


@pytest.mark.parametrize("data", NO_RECORDS.values(), ids=NO_RECORDS)
@pytest.mark.parametrize("read", [nst.read_record, nst.settings_from_png])
def test_a_file_without_a_record_is_refused_by_name(tmp_path, read, data):
    path = tmp_path / "other.png"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"other\.png"):
        read(path)
    with pytest.raises(ValueError, match="uploaded"):
        read(data)


@pytest.mark.parametrize("read", [nst.read_record, nst.settings_from_png])
def test_a_missing_file_is_file_not_found(tmp_path, read):
    for name in ("nowhere.png", "long" * 100):
        with pytest.raises(FileNotFoundError) as error:
            read(tmp_path / name)
        assert name in str(error.value)
    with pytest.raises(ValueError, match="folder"):
        read(tmp_path)


def test_no_pixel_is_decoded_to_read_the_record(monkeypatch, tmp_path, step):
    path = nst.save_image(step, tmp_path)
    decoded = AssertionError("the pixels were decoded")
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", fail(decoded))
    assert nst.read_record(path)["step"] == IN_A_RUN.num_steps


def test_a_record_that_was_damaged_or_tampered_with_is_no_way_in(tmp_path, step):
    """A bit of the text that flips is noticed by the PNG's own checksum."""
    data = nst.save_image(step, tmp_path).read_bytes()
    value = b'"num_steps": 2'
    place = data.index(value)
    flipped = data.replace(value, b'"num_steps": 3')
    cut_off = data[: place + 20]
    for damaged in (flipped, cut_off):
        with pytest.raises(ValueError, match="uploaded"):
            nst.settings_from_png(damaged)
    start = data.index(b"tEXtstyle_transfer")
    end = start + 4 + int.from_bytes(data[start - 4 : start], "big")
    text = data[start:end].replace(value, b'"num_steps": 0')
    forged = data[:start] + text + zlib.crc32(text).to_bytes(4, "big") + data[end + 4 :]
    with pytest.raises(ValueError, match="num_steps") as error:
        nst.settings_from_png(forged)
    assert "0" in str(error.value)
