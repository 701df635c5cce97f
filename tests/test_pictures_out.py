"""Pictures out: saved whole or not at all, and a PNG that remembers how it was painted."""

import errno
import hashlib
import io
import json
import re
import threading
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import IMAGES, NO_SPACE, ROOT, SHALLOW, encoded, fail, half_mask, last, record_in
from PIL import ExifTags, Image, ImageCms, PngImagePlugin

import nst_helpers as nst

NOW = "stylized_output_20261122_101112"
IN_A_RUN = replace(SHALLOW, num_steps=2, scales=1)
SOURCES = [IMAGES / "china.jpg", IMAGES / "starry_night.jpg"]


@pytest.fixture(scope="session")
def step(shallow, pair) -> nst.Step:
    """The last step of a run."""
    return last(nst.stylize(*pair, IN_A_RUN, network=shallow))


@pytest.fixture
def one_second(monkeypatch):
    """The clock stands still, as far as names of files go."""
    now = "20261122_101112"
    monkeypatch.setattr(nst.time, "strftime", lambda form: form.replace("%Y%m%d_%H%M%S", now))


def grey(level: int) -> torch.Tensor:
    return torch.full((1, 3, 16, 16), level / 255)


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


# Saving -------------------------------------------------------------------------------------------


def test_colours_are_clamped_and_rounded():
    image = torch.tensor([-0.5, 0.5, 1.5]).view(1, 3, 1, 1).expand(1, 3, 2, 2)
    assert nst.to_pil(image).getpixel((0, 0)) == (0, 128, 255)


def test_a_picture_survives_saving_and_loading_bit_for_bit(tmp_path):
    image = torch.randint(0, 256, (1, 3, 33, 47)) / 255
    assert torch.equal(nst.load_image(nst.save_image(image, tmp_path)), image)


@pytest.mark.usefixtures("one_second")
def test_threads_that_save_in_the_same_second_keep_all_pictures(tmp_path):
    folder = tmp_path / "new" / "folder"
    images = [grey(level) for level in range(16)]
    threads = [threading.Thread(target=nst.save_image, args=(image, folder)) for image in images]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    names = [f"{NOW}.png", *(f"{NOW}_{number}.png" for number in range(2, 17))]
    assert sorted(path.name for path in folder.iterdir()) == sorted(names)
    saved = sorted(nst.load_image(path).mean().item() for path in folder.iterdir())
    assert saved == pytest.approx([level / 255 for level in range(16)])


def write_ten_bytes(path, data):
    with path.open("wb") as file:
        file.write(data[:10])
    raise NO_SPACE


@pytest.mark.parametrize(
    ("method", "broken"), [("mkdir", fail(NO_SPACE)), ("write_bytes", write_ten_bytes)]
)
@pytest.mark.parametrize("can_rename", [True, False])
def test_a_full_disk_leaves_no_part_of_a_file(
    monkeypatch, tmp_path, step, method, broken, can_rename
):
    folder = tmp_path / "full"
    for write in (nst.prepare_output_folder, lambda folder: nst.save_image(step, folder)):
        with monkeypatch.context() as patch:
            patch.setattr(Path, method, lambda *args, **options: broken(*args))
            if not can_rename:
                patch.setattr(Path, "replace", fail(OSError(errno.ENOSYS, "Not supported")))
            with pytest.raises(OSError, match=NO_SPACE.strerror) as error:
                write(folder)
        assert str(folder) in str(error.value)
        assert write is nst.prepare_output_folder or error.value.step is step
        assert [path for path in tmp_path.rglob("*") if path != folder] == []
    assert nst.prepare_output_folder(folder) == folder
    assert list(folder.iterdir()) == []


@pytest.mark.usefixtures("one_second")
@pytest.mark.parametrize("number", ["EACCES", "ENOSYS", "EPERM", "ENOTSUP"])
@pytest.mark.parametrize("times", [1, 99])
def test_a_lock_or_a_mount_that_cannot_rename_loses_no_picture(
    monkeypatch, tmp_path, number, times
):
    move, failed = Path.replace, []

    def replace_later(self, target):
        if len(failed) < times:
            failed.append(target)
            raise OSError(getattr(errno, number), "Not now")
        return move(self, target)

    monkeypatch.setattr(Path, "replace", replace_later)
    paths = [nst.save_image(grey(level), tmp_path) for level in (7, 8)]
    assert [path.name for path in paths] == [f"{NOW}.png", f"{NOW}_2.png"]
    assert sorted(tmp_path.iterdir()) == sorted(paths)
    assert all(map(torch.equal, map(nst.load_image, paths), (grey(7), grey(8))))


