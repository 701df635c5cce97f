"""A folder of photos, painted one after the other in the style of one painting."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import IMAGES, SHALLOW, assert_close, half_mask, last
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

import nst_helpers as nst

PAINTING = IMAGES / "starry_night.jpg"
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


def sheets_in(folder: Path) -> list[Path]:
    return sorted(folder.glob("contact_sheet_*.jpg"))


def test_every_picture_in_a_folder_is_painted(photos, paint, out, shallow):
    save_photo(photos / ".hidden.png")
    (photos / "notes.txt").write_text("no picture")
    (photos / "more.png").mkdir()
    shutil.move(photos / "more.png", photos / "more")
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
        assert (record["photo"], record["paintings"]) == (
            nst._sha256_of(photo),
            [nst._sha256_of(PAINTING)],
        )


def test_one_network_is_loaded_for_all(monkeypatch, photos, paint):
    load = nst.load_network
    loaded = []
    monkeypatch.setattr(nst, "load_network", lambda config: loaded.append(config) or load(config))
    paint(photos, network=None)
    assert loaded == [CONFIG]


def test_a_list_is_painted_as_it_is(photos, paint):
    listed = [str(photos / "b.webp"), photos / "a.png"]
    assert list(paint(iter(listed))) == [photos / "b.webp", photos / "a.png"]


def test_the_contact_sheet_shows_every_picture_in_its_place(photos, out):
    pictures = sorted(photos.iterdir())  # red, green, blue
    nst._save_contact_sheet(dict(zip(pictures, pictures, strict=True)), out)
    (path,) = sheets_in(out)
    side, line = nst._SHEET_SIDE, nst._SHEET_LINE
    with Image.open(path) as sheet:
        assert sheet.size == (2 * side, 2 * (side + line))
        cells = [(column * side, row * (side + line)) for row in (0, 1) for column in (0, 1)]
        tiles = [sheet.crop((x + 10, y + 70, x + side - 10, y + side - 10)) for x, y in cells]
        names = [sheet.crop((x, y + side, x + side, y + side + line)) for x, y in cells]
    for tile, picture in zip(tiles, pictures, strict=False):
        found, expected = nst.load_image(tile, 32), nst.load_image(picture, 32)
        assert_close(found.mean((2, 3)), expected.mean((2, 3)), 0.05)
    assert tiles[3].convert("L").getextrema()[0] > 250  # three pictures in a square of four
    assert [name.convert("L").getextrema()[0] < 100 for name in names] == [True] * 3 + [False]


def test_the_contact_sheet_is_shown_in_a_notebook_alone(monkeypatch, photos, paint):
    shown = []
    monkeypatch.setattr(nst, "display", shown.append)
    paint(photos)
    assert shown == []
    assert nst.plt.get_fignums() == []
    monkeypatch.setattr(nst, "get_ipython", object)
    paint(photos)
    (page,) = shown
    assert 'alt="The results' in page.data
    assert "b.webp" in page.data


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
        with pytest.raises(KeyboardInterrupt):
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
    files = paint(photos, config=config, format=format)
    assert len(painted) == 4
    assert paint(photos, config=config, format=format) == files
    assert len(painted) == 4


CHANGES = {
    "a setting": {"config": replace(CONFIG, style_weight=41)},
    "the painting": {"painting": IMAGES / "stained_glass.jpg"},
    "the format": {"format": "webp"},
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
    for name in (PAINTING, IMAGES / "stained_glass.jpg"):
        with Image.open(name) as painting:
            paint(photos, painting=painting)
    assert len(painted) == 6


def stopped(steps, photo):
    return next(steps)


def blended(steps, photo):
    return nst.blend_with_photo(last(steps), photo, 0.5)


def test_of_a_cut_out_painting_what_is_visible_counts(photos, paint, painted, tmp_path, shallow):
    with Image.open(PAINTING) as picture:
        painting = picture.resize((40, 30)).convert("RGBA")
    painting.paste((255, 255, 255, 0), (0, 0, 20, 30))
    painting.save(tmp_path / "cut_out.png")
    files = paint(photos, painting=tmp_path / "cut_out.png")
    style, visible = nst.load_painting(tmp_path / "cut_out.png", CONFIG.max_size)
    photo = nst.load_image(photos / "a.jpg", CONFIG.max_size)
    run = nst.stylize(photo, style, CONFIG, network=shallow, visible=visible)
    assert_close(nst.load_image(files[photos / "a.jpg"]), last(run).image, 0.51 / 255)
    painted.clear()
    assert paint(photos, painting=tmp_path / "cut_out.png") == files
    assert painted == []  # they are done


@pytest.mark.parametrize(
    ("pictures", "change"),
    [({}, stopped), ({}, blended), ({"keep": half_mask((24, 32))}, lambda steps, _: last(steps))],
    ids=["stopped", "blended", "kept in part"],
)
def test_other_pictures_of_a_photo_do_not_count(photos, paint, out, shallow, pictures, change):
    photo = photos / "a.jpg"
    content, style = nst.load_image(photo, 32), nst.load_image(PAINTING, 32)
    steps = nst.stylize(content, style, CONFIG, network=shallow, **pictures)
    other = nst.save_image(change(steps, content), out, photo=photo, paintings=[PAINTING])
    assert paint([photo])[photo] != other


def test_a_picture_from_the_panel_counts(photos, paint, out, shallow):
    photo = photos / "a.jpg"
    content, style = nst.load_image(photo, 32), nst.load_image(PAINTING, 32)
    step = last(nst.stylize(content, style, CONFIG, network=shallow))
    path = nst.save_image(step, out, photo=photo, paintings=[PAINTING])
    assert paint([photo]) == {photo: path}


def test_results_among_the_photos_are_not_painted(photos, paint, painted):
    nst.save_timelapse([torch.zeros(1, 3, 16, 16)] * 2, photos)
    files = paint(photos, output_folder=photos)
    painted.clear()
    other = {"painting": IMAGES / "stained_glass.jpg", "format": "jpeg"}
    assert list(paint(photos, output_folder=photos, **other)) == list(files)
    assert len(painted) == 3


# What goes wrong ----------------------------------------------------------------------------------


def test_photos_that_cannot_be_read_are_reported_once_at_the_end(photos, paint, out):
    (photos / "a.jpg").write_bytes((photos / "a.jpg").read_bytes()[:300])
    (photos / "phone.HEIC").write_bytes(b"not one")
    gone = photos / "gone.png"
    with pytest.warns(nst.StyleTransferWarning) as warned:
        files = paint([*nst._photos_in(photos), gone])
    (warning,) = warned
    bad = [photos / "a.jpg", photos / "phone.HEIC", gone]
    assert [photo for photo, path in files.items() if path is None] == bad
    assert [path.name in str(warning.message) for path in bad] == [True] * 3
    assert len(list(out.glob("*.png"))) == 2
    assert len(sheets_in(out)) == 1


def test_no_contact_sheet_is_made_of_nothing(photos, paint, out):
    with pytest.warns(nst.StyleTransferWarning, match="gone"):
        assert paint([photos / "gone.png"]) == {photos / "gone.png": None}
    assert list(out.iterdir()) == []


@pytest.mark.parametrize("name", ["100%d $x$ 写真.png", f"{'写' * 80}.png", f"{'x' * 200}.png"])
def test_any_name_of_a_photo_is_good_enough(tmp_path, paint, name):
    photo = save_photo(tmp_path / name)
    path = paint([photo])[photo]
    assert path.name.startswith(photo.stem[:40])
    assert nst.load_image(path).shape == (1, 3, 24, 32)


@settings(
    max_examples=10,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(st.sets(st.integers(1, 30), min_size=1, max_size=30))
def test_a_contact_sheet_has_room_for_any_number(tmp_path_factory, numbers):
    folder = tmp_path_factory.mktemp("out")
    picture = nst.save_image(torch.zeros(1, 3, 16, 16), folder)
    nst._save_contact_sheet({Path(f"{number}.png"): picture for number in numbers}, folder)
    with Image.open(sheets_in(folder)[0]) as sheet:
        columns, rows = sheet.width // nst._SHEET_SIDE, sheet.height // nst._SHEET_SIDE
    assert (columns - 1) ** 2 < len(numbers) <= columns * rows <= columns**2


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


def test_the_formats_are_those_of_save_image(photos, paint):
    files = paint(photos, format="jpeg", dpi=300)
    for path in files.values():
        with Image.open(path) as saved:
            assert (saved.format, saved.info["dpi"]) == ("JPEG", (300, 300))
