"""A folder of photos, painted one after the other in the style of one painting."""

import base64
import hashlib
import io
import os
import re
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import IMAGES, SHALLOW, assert_close, fail, half_mask, last
from PIL import Image

import nst_helpers as nst

PAINTING, GLASS = IMAGES / "starry_night.jpg", IMAGES / "stained_glass.jpg"
CONFIG = replace(SHALLOW, num_steps=2, scales=1, max_size=32)


def save_photo(path: Path, color: str = "red", size=(40, 30)) -> Path:
    """A photo that no other color or size gives."""
    picture = Image.linear_gradient("L").resize(size).convert("RGB")
    Image.blend(picture, Image.new("RGB", size, color), 0.5).save(path)
    return path


@pytest.fixture
def photos(tmp_path) -> Path:
    """A folder with three photos."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for name, color in {"a.jpg": "red", "a.png": "green", "b.webp": "blue"}.items():
        save_photo(folder / name, color)
    return folder


@pytest.fixture
def out(tmp_path) -> Path:
    return tmp_path / "out"


@pytest.fixture
def paint(shallow, out):
    """``paint_folder`` with this painting, settings and folder, unless others are given."""

    def paint(photos, **changed):
        given = {"painting": PAINTING, "config": CONFIG, "output_folder": out, "network": shallow}
        return nst.paint_folder(photos, **(given | changed))

    return paint


@pytest.fixture
def painted(monkeypatch) -> list[tuple[int, int]]:
    """The size of each photo that is given to ``stylize``."""
    stylize = nst.stylize
    sizes = []

    def noted(content, *args, **kwargs):
        sizes.append(tuple(content.shape[2:]))
        return stylize(content, *args, **kwargs)

    monkeypatch.setattr(nst, "stylize", noted)
    return sizes


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def sheets_in(folder: Path) -> list[Path]:
    return sorted(folder.glob("contact_sheet_*.jpg"))


def test_every_picture_in_a_folder_is_painted(photos, paint, out, shallow):
    save_photo(photos / ".hidden.png")
    (photos / "notes.txt").write_text("no picture")
    (photos / "folder.png").mkdir()
    files = paint(photos)
    assert list(files) == [photos / name for name in ("a.jpg", "a.png", "b.webp")]
    assert sorted(out.iterdir()) == sorted([*files.values(), *sheets_in(out)])
    style = nst.load_image(PAINTING, CONFIG.max_size)
    for photo, path in files.items():
        assert path.name.startswith(f"{photo.stem}_")
        content = nst.load_image(photo, CONFIG.max_size)
        expected = last(nst.stylize(content, style, CONFIG, network=shallow)).image
        assert_close(nst.load_image(path), expected, 0.5 / 255 + 1e-6)
        record = nst.read_record(path)
        assert record["finished"]
        assert (record["photo"], record["paintings"]) == (sha256(photo), [sha256(PAINTING)])


def test_of_cut_out_pictures_what_is_visible_counts(photos, paint, painted, tmp_path, shallow):
    sources = {PAINTING: tmp_path / "cut_out.png", photos / "b.webp": photos / "a.png"}
    for whole, cut_out in sources.items():
        with Image.open(whole) as picture:
            half = picture.resize((40, 30)).convert("RGBA")
        half.paste((255, 255, 255, 0), (0, 0, 20, 30))
        half.save(cut_out)
    files = paint(photos, painting=tmp_path / "cut_out.png")
    style, visible = nst.load_painting(tmp_path / "cut_out.png", CONFIG.max_size)
    photo, cutout = nst.load_painting(photos / "a.png", CONFIG.max_size)
    run = nst.stylize(photo, style, CONFIG, network=shallow, visible=visible, cutout=cutout)
    with Image.open(files[photos / "a.png"]) as picture:
        found = nst.load_image(picture.convert("RGB"))
    assert_close(found, last(run).image, 0.51 / 255)
    painted.clear()
    assert paint(photos, painting=tmp_path / "cut_out.png") == files
    assert painted == []  # they are done


def test_one_network_is_loaded_for_all(monkeypatch, photos, paint):
    load = nst.load_network
    loaded = []
    monkeypatch.setattr(nst, "load_network", lambda config: loaded.append(config) or load(config))
    paint(photos, network=None)
    assert loaded == [CONFIG]


@pytest.fixture
def in_notebook(monkeypatch) -> list:
    """What is displayed, as in a notebook."""
    shown = []
    monkeypatch.setattr(nst, "display", shown.append)
    monkeypatch.setattr(nst, "get_ipython", object)
    return shown


def page_picture(shown: list) -> tuple[Image.Image, str]:
    """The latest picture that was displayed, and its HTML."""
    page = shown[-1].data
    data = base64.b64decode(re.findall(r'base64,([^"]*)"', page)[0])
    return Image.open(io.BytesIO(data)), page


def test_the_contact_sheet_shows_every_picture_in_its_place(photos, paint, out):
    files = paint(photos)
    (path,) = sheets_in(out)
    side, line = 240, 20
    with Image.open(path) as sheet:
        assert sheet.size == (2 * side, 2 * (side + line))
        cells = [(column * side, row * (side + line)) for row in (0, 1) for column in (0, 1)]
        tiles = [sheet.crop((x + 10, y + 70, x + side - 10, y + side - 10)) for x, y in cells]
        names = [sheet.crop((x, y + side, x + side, y + side + line)) for x, y in cells]
    for tile, result in zip(tiles, files.values(), strict=False):
        found, expected = nst.load_image(tile, 32), nst.load_image(result, 32)
        assert_close(found.mean((2, 3)), expected.mean((2, 3)), 0.05)
    assert tiles[3].convert("L").getextrema()[0] > 250  # three pictures in a square of four
    assert [name.convert("L").getextrema()[0] < 100 for name in names] == [True] * 3 + [False]


def test_a_contact_sheet_is_saved_if_it_is_new_and_shown_in_a_notebook(
    monkeypatch, photos, paint, out, in_notebook
):
    with monkeypatch.context() as script:
        script.setattr(nst, "get_ipython", lambda: None)
        paint(photos)
    assert in_notebook == []
    for count in (1, 2):  # nothing is new
        paint(photos)
        assert len(in_notebook) == count
    assert len(sheets_in(out)) == 1
    picture, page = page_picture(in_notebook)
    assert picture.size == (480, 520)  # as large as the file
    assert "b.webp" in page
    save_photo(photos / "c.png", "yellow")
    paint(photos)
    assert len(sheets_in(out)) == 2


def test_of_many_photos_the_page_gets_a_small_sheet(tmp_path, paint, out, in_notebook):
    photos = [save_photo(tmp_path / f"{n}.png", size=(20, 20 + n)) for n in range(26)]
    paint(photos, config=replace(CONFIG, num_steps=1, max_size=16))
    picture, page = page_picture(in_notebook)
    assert picture.size == (1024, 924)
    with Image.open(sheets_in(out)[0]) as sheet:
        assert sheet.size == (6 * 240, 5 * 260)
    assert len(page) < sheets_in(out)[0].stat().st_size


# Going on -----------------------------------------------------------------------------------------


def test_an_interrupted_folder_goes_on_with_what_is_missing(monkeypatch, photos, paint, out):
    stylize = nst.stylize

    def interrupted(content, *args, **kwargs):
        steps = stylize(content, *args, **kwargs)
        if list(out.glob("a_*.png")):
            yield next(steps)
            raise KeyboardInterrupt
        yield from steps

    with monkeypatch.context() as patch:
        patch.setattr(nst, "stylize", interrupted)
        with pytest.raises(KeyboardInterrupt, match=r"a.png, 2 of 3.* same call goes on"):
            paint(photos)
    (first,) = out.iterdir()  # the first photo's, and no part of the second's
    data = first.read_bytes()
    files = paint(photos)
    assert files[photos / "a.jpg"] == first
    assert first.read_bytes() == data
    assert len(set(files.values())) == 3
    assert sorted(out.iterdir()) == sorted([*files.values(), *sheets_in(out)])


AUTO = dict.fromkeys(("precision", "device", "checkpoint", "weights"), "auto")


@pytest.mark.parametrize("config", [CONFIG, replace(CONFIG, **AUTO)], ids=["named", "auto"])
@pytest.mark.parametrize("format", ["png", "jpeg", "webp"])
def test_what_is_finished_is_not_painted_again(photos, paint, painted, config, format):
    save_photo(photos / "strip.png", size=(160, 16))  # stays longer than max_size
    files = paint(photos, config=config, format=format, dpi=300)
    assert len(painted) == 4
    assert paint(photos, config=config, format=format) == files
    assert len(painted) == 4
    with Image.open(files[photos / "strip.png"]) as picture:
        assert picture.format == format.upper()
        if format == "jpeg":
            assert picture.info["dpi"] == (300, 300)


CHANGES = {
    "a setting": {"config": replace(CONFIG, style_weight=41)},
    "the painting": {"painting": GLASS},
}


@pytest.mark.parametrize("changed", CHANGES.values(), ids=CHANGES)
def test_what_is_painted_otherwise_is_painted_again(photos, paint, painted, changed):
    files = paint(photos)
    others = paint(photos, **changed)
    assert len(painted) == 6
    assert not {*files.values()} & {*others.values()}


def test_a_photo_that_has_changed_is_painted_again(photos, paint, painted):
    save_photo(photos / "b.webp", size=(30, 40))
    files = paint(photos)
    save_photo(photos / "b.webp", size=(40, 20))
    others = paint(photos)
    assert painted[3:] == [(16, 32)]
    assert {photo for photo in files if files[photo] != others[photo]} == {photos / "b.webp"}


def test_a_painting_without_a_file_is_never_taken_for_another(photos, paint, painted):
    for name in (PAINTING, GLASS):
        with Image.open(name) as painting:
            paint(photos, painting=painting)
    assert len(painted) == 6


@pytest.mark.parametrize("kind", ["stopped", "with a mask", "finished", "blended"])
def test_other_pictures_count_if_they_are_finished_and_without_masks(
    photos, paint, out, shallow, kind
):
    photo = photos / "a.jpg"
    content, style = nst.load_image(photo, 32), nst.load_image(PAINTING, 32)
    keep = half_mask((24, 32)) if kind == "with a mask" else None
    steps = nst.stylize(content, style, CONFIG, network=shallow, keep=keep)
    step = next(steps) if kind == "stopped" else last(steps)
    if kind == "blended":
        step = nst.blend_with_photo(step, content, 0.5)
    path = nst.save_image(step, out, photo=photo, paintings=[PAINTING])
    assert (paint([photo])[photo] == path) is (kind in ("finished", "blended"))


def test_photos_with_the_same_bytes_have_a_picture_each(photos, paint, painted):
    for name in ("a_1.jpg", "copy.jpg"):
        shutil.copy(photos / "a.jpg", photos / name)
    files = paint(photos)
    assert len({*files.values()}) == len(files) == 5
    painted.clear()
    assert paint(photos) == files
    assert painted == []
    files[photos / "a_1.jpg"].unlink()
    assert len({*paint(photos).values()}) == 5
    assert len(painted) == 1


def test_results_among_the_photos_are_not_painted(photos, paint, painted):
    nst.save_timelapse([torch.zeros(1, 3, 16, 16)] * 2, photos)
    files = paint(photos, output_folder=photos)
    painted.clear()
    other = {"painting": GLASS, "format": "jpeg"}
    assert list(paint(photos, output_folder=photos, **other)) == list(files)
    assert len(painted) == 3


# What goes wrong ----------------------------------------------------------------------------------


def test_photos_that_cannot_be_read_are_reported_once_at_the_end(monkeypatch, photos, paint, out):
    known = {".jpg": "JPEG", ".png": "PNG", ".webp": "WEBP"}  # without HEIC, as on some platforms
    monkeypatch.setattr(nst.Image, "registered_extensions", lambda: known)
    bad = [photos / "a.jpg", photos / "phone.HEIC"]
    for path in bad:
        path.write_bytes(b"not one")
    with pytest.warns(nst.StyleTransferWarning) as warned:
        files = paint(photos)
    (warning,) = warned
    assert [photo for photo, path in files.items() if path is None] == bad
    assert [str(warning.message).count(path.name) for path in bad] == [1, 1]
    assert len(list(out.glob("*.png"))) == 2
    assert len(sheets_in(out)) == 1


FAILURES = {
    "stylize": FileNotFoundError("odd"),
    "paint": FloatingPointError("NaN"),
    "save_image": KeyError("x"),
}


@pytest.mark.parametrize(("place", "error"), FAILURES.items(), ids=FAILURES)
def test_whatever_fails_the_other_photos_are_painted(monkeypatch, photos, paint, out, place, error):
    real = getattr(nst, place)
    calls = []

    def failing(*args, **kwargs):
        calls.append(args)
        if len(calls) == 2:
            raise error
        return real(*args, **kwargs)

    monkeypatch.setattr(nst, place, failing)
    with pytest.warns(nst.StyleTransferWarning, match=r"2 of 3 photos .*\na.png") as warned:
        files = paint(photos)
    assert str(error) in str(warned[-1].message)
    assert [photo.name for photo, path in files.items() if path is None] == ["a.png"]
    assert len(sheets_in(out)) == 1


def test_a_contact_sheet_that_fails_hides_nothing(monkeypatch, photos, paint, out):
    (photos / "b.webp").write_bytes(b"not one")
    monkeypatch.setattr(nst.ImageOps, "pad", fail(MemoryError()))
    with (
        pytest.warns(nst.StyleTransferWarning, match="contact sheet.*MemoryError"),
        pytest.warns(nst.StyleTransferWarning, match=r"b\.webp"),
    ):
        files = paint(photos)
    assert [path is None for path in files.values()] == [False, False, True]


def test_if_every_photo_fails_that_is_an_error(photos, paint, out):
    with pytest.raises(RuntimeError, match=r"(?s)0 of 2 .*gone.*lost"):
        paint([photos / "gone.png", photos / "lost.png"])
    assert list(out.iterdir()) == []


def test_what_cannot_be_painted_is_refused_before_any_work(tmp_path, photos, paint, painted, out):
    empty = tmp_path / "empty"
    empty.mkdir()
    for wrong, changed in {
        photos / "a.jpg": {},
        empty: {},
        tmp_path / "nowhere": {},
        photos: {"format": "gif"},
    }.items():
        with pytest.raises(ValueError, match=changed.get("format", wrong.name)):
            paint(wrong, **changed)
    with pytest.raises(FileNotFoundError, match="gone"):
        paint(photos, painting=tmp_path / "gone.jpg")
    assert painted == []
    assert not out.exists()


# Subfolders, addresses, names ---------------------------------------------------------------------


def test_photos_in_subfolders_have_their_results_in_subfolders(
    tmp_path, photos, paint, painted, out
):
    card = tmp_path / "card"  # a camera's: photos two folders deep, and none above
    folders = ("DCIM/100APPLE", "DCIM/101APPLE")
    for name in (*folders, ".trash"):
        (card / name).mkdir(parents=True)
        shutil.copy(photos / "a.jpg", card / name)
    with pytest.raises(ValueError, match=r"recursive=True .*DCIM/100APPLE, DCIM/101APPLE too"):
        paint(card)
    shutil.copy(photos / "b.webp", card)
    with pytest.warns(nst.StyleTransferWarning, match=r"DCIM/101APPLE too\.$"):
        assert list(paint(card)) == [card / "b.webp"]
    (card / "b.webp").unlink()
    files = paint(card, recursive=True, output_folder=out / "all")
    assert list(files) == [card / name / "a.jpg" for name in folders]
    assert [path.parent for path in files.values()] == [out / "all" / name for name in folders]
    assert len(sheets_in(out / "all")) == 1
    painted.clear()
    files[card / folders[0] / "a.jpg"].unlink()
    again = paint(card, recursive=True, output_folder=out / "all")
    assert all(path.is_file() for path in again.values())
    assert len(painted) == 1


def test_a_list_may_hold_addresses(monkeypatch, photos, paint):
    fetched = []

    def fetch(address):
        fetched.append(address)
        return (photos / "b.webp").read_bytes()

    monkeypatch.setattr(nst, "_fetch", fetch)
    address = "https://example.org/photos/b.webp?size=large"
    files = paint(iter([address, f"'{photos / 'a.png'}'"]))
    assert list(files) == [address, photos / "a.png"]
    assert files[address].name.startswith("b_")
    assert {*fetched} == {address}
    nameless = "https://example.org/?id=3"
    assert paint([nameless])[nameless].is_file()
    monkeypatch.setattr(nst, "_fetch", fail(ConnectionError("no network")))
    with pytest.raises(RuntimeError, match=re.escape(f"{nameless}: no network")):
        paint([nameless])


NAMES = ["100%d $x$ 写真.png", f"{'写' * 80}.png", f"{'x' * 200}.png", "\N{PILE OF POO}.png"]


@pytest.mark.parametrize("encoding", ["cp1252", "cp437"])
def test_an_old_console_does_not_end_a_folder(monkeypatch, tmp_path, paint, encoding):
    photo = save_photo(tmp_path / "写真 é.png")
    console = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(console, encoding))
    assert paint([photo])[photo].is_file()
    sys.stdout.flush()
    assert "??" in console.getvalue().decode(encoding)


@pytest.mark.parametrize("name", [*map(os.fsencode, NAMES), b"not utf-8 \xff.png"])
def test_any_name_of_a_photo_is_good_enough(tmp_path, paint, out, in_notebook, name):
    photo = save_photo(tmp_path / os.fsdecode(name))
    path = paint([photo])[photo]
    assert path.name.startswith(photo.stem[:40])
    assert nst.load_image(path).shape == (1, 3, 24, 32)
    assert len(sheets_in(out)) == len(in_notebook) == 1
    in_notebook[0].data.encode()