def test_until_a_file_is_whole_its_name_holds_nothing(monkeypatch, tmp_path):
    """A program that is killed leaves no half of a picture that looks like a whole one."""
    sizes = []

    def look(self, target):
        sizes.append((self.stat().st_size, target.stat().st_size))
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", look)
    with pytest.raises(KeyboardInterrupt):
        nst.save_image(grey(7), tmp_path)
    ((written, claimed),) = sizes
    assert written > claimed == 0
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("folder", ["out.png", "OUT.JPG", "https://example.org/out"])
def test_names_of_files_and_addresses_are_refused(monkeypatch, tmp_path, folder):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="picture"):
        nst.save_image(folder, tmp_path)
    for write in (nst.prepare_output_folder, lambda folder: nst.save_image(grey(7), folder)):
        with pytest.raises(ValueError, match=f"folder .*{folder}"):
            write(folder)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("given", ["~/my out", "'{}/my out'", "file://{}/my%20out", '"{}/my out" '])
def test_a_folder_is_taken_as_people_paste_it(monkeypatch, tmp_path, given):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    folder = given.format(tmp_path)
    assert nst.prepare_output_folder(folder) == tmp_path / "my out"
    assert nst.save_image(grey(7), folder).parent == tmp_path / "my out"
    assert [*tmp_path.iterdir()] == [tmp_path / "my out"]


@pytest.mark.parametrize(
    "folder",
    [
        "drive/MyDrive/out",
        "gdrive/My Drive",
        "{}/drive/Shareddrives/a",
        "/content/drive",
        "/content/gdrive/x",
    ],
)
def test_a_folder_in_a_google_drive_that_is_not_mounted_is_refused(monkeypatch, tmp_path, folder):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(OSError, match="mount"):
        nst.prepare_output_folder(folder.format(tmp_path))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["content/drive_results", "drive/results", "gdrive/MyDrive/out"])
def test_other_folders_and_a_drive_that_is_mounted_are_written_to(monkeypatch, tmp_path, name):
    monkeypatch.setattr(nst.os.path, "ismount", lambda path: path == str(tmp_path / "gdrive"))
    assert nst.prepare_output_folder(tmp_path / name) == tmp_path / name


# Transparency -------------------------------------------------------------------------------------


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
def test_the_result_is_as_transparent_as_the_photo(tmp_path, kind):
    photo = transparent_photo(kind)
    image = nst.load_image(photo, 30)
    with Image.open(nst.save_image(image, tmp_path, photo=photo)) as saved:
        assert saved.mode == "RGBA"
        assert saved.size == (30, 20)
        assert [saved.getpixel((x, 10))[3] for x in (5, 25)] == [0, 255]
        assert torch.equal(nst.load_image(saved.convert("RGB")), image)  # the alpha alone is new


def test_the_photo_is_decoded_once_for_many_saves(monkeypatch, tmp_path):
    """Its transparency is asked for at each move of the panel's Strength."""
    path = tmp_path / "photo.png"
    path.write_bytes(transparent_photo("colour"))
    nst.save_image(grey(9), tmp_path, photo=path)
    with monkeypatch.context() as patch:
        patch.setattr("PIL.ImageFile.ImageFile.load", fail(AssertionError("it was decoded")))
        nst.save_image(grey(9), tmp_path, photo=path)
    path.write_bytes(encoded(Image.new("RGB", (60, 40))))  # another one of this name
    with Image.open(nst.save_image(grey(9), tmp_path, photo=path)) as saved:
        assert saved.mode == "RGB"


def test_a_picture_is_saved_even_if_its_photo_is_gone(tmp_path, step):
    gone, picture = tmp_path / "gone.png", Image.new("RGB", (20, 30), "red")
    with pytest.warns(nst.StyleTransferWarning, match=r"gone\.png"):
        path = nst.save_image(step, tmp_path / "out", photo=gone, paintings=[picture])
    assert nst.load_image(path).shape == step.image.shape
    record = record_in(path)
    assert (record["photo"], record["paintings"]) == (None, [None])


# Formats ------------------------------------------------------------------------------------------

