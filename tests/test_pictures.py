"""Pictures in and out: every mode and orientation comes in right, nothing older is overwritten."""

import io
import os
import struct

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import nst_helpers as nst

ORIENTATION = 0x0112  # the EXIF tag


def encoded(picture: Image.Image, kind: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


def corners(image: torch.Tensor) -> list[list[float]]:
    """The colours of the four corners, row by row, rounded."""
    return [[round(v, 1) for v in image[0, :, y, x].tolist()] for y in (0, -1) for x in (0, -1)]


RED, GREEN, BLUE, WHITE = [1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 1]


@pytest.fixture
def four_corners() -> Image.Image:
    """40 x 20 pixels: red and green above blue and white."""
    picture = Image.new("RGB", (40, 20), "white")
    picture.paste("red", (0, 0, 20, 10))
    picture.paste("lime", (20, 0, 40, 10))
    picture.paste("blue", (0, 10, 20, 20))
    return picture


def test_path_bytes_and_picture_give_the_same_tensor(four_corners, tmp_path):
    path = tmp_path / "picture.png"
    four_corners.save(path)
    images = [nst.load_image(x) for x in (path, str(path), path.read_bytes(), four_corners)]
    for image in images:
        assert image.shape == (1, 3, 20, 40) and image.dtype == torch.float32
        assert corners(image) == [RED, GREEN, BLUE, WHITE]
        assert torch.equal(image, images[0])


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_exif_orientation_comes_in_upright(four_corners, orientation):
    undo = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    stored = four_corners.transpose(undo[orientation]) if orientation in undo else four_corners
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    image = nst.load_image(encoded(stored, exif=exif))
    assert image.shape == (1, 3, 20, 40)
    assert corners(image) == [RED, GREEN, BLUE, WHITE]


def test_an_odd_exif_tag_is_no_reason_to_refuse_a_photo(four_corners):
    odd = struct.pack("<HHI4s", 0x0100, 2, 4, b"odd")  # ImageWidth as text, where a number belongs
    turned = struct.pack("<HHIHH", ORIENTATION, 3, 1, 3, 0)
    exif = b"Exif\0\0II*\0" + struct.pack("<IH", 8, 2) + odd + turned + struct.pack("<I", 0)
    image = nst.load_image(encoded(four_corners.transpose(Image.Transpose.ROTATE_180), exif=exif))
    assert corners(image) == [RED, GREEN, BLUE, WHITE]


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA", "CMYK", "YCbCr", "HSV", "LA", "La", "PA", "RGBa"])
def test_every_mode_becomes_rgb(four_corners, mode):
    between = {"La": "LA", "RGBa": "RGBA"}.get(mode, mode)
    image = nst.load_image(four_corners.convert(between).convert(mode))
    assert image.shape == (1, 3, 20, 40)
    grey = mode in ("1", "L", "LA", "La")
    assert corners(image)[3] == WHITE
    assert (corners(image)[0] == RED) != grey


@pytest.mark.parametrize("mode", ["I;16", "I", "F"])
def test_more_than_8_bits_are_scaled_and_not_cut_off(mode):
    ramp = np.linspace(0, 65535, 64 * 64).reshape(64, 64)
    picture = Image.fromarray(ramp.astype(np.uint16))
    picture = (
        picture
        if mode == "I;16"
        else Image.fromarray(ramp.astype(np.int32) if mode == "I" else (ramp / 65535).astype(np.float32))
    )
    assert picture.mode == mode
    image = nst.load_image(picture)
    expected = torch.tensor(ramp / 65535, dtype=torch.float32).expand(1, 3, 64, 64)
    torch.testing.assert_close(image, expected, atol=1 / 500, rtol=0)


def test_lab_becomes_rgb():
    grey = Image.new("LAB", (20, 20), (128, 128, 128))
    image = nst.load_image(grey)
    assert image.std() < 0.05 and 0.3 < image.mean() < 0.7


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparency_is_laid_on_white(mode):
    picture = Image.new("RGBA", (20, 20), (0, 0, 0, 0)).convert(mode)
    assert nst.load_image(picture).min() == 1


def test_a_palette_with_a_transparent_colour_is_laid_on_white(four_corners):
    palette = four_corners.quantize(8)
    data = encoded(palette, transparency=palette.getpixel((0, 0)))
    assert corners(nst.load_image(data)) == [WHITE, GREEN, BLUE, WHITE]


@pytest.mark.parametrize(
    ("size", "max_size", "upscale", "expected"),
    [
        ((40, 20), 20, False, (16, 32)),  # the short side keeps 16 pixels
        ((200, 100), 50, False, (25, 50)),
        ((100, 200), 50, False, (50, 25)),
        ((200, 100), 512, False, (100, 200)),
        ((200, 100), 400, True, (200, 400)),
        ((1000, 16), 512, False, (16, 1000)),
    ],
)
def test_the_long_side_becomes_max_size_but_nothing_is_enlarged_unasked(size, max_size, upscale, expected):
    image = nst.load_image(Image.new("RGB", size), max_size, upscale=upscale)
    assert tuple(image.shape[2:]) == expected


def test_resizing_is_lanczos():
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    expected = nst.load_image(noise.resize((32, 32), Image.Resampling.LANCZOS))
    assert torch.equal(nst.load_image(noise, 32), expected)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is not a picture"),
        (b"just some text, no picture at all", "is not a picture"),
        (b"<html><body>Not found</body></html>", "is not a picture"),
    ],
)
def test_a_file_that_is_no_picture_is_named(tmp_path, content, message):
    path = tmp_path / "thing.jpg"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"thing\.jpg.*{message}"):
        nst.load_image(path)
    with pytest.raises(ValueError, match=message):
        nst.load_image(content)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF"])