FORMATS = {"png": "png", "jpeg": "jpg", "webp": "webp"}
EXIF, GPS = ExifTags.IFD.Exif, ExifTags.IFD.GPSInfo
WHEN, WHERE = "2026:11:22 10:11:12", (52.0, 30.0, 12.5)


def photo_with_exif(kind: str = "JPEG", **more) -> bytes:
    """60 x 40 pixels, taken by a camera that was held upright and knew where it was."""
    exif = Image.Exif()
    exif.update({ExifTags.Base[name]: value for name, value in more.items()})
    exif[ExifTags.Base.Make], exif[ExifTags.Base.Model] = "Maker", "Model 7"
    exif[ExifTags.Base.Orientation] = 6
    exif[ExifTags.Base.Artist] = "somebody"
    exif[EXIF] = {
        ExifTags.Base.DateTimeOriginal: WHEN,
        ExifTags.Base.MakerNote: b"secret" * 20_000 if kind == "PNG" else b"secret",
        ExifTags.Base.UserComment: b"ASCII\0\0\0of the photo",
    }
    exif[GPS] = {ExifTags.GPS.GPSLatitudeRef: "N", ExifTags.GPS.GPSLatitude: WHERE}
    return encoded(Image.new("RGB", (60, 40), "red"), kind, exif=exif.tobytes())


@pytest.mark.parametrize("format", FORMATS)
def test_every_format_holds_the_picture_and_its_settings(tmp_path, step, format):
    path = nst.save_image(step, tmp_path, format=format)
    assert path.suffix == f".{FORMATS[format]}"
    assert (nst.load_image(path) - step.image).abs().mean() < (0.003 if format == "png" else 0.02)
    if format != "png":
        assert b"\x92\x86\0\7" in path.read_bytes()  # UserComment, undefined, as EXIF has it
    png = nst.save_image(step, tmp_path)
    assert nst.read_record(path) == nst.read_record(path.read_bytes()) == record_in(png)
    assert nst.read_settings(path) == nst.read_settings(png)


@pytest.mark.parametrize("format", FORMATS)
def test_every_format_says_that_it_is_srgb(tmp_path, format):
    with Image.open(nst.save_image(grey(128), tmp_path, format=format)) as saved:
        assert saved.format == format.upper()
        if format == "png":
            assert saved.info["srgb"] == 0
        else:
            opened = ImageCms.getOpenProfile(io.BytesIO(saved.info["icc_profile"]))
            assert "sRGB" in ImageCms.getProfileDescription(opened)
        if format == "jpeg":  # it keeps the colour of every pixel
            assert [component[1:3] for component in saved.layer] == [(1, 1)] * 3


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("format", FORMATS)
def test_the_date_the_place_and_the_camera_are_kept_if_asked_for(tmp_path, step, kind, format):
    photo = photo_with_exif(kind)
    path = nst.save_image(step, tmp_path, photo=photo, format=format, keep_exif=True)
    with Image.open(path) as saved:
        exif = saved.getexif()
        details, place = exif.get_ifd(EXIF), exif.get_ifd(GPS)
    del exif[EXIF], exif[GPS]
    assert dict(exif) == {ExifTags.Base.Make: "Maker", ExifTags.Base.Model: "Model 7"}
    assert details.pop(ExifTags.Base.DateTimeOriginal) == WHEN
    assert place == {ExifTags.GPS.GPSLatitudeRef: "N", ExifTags.GPS.GPSLatitude: WHERE}
    if format != "png":
        assert details.pop(ExifTags.Base.ColorSpace) == 1
        assert b"of the photo" not in details.pop(ExifTags.Base.UserComment)
    assert details == {}
    assert nst.read_record(path)["photo"] == hashlib.sha256(photo).hexdigest()


@pytest.mark.parametrize("format", FORMATS)
def test_nothing_of_the_photos_exif_is_kept_unless_asked_for(tmp_path, step, format):
    path = nst.save_image(step, tmp_path, photo=photo_with_exif(), format=format)
    assert not re.search(b"Maker|2026:11:22|somebody|secret", path.read_bytes())
    with Image.open(path) as saved:
        assert saved.getexif().get_ifd(GPS) == {}


def test_nothing_is_kept_of_a_photo_without_exif(tmp_path, step):
    picture = Image.new("RGB", (60, 40))
    for photo in (encoded(picture), picture, np.asarray(picture)):
        with Image.open(nst.save_image(step, tmp_path, photo=photo, keep_exif=True)) as saved:
            assert dict(saved.getexif()) == {}


def test_exif_of_a_very_large_photo_is_kept(monkeypatch, tmp_path, step):
    with monkeypatch.context() as patch:
        patch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)  # the photo has more than twice that
        path = nst.save_image(step, tmp_path, photo=photo_with_exif(), keep_exif=True)
    with Image.open(path) as saved:
        assert saved.getexif()[ExifTags.Base.Make] == "Maker"


BAD_EXIF = {
    "too long": photo_with_exif(LensModel="long" * 2000),
    "damaged": photo_with_exif("WEBP").replace(b"MM\0*", b"XX\0*"),
}


@pytest.mark.parametrize("photo", BAD_EXIF.values(), ids=BAD_EXIF)
def test_a_picture_is_saved_without_exif_that_cannot_be_kept(tmp_path, step, photo):
    with pytest.warns(nst.StyleTransferWarning, match="date"):
        path = nst.save_image(step, tmp_path, photo=photo, format="jpeg", keep_exif=True)
    assert nst.read_record(path)["finished"]
    assert b"Maker" not in path.read_bytes()


@pytest.mark.parametrize("format", FORMATS)
def test_the_resolution_is_written_in_dots_per_inch(tmp_path, step, format):
    with Image.open(nst.save_image(step, tmp_path, format=format, dpi=300)) as saved:
        exif, dpi = saved.getexif(), saved.info.get("dpi")
    if format != "png":
        assert exif[ExifTags.Base.XResolution] == exif[ExifTags.Base.YResolution] == 300
        assert exif[ExifTags.Base.ResolutionUnit] == 2
    assert format == "webp" or dpi == pytest.approx((300, 300), rel=1e-4)


@pytest.mark.parametrize(
    ("name", "value"),
    [("format", "JPG"), ("format", None), ("dpi", 0), ("dpi", 70_000), ("keep_exif", True)],
)
def test_other_formats_and_resolutions_are_refused(tmp_path, step, name, value):
    with pytest.raises(ValueError, match=f"{name} .*{value!r}"):
        nst.save_image(step, tmp_path, **{name: value})
    assert list(tmp_path.iterdir()) == []


def test_a_webp_is_as_transparent_as_the_photo_and_a_jpeg_white_there(tmp_path):
    photo = transparent_photo("colour")
    black = torch.zeros(1, 3, 20, 30)
    with Image.open(nst.save_image(black, tmp_path, photo=photo, format="webp")) as saved:
        assert [saved.getpixel((x, 10))[3] for x in (5, 25)] == [0, 255]
    with pytest.warns(nst.StyleTransferWarning, match="JPEG"):
        path = nst.save_image(black, tmp_path, photo=photo, format="jpeg")
    with Image.open(path) as saved:
        levels = [saved.getpixel((x, 10))[0] for x in (5, 25)]
    assert levels == pytest.approx([255, 0], abs=4)
    opaque = encoded(Image.new("RGBA", (60, 40), "red"))
    nst.save_image(black, tmp_path, photo=opaque, format="jpeg")  # without a warning


@pytest.mark.parametrize(
    ("photo", "paintings", "beginning"),
    [
        ("my/Löwe 1.jpg", ["https://example.org/a/candy.png?size=2"], "Löwe_1_in_candy_"),
        (Path("lion.jpg"), ["candy.jpg", "la muse.jpg"], "lion_in_candy_and_la_muse_"),
        ("l" * 99, ["c" * 99], f"{'l' * 40}_in_{'c' * 40}_"),
        ("獅" * 99, ["candy"], f"{'獅' * 13}_in_candy_"),
        (b"", ["candy"], "stylized_output_"),
        ("lion", [b""], "stylized_output_"),
        ("lion", [], "stylized_output_"),
    ],
)
def test_a_result_is_named_after_its_pictures(photo, paintings, beginning):
    assert f"{nst._result_name(photo, paintings)}_" == beginning


@pytest.mark.parametrize(
    "name", ["../x", "a/b", r"a\b", "a:b", "..", ".x", "", "x" * 300, "é" * 150, "a\nb"]
)
def test_a_name_that_is_no_files_is_refused(tmp_path, name):
    with pytest.raises(ValueError, match="name must be"):
        nst.save_image(grey(9), tmp_path / "out", name=name)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("one_second")