def test_a_truncated_picture_is_refused_and_never_half_grey(tmp_path, kind):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    data = encoded(Image.fromarray(noise), kind)
    path = tmp_path / "half"
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match="half"):
        nst.load_image(path)


def test_a_truncated_picture_that_pillow_has_opened_already_is_refused(four_corners):
    data = encoded(four_corners, "JPEG")
    opened = Image.open(io.BytesIO(data[:-200]))  # Pillow reads the header now and the pixels later
    with pytest.raises(ValueError, match="the picture is a damaged or truncated picture"):
        nst.load_image(opened)


def test_what_is_missing_a_folder_or_too_small_is_said(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.png"):
        nst.load_image(tmp_path / "nowhere.png")
    with pytest.raises(FileNotFoundError, match="There is no picture"):
        nst.load_image("long" * 100)
    with pytest.raises(ValueError, match=r"device must be .*cpu.*, not 'gpu'"):
        nst.load_image(Image.new("RGB", (40, 40)), device="gpu")
    with pytest.raises(ValueError, match="is a folder"):
        nst.load_image(tmp_path)
    with pytest.raises(ValueError, match=r"at least 16 pixels.*15 x 40"):
        nst.load_image(Image.new("RGB", (15, 40)))
    with pytest.raises(ValueError, match=r"max_size.*at least 16, not 0"):
        nst.load_image(Image.new("RGB", (40, 40)), 0)


def test_a_decompression_bomb_is_refused_before_it_is_decoded(monkeypatch, four_corners):
    data = encoded(four_corners)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 40 * 20 - 1)  # Pillow would only warn
    with pytest.raises(ValueError, match="799 pixels"):
        nst.load_image(data)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)  # Pillow refuses
    with pytest.raises(ValueError, match="100 pixels"):
        nst.load_image(data)


@settings(max_examples=25, deadline=None)
@given(st.integers(16, 70), st.integers(16, 70), st.integers(0, 2**32 - 1))
def test_a_picture_survives_saving_and_loading_bit_for_bit(tmp_path_factory, width, height, seed):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    image = nst.load_image(Image.fromarray(pixels))
    assert np.array_equal(np.asarray(nst.to_pil(image)), pixels)
    path = nst.save_image(image, tmp_path_factory.mktemp("out"))
    assert torch.equal(nst.load_image(path), image)


def test_to_pil_clamps_and_rounds():
    image = torch.tensor([-0.5, 0.5, 1.5]).view(1, 3, 1, 1).expand(1, 3, 2, 2)
    assert nst.to_pil(image).getpixel((0, 0)) == (0, 128, 255)


def test_a_saved_picture_is_timestamped_and_never_overwritten(monkeypatch, tmp_path):
    monkeypatch.setattr(nst.time, "strftime", lambda form: form.replace("%Y%m%d_%H%M%S", "20261122_101112"))
    image = torch.zeros(1, 3, 16, 16)
    names = [nst.save_image(image + i / 10, tmp_path / "new" / "folder").name for i in range(3)]
    stem = "stylized_output_20261122_101112"
    assert names == [f"{stem}.png", f"{stem}_2.png", f"{stem}_3.png"]
    first = nst.load_image(tmp_path / "new" / "folder" / names[0])
    assert first.max() == 0


def test_the_timestamp_is_the_current_time(tmp_path):
    name = nst.save_image(torch.zeros(1, 3, 16, 16), tmp_path).name
    assert nst.re.fullmatch(r"stylized_output_20\d{6}_\d{6}\.png", name)


def test_an_output_folder_that_cannot_be_written_is_said_before_the_loop(monkeypatch, tmp_path):
    taken = tmp_path / "outputs"
    taken.write_text("a file where the folder should be")
    with pytest.raises(OSError, match=r"outputs' cannot be written to \(.*exists\)"):
        nst.prepare_output_folder(taken)

    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(nst.Path, "open", refuse)
    with pytest.raises(OSError, match=r"cannot be written to \(Permission denied\)"):
        nst.prepare_output_folder(tmp_path / "locked")


def test_preparing_the_folder_leaves_nothing_in_it(tmp_path):
    folder = nst.prepare_output_folder(tmp_path / "a" / "b")
    assert os.listdir(folder) == []