def test_a_file_can_be_named(tmp_path):
    path = nst.save_image(grey(9), tmp_path, name="lion 100%d")
    assert path.name == "lion 100%d_20261122_101112.png"
    long = nst.save_image(grey(9), tmp_path, name="x" * 200)
    assert long.name == f"{'x' * 200}_20261122_101112.png"


@pytest.mark.parametrize("one", [str(SOURCES[1]), SOURCES[1], SOURCES[1].read_bytes()])
def test_one_painting_may_be_given_alone(tmp_path, step, one):
    path = nst.save_image(step, tmp_path, photo=SOURCES[0], paintings=one)
    assert record_in(path)["paintings"] == [sha256(SOURCES[1])]
    is_named = not isinstance(one, bytes)
    assert path.name.startswith("china_in_starry_night_" if is_named else "stylized_output_")


# Timelapse ----------------------------------------------------------------------------------------


def test_a_timelapse_has_every_picture_at_the_last_ones_size_and_holds_the_last(tmp_path):
    images = [torch.full((1, 3, 20 + 2 * i, 40 + 4 * i), i / 4) for i in range(5)]
    path = nst.save_timelapse(images, tmp_path)
    assert list(tmp_path.iterdir()) == [path]
    assert path.suffix == ".webp"
    times, shades = [], []
    with Image.open(path) as film:
        assert film.size == (56, 28)
        assert film.info["loop"] == 0
        for number in range(film.n_frames):
            film.seek(number)
            film.load()
            times.append(film.info["duration"])
            shades.append(film.convert("RGB").getpixel((20, 10))[0])
    assert len(set(times[:-1])) == 1
    assert times[-1] >= 10 * times[0]
    assert shades == pytest.approx([0, 64, 128, 191, 255], abs=4)


def test_a_timelapse_of_no_pictures_is_refused(tmp_path):
    with pytest.raises(ValueError, match="images"):
        nst.save_timelapse([], tmp_path)


# A copy on disk during the run --------------------------------------------------------------------


@pytest.fixture
def clock(monkeypatch) -> list[float]:
    """What time.monotonic() says: the one number in this list."""
    now = [1000.0]
    monkeypatch.setattr(nst.time, "monotonic", lambda: now[0])
    return now


def steps_of(step: nst.Step, count: int) -> list[nst.Step]:
    """``count`` steps such as ``stylize`` yields."""
    return [replace(step, number=number, total=count) for number in range(1, count + 1)]


def test_the_copy_is_renewed_every_20_seconds_and_removed_at_the_end(clock, tmp_path, step):
    seen = []
    for passed_on in nst.autosave(steps_of(step, 6), tmp_path):
        (path,) = tmp_path.iterdir()  # never two of them
        assert path.name.endswith(".partial.png")
        seen.append((passed_on.number, record_in(path)["step"]))
        clock[0] += 9
    assert seen == [(1, 1), (2, 1), (3, 1), (4, 4), (5, 4), (6, 4)]
    assert list(tmp_path.iterdir()) == []


def test_the_copy_of_a_run_that_breaks_off_is_kept(tmp_path, step):
    def broken_run():
        yield from steps_of(step, 3)[:2]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        list(nst.autosave(broken_run(), tmp_path / "interrupted"))
    left = nst.autosave(iter(steps_of(step, 3)), tmp_path / "left")
    assert [next(left).number, next(left).number] == [1, 2]
    left.close()  # whoever took the steps has had enough
    for folder in tmp_path.iterdir():
        (path,) = folder.iterdir()
        assert path.name.endswith(".partial.png")
        assert (record_in(path)["step"], record_in(path)["finished"]) == (2, False)


def test_a_run_goes_on_when_the_disk_is_full_with_one_warning(monkeypatch, clock, tmp_path, step):
    steps = nst.autosave(steps_of(step, 4), tmp_path)
    next(steps)
    (first_copy,) = tmp_path.iterdir()
    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", fail(NO_SPACE))
        clock[0] += 21
        with pytest.warns(nst.StyleTransferWarning, match=NO_SPACE.strerror):
            assert next(steps).number == 2
        clock[0] += 21
        assert next(steps).number == 3
    assert list(tmp_path.iterdir()) == [first_copy]
    assert [later.number for later in steps] == [4]
    assert list(tmp_path.iterdir()) == []


# The record ---------------------------------------------------------------------------------------


def repaint(config: nst.StyleTransferConfig) -> nst.Step:
    return last(nst.stylize(*(nst.load_image(path, config.max_size) for path in SOURCES), config))


def test_the_settings_in_a_png_give_the_same_picture_again(tmp_path):
    settings = {"max_size": 72, "noise": 0.1, "seed": 7, "color": "content", "checkpoint": False}
    config = replace(IN_A_RUN, **settings, style_blend=(1 / 3,))
    step = repaint(config)
    again = nst.read_settings(nst.save_image(step, tmp_path))
    assert again == replace(config, balance=1.0)
    assert torch.equal(repaint(again).image, step.image)


def test_the_record_says_how_the_picture_came_about(tmp_path, step, shallow):
    path = nst.save_image(step, tmp_path, photo=SOURCES[0], paintings=SOURCES[1:])
    record = record_in(path)
    assert nst.StyleTransferConfig(**record["settings"]) == nst.read_settings(path)
    assert record["asked"] == {"checkpoint": "auto", "balance": "auto"}
    assert record["strength"] == 1
    assert record["photo"] == sha256(SOURCES[0])
    assert record["paintings"] == [sha256(SOURCES[1])]
    assert record["own_pictures"] == record["notes"] == []
    assert record["step"] == IN_A_RUN.num_steps
    assert record["finished"] is True
    assert record["weights"] == {"source": "bundled", "sha256": shallow.sha256}
    assert record["packages"]["torch"] == torch.__version__
    assert str(ROOT) not in json.dumps(record)


@pytest.mark.parametrize(
    ("strips", "checkpoint"), [([5, 5], 48), ([0, 5], 96), ([0, 1], 97), ([0, 0], 97)]
)
def test_the_record_says_which_scales_ran_in_strips(tmp_path, step, strips, checkpoint):
    """By the long side from which on they did: "auto" goes by the memory that is free then."""
    scale, sizes = step.job.scales[0], ((32, 48), (64, 96))
    scales = [
        replace(scale, size=size, blocks_in_strips=n) for size, n in zip(sizes, strips, strict=True)
    ]
    config = replace(step.job.config, checkpoint="auto")
    painted = replace(step, job=replace(step.job, scales=scales, config=config))
    assert nst.read_settings(nst.save_image(painted, tmp_path)).checkpoint == checkpoint


def test_settings_of_a_picture_that_is_blended_say_so(tmp_path, step, pair):
    blended = nst.blend_with_photo(nst.blend_with_photo(step, pair[0], 0.5), pair[0], 0.6)
    path = nst.save_image(blended, tmp_path)
    assert nst.read_record(path)["strength"] == pytest.approx(0.3)
    with pytest.warns(nst.StyleTransferWarning, match=r"blend_with_photo\(.*0\.3\)"):
        nst.read_settings(path)


@pytest.mark.parametrize(("notes", "strength"), [([], 1), (["strength 0.25"], 0.25)])
def test_an_older_record_is_read_too(notes, strength):
    old = {"settings": asdict(IN_A_RUN), "own_pictures": ["keep"], "notes": notes}
    data = png_with(json.dumps(old))
    assert nst.read_record(data)["strength"] == strength
    with pytest.warns(nst.StyleTransferWarning) as caught:
        assert nst.read_settings(data) == IN_A_RUN
    assert len(caught) == (1 if strength == 1 else 2)
    assert "keep" in str(caught[0].message)


def test_the_record_has_what_auto_chose(shallow, pair, tmp_path):
    names = ("precision", "device", "weights", "checkpoint", "num_steps")
    config = replace(IN_A_RUN, **dict.fromkeys(names, "auto"))
    first = next(nst.stylize(*pair, config, network=shallow))
    record = record_in(nst.save_image(first, tmp_path))
    chosen = [record["settings"][name] for name in names]
    assert chosen == ["float32", "cpu", "bundled", max(first.job.scales[-1].size) + 1, 52]
    assert (record["step"], record["finished"]) == (1, False)
    assert (record["photo"], record["paintings"]) == (None, [None])


def test_given_settings_replace_those_in_the_file(tmp_path, step):
    path = nst.save_image(step, tmp_path)
    changed = nst.read_settings(path, num_steps=99, weights="torchvision")
    assert changed == replace(nst.read_settings(path), num_steps=99, weights="torchvision")
    with pytest.raises(ValueError, match=r"num_steps .*0"):
        nst.read_settings(path, num_steps=0)


@pytest.mark.parametrize("name", ["masks", "keep", "start"])
def test_masks_keep_and_start_must_be_given_again(tmp_path, shallow, pair, name):
    photo, painting = pair
    mask = half_mask(photo.shape[2:])
    own = {"masks": [mask], "keep": mask, "start": photo}[name]
    step = last(nst.stylize(photo, painting, IN_A_RUN, network=shallow, **{name: own}))
    path = nst.save_image(step, tmp_path)
    assert record_in(path)["own_pictures"] == [name]
    with pytest.warns(nst.StyleTransferWarning, match=name):
        assert nst.read_settings(path).num_steps == IN_A_RUN.num_steps


def test_weights_of_your_own_must_be_given_again(tmp_path, step):
    network = nst.load_network(SHALLOW)
    network.source, network.sha256 = "my_vgg19.pth", "ab" * 32
    path = nst.save_image(replace(step, job=replace(step.job, network=network)), tmp_path)
    with pytest.raises(ValueError, match=f"weights .*{network.sha256}"):
        nst.read_settings(path)
    assert nst.read_settings(path, weights="my_vgg19.pth").weights == "my_vgg19.pth"


# A PNG from another machine or from elsewhere -----------------------------------------------------


def png_with(text: str, **options) -> bytes:
    """A PNG with this text as its record."""
    texts = PngImagePlugin.PngInfo()
    texts.add_text("style_transfer", text, **options)
    return encoded(Image.new("RGB", (20, 20)), pnginfo=texts)


def settings_with(**changes) -> str:
    return json.dumps({"settings": asdict(IN_A_RUN) | changes})


@pytest.mark.parametrize(
    ("device", "precision"), [("cuda", "float16"), ("cuda:1", "bfloat16"), ("mps", "float32")]
)
def test_settings_of_a_gpu_are_read_on_a_machine_without(monkeypatch, device, precision):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    data = png_with(settings_with(device=device, precision=precision))
    with pytest.warns(nst.StyleTransferWarning, match=device):
        config = nst.read_settings(data)
    assert config.device == "auto"
    assert nst.load_network(config).device == torch.device("cpu")  # it can be painted
    with pytest.raises(ValueError, match=f"device .*{device}"):
        nst.read_settings(data, device=device)


ELSEWHERE = {
    "nested too deeply": "[" * 60_000,
    "no settings": "{}",
    "settings of another kind": '{"settings": [1]}',
    "a path": settings_with(weights="/etc/passwd"),
    "no weights": '{"settings": {}}',
    "a long value": settings_with(color="very " * 10_000 + "\n blue"),
    "an unknown setting": settings_with(__class__=1),
    "not a number": settings_with(style_weight=float("nan")),
}


@pytest.mark.parametrize("text", ELSEWHERE.values(), ids=ELSEWHERE)
def test_unusable_records_are_refused_in_one_sentence(tmp_path, text):
    path = tmp_path / "elsewhere.png"
    path.write_bytes(png_with(text))
    with pytest.raises(ValueError, match=r"elsewhere\.png") as error:
        nst.read_settings(path)
    assert len(str(error.value)) < 1000
    assert "\n" not in str(error.value)


NO_RECORDS = {
    "a text that swells": png_with("a" * 10**7, zip=True),
    "a picture without a record": (IMAGES / "chelsea.png").read_bytes(),
    "nothing": b"",
    "a PNG that is cut off": png_with(settings_with())[:100],
    "a photo": photo_with_exif(),
    "a photo as WebP": photo_with_exif("WEBP"),
    "a JPEG without EXIF": encoded(Image.new("RGB", (20, 20)), "JPEG"),
    "a record with another bit": png_with(settings_with()).replace(b'"seed": 0', b'"seed": 1'),
}


@pytest.mark.parametrize("data", NO_RECORDS.values(), ids=NO_RECORDS)
def test_a_file_without_a_record_is_refused_before_it_is_decoded(monkeypatch, data):
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", fail(KeyboardInterrupt("it was decoded")))
    with pytest.raises(ValueError, match="the uploaded picture has no record"):
        nst.read_settings(data)
