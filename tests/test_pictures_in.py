"""Pictures in: every format, mode and orientation comes in right; damage is refused."""

import base64
import contextlib
import functools
import http.server
import io
import itertools
import struct
import sys
import threading
import unicodedata
import warnings
import zlib
from pathlib import Path

import numpy as np
import pillow_heif
import pytest
import tifffile
import torch
from conftest import IMAGES, SHALLOW, assert_close, fail, half_mask
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms, ImageDraw, PngImagePlugin, TiffImagePlugin

import nst_helpers as nst

# Pillow warns of much that it then refuses or mends.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:PIL")

SIZE = 64, 48  # width and height
ORIENTATION = 0x0112  # the EXIF tag
UNDO = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}
MODES = {
    "JPEG": ("L", "RGB", "CMYK"),
    "PNG": ("1", "L", "LA", "P", "RGB", "RGBA", "I;16"),
    "WEBP": ("RGB", "RGBA"),
    "GIF": ("1", "L", "P", "animated"),
    "TIFF": ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "LAB", "I;16", "I", "F"),
    "BMP": ("1", "L", "P", "RGB"),
    "APNG": ("animated",),
    "HEIF": ("RGB", "RGBA"),
}
pillow_heif.register_heif_opener()  # to write HEIC
if ".avif" in Image.registered_extensions():  # newer versions of Pillow
    MODES["AVIF"] = ("RGB", "RGBA")
TURNABLE = ("JPEG", "PNG", "WEBP", "TIFF", "HEIF")
CASES = [(kind, mode) for kind, modes in MODES.items() for mode in modes]
RED, GREEN, BLUE, WHITE = torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 1]])


def four_corners() -> Image.Image:
    """Red and green above blue and white."""
    picture = Image.new("RGB", SIZE, "white")
    picture.paste("red", (0, 0, 32, 24))
    picture.paste("lime", (32, 0, 64, 24))
    picture.paste("blue", (0, 24, 32, 48))
    return picture


def turned(orientation: int) -> Image.Image:
    """The four corners, stored so that this EXIF orientation puts them upright."""
    picture = four_corners()
    return picture.transpose(UNDO[orientation]) if orientation in UNDO else picture


def in_mode(picture: Image.Image, mode: str) -> Image.Image:
    whites = {"I;16": (np.uint16, 65535), "I": (np.int32, 65535), "F": (np.float32, 1)}
    if mode in whites:
        number_type, white = whites[mode]
        grey = np.asarray(picture.convert("L")) / 255
        return Image.fromarray((grey * white).astype(number_type))
    if mode == "LAB":
        srgb, lab = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
        return ImageCms.profileToProfile(picture, srgb, lab, outputMode="LAB")
    if mode == "PA":  # a palette in which red is transparent
        picture = picture.convert("P")
        picture.info["transparency"] = picture.getpixel((0, 0))
        return picture
    return picture.convert("RGB" if mode == "animated" else mode)


def encoded(picture: Image.Image, kind: str = "PNG", mode: str = "RGB", **options) -> bytes:
    file = io.BytesIO()
    picture = in_mode(picture, mode)
    if mode == "animated":
        options |= {"save_all": True, "append_images": [Image.new("RGB", picture.size, "black")]}
    if mode == "PA":
        options["transparency"] = picture.info["transparency"]
    picture.save(file, "PNG" if kind == "APNG" else kind, **options)
    return file.getvalue()


def chunk(kind: bytes, data: bytes) -> bytes:
    checksum = zlib.crc32(kind + data)
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", checksum)


def with_chunk(data: bytes, added: bytes) -> bytes:
    """A PNG with more chunks after its first one."""
    return data[:33] + added + data[33:]


def corners(image: torch.Tensor) -> torch.Tensor:
    """The colours 4 pixels away from the corners, row by row, (4, 3)."""
    return torch.stack([image[0, :, y, x] for y in (4, -5) for x in (4, -5)])


def expected_corners(mode: str) -> torch.Tensor:
    colors = torch.stack([RED, GREEN, BLUE, WHITE])
    if mode in ("L", "LA", "La", "I;16", "I", "F"):
        return (colors @ torch.tensor([0.299, 0.587, 0.114]))[:, None].expand(4, 3)
    return colors


def assert_shows_corners(image: torch.Tensor, atol: float = 0.1, mode: str = "RGB") -> None:
    assert image.shape[:2] == (1, 3)
    assert image.shape[2] * 4 == image.shape[3] * 3
    assert_close(corners(image), expected_corners(mode), atol)


# Formats, modes, orientations ---------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "mode"), CASES)
def test_every_format_mode_and_orientation_comes_in_upright_with_its_colours(kind, mode):
    for orientation in range(1, 9) if kind in TURNABLE else [1]:
        exif = Image.Exif()
        exif[ORIENTATION] = orientation
        options = {"exif": exif.tobytes()} if kind in TURNABLE else {}
        image = nst.load_image(encoded(turned(orientation), kind, mode, **options))
        assert image.dtype == torch.float32
        if mode == "1":  # dithered
            assert set(image.unique().tolist()) == {0, 1}
        else:
            assert_shows_corners(image, mode=mode)


@pytest.mark.parametrize("mode", ["YCbCr", "HSV", "La", "RGBa"])
def test_modes_that_only_pillow_has_come_in_too(mode):
    between = {"La": "LA", "RGBa": "RGBA"}.get(mode, mode)
    assert_shows_corners(nst.load_image(four_corners().convert(between).convert(mode)), mode=mode)


def test_a_dark_picture_of_16_bits_stays_dark():
    dark = Image.fromarray(np.full((20, 20), 200, np.uint16))
    assert nst.load_image(dark).max() < 0.01


def test_a_wholly_transparent_picture_shows_what_is_under_its_alpha():
    hidden = four_corners()
    hidden.putalpha(0)
    with pytest.warns(nst.StyleTransferWarning, match="the uploaded picture"):
        image = nst.load_image(encoded(hidden, "PNG", "RGBA"))
    assert_shows_corners(image, 0.01)


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "GIF"])
@pytest.mark.parametrize("color", [(0, 0, 0, 0), (255, 255, 255, 255)])
def test_the_first_frame_that_shows_something_is_read(kind, color):
    frames = [Image.new("RGBA", SIZE, color), four_corners().convert("RGBA")]
    options = {"append_images": frames, "duration": 100, "lossless": True}
    data = encoded(frames[0], kind, "RGBA", save_all=True, **options)
    assert_shows_corners(nst.load_image(data), 0.01)


def test_a_photo_with_an_odd_exif_tag_comes_in_upright():
    odd = struct.pack("<HHI4s", 0x0100, 2, 4, b"odd")  # ImageWidth as text, not as a number
    upside_down = struct.pack("<HHIHHI", ORIENTATION, 3, 1, 3, 0, 0)
    exif = b"Exif\0\0II*\0" + struct.pack("<IH", 8, 2) + odd + upside_down
    assert_shows_corners(nst.load_image(encoded(turned(3), exif=exif)))


# Sources, sizes, devices --------------------------------------------------------------------------


def test_every_kind_of_source_gives_the_same_tensor(tmp_path):
    path = tmp_path / "picture.png"
    four_corners().save(path)
    data, array = path.read_bytes(), np.asarray(four_corners())
    address = f"data:image/png;base64,{base64.b64encode(data).decode()}"
    pasted = (address, f' "{address}"\n', f"{address[:60]}\n{address[60:]}")
    decoded = (four_corners(), Image.open(path), array, array / 255)
    with path.open("rb") as file:
        files = (data, bytearray(data), memoryview(data), io.BytesIO(data), file)
        for source in (path, *pasted, *decoded, *files):
            for _ in range(2):  # the panel reads a source more than once
                assert torch.equal(nst.load_image(source), nst.load_image(four_corners()))


SPELLINGS = [
    f"{unicodedata.normalize(form, 'été')}/{unicodedata.normalize(other, 'café.png')}"
    for form in ("NFC", "NFD")
    for other in ("NFC", "NFD")
]


@pytest.mark.parametrize(
    ("pasted", "name"),
    [
        ("{}/my photos/cat.png", "my photos/cat.png"),
        ('"{}/my photos/cat.png"', "my photos/cat.png"),
        (" '{}/my photos/cat.png'\n", "my photos/cat.png"),
        ("{}/my\\ photos/cat.png", "my photos/cat.png"),
        ("~/cat.png", "cat.png"),
        ("~\\cat.png", "cat.png"),
        ("my%20photo%231.png", "my photo#1.png"),
        ("50%20.png", "50%20.png"),  # that is its name
        ("file://{}/cat.png", "cat.png"),
        ("file://nas/photos/cat.png", "nas/photos/cat.png"),
        ("file://localhost{}/a%23b?.png", "a#b?.png"),
        ("file://{}/a#b?.png", "a#b?.png"),
        # A Mac writes é as two letters, in names of folders too.
        *itertools.product(SPELLINGS, SPELLINGS),
    ],
)
def test_a_path_is_found_as_people_paste_it(tmp_path, monkeypatch, pasted, name):
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    four_corners().save(path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    assert_shows_corners(nst.load_image(pasted.format(tmp_path)))


REFUSED = {
    "a number": (7, "must be a path"),
    "nothing": (None, "must be a path"),
    "text": (io.StringIO("text"), "must be a path"),
    "two channels": (np.zeros((20, 20, 2), np.uint8), r"must be of shape .* \(20, 20, 2\) uint8"),
    "integers": (np.zeros((20, 20, 3), np.int64), "must be .* int64"),
    "too bright": (np.full((20, 20, 3), 2.0), "must be .* from 2 to 2"),
    "NaN": (np.full((20, 20, 3), np.nan), "must be .* from nan to nan"),
    "another address": ("ftp://example.org/cat.jpg", "'ftp://example.org/cat.jpg' must"),
    "a folder": (str(IMAGES), f"'{IMAGES}' is a folder"),
    "a small picture": (Image.new("RGB", (15, 40)), "15 x 40"),
    "a transparent picture": (Image.new("RGBA", SIZE), "the picture .* transparent"),
}


@pytest.mark.parametrize(("source", "words"), REFUSED.values(), ids=REFUSED)
def test_other_sources_are_refused_by_what_they_are(source, words):
    with pytest.raises(ValueError, match=words):
        nst.load_image(source)


def test_a_missing_file_is_named_with_its_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match=rf"nowhere\.png'.* '{tmp_path}'"):
        nst.load_image(tmp_path / "nowhere.png")


@pytest.mark.parametrize("value", [15, 64.5, "64"])
def test_an_unusable_max_size_is_refused_by_name(value):
    with pytest.raises(ValueError, match=f"max_size .*{value!r}"):
        nst.load_image(four_corners(), value)


@pytest.fixture
def website(tmp_path):
    """An address at which the files in ``tmp_path`` are."""

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            """Say nothing."""

    handler = functools.partial(Handler, directory=tmp_path)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, args=[0.01]).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_an_address_is_downloaded(website, tmp_path):
    four_corners().save(tmp_path / "my cät.png")
    for pasted in (f" {website}/my cät.png\n", Path(f"{website}/my cät.png")):
        assert_shows_corners(nst.load_image(pasted))


def test_a_failed_download_is_a_connection_error(website, tmp_path, monkeypatch):
    (tmp_path / "large.png").write_bytes(bytes(2000))
    with pytest.raises(ConnectionError, match=r"missing\.png.*404"):
        nst.load_image(f"{website}/missing.png")
    for limit, error in (("_DOWNLOAD_LIMIT", "large.png.*over"), ("_DOWNLOAD_SECONDS", "over")):
        with monkeypatch.context() as patch:
            patch.setattr(nst, limit, -1)
            with pytest.raises(ConnectionError, match=error):
                nst.load_image(f"{website}/large.png")
    with pytest.raises(ConnectionError, match="https://not an address"):
        nst.load_image("https://not an address")


def test_no_error_quotes_more_than_200_letters(tmp_path):
    long = "x" * 5000
    for source in (f"https://127.0.0.1:9/{long}", f"data:{long}", f"ftp://{long}", tmp_path / long):
        with pytest.raises((ValueError, OSError)) as error:
            nst.load_image(source)
        assert str(source)[:5] in str(error.value)
        assert len(str(error.value)) < 1000


@pytest.mark.parametrize(
    ("size", "max_size", "upscale", "expected"),
    [
        ((200, 100), 50, False, (25, 50)),
        ((100, 200), 50, False, (50, 25)),
        ((200, 100), 512, False, (100, 200)),  # not enlarged unasked
        ((200, 100), 400, True, (200, 400)),
        ((40, 20), 20, False, (16, 32)),  # the short side keeps 16 pixels
        ((1000, 16), 512, False, (16, 1000)),
    ],
)
def test_the_long_side_becomes_max_size(size, max_size, upscale, expected):
    image = nst.load_image(Image.new("RGB", size), max_size, upscale=upscale)
    assert tuple(image.shape[2:]) == expected


def test_resizing_is_lanczos():
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    expected = nst.load_image(noise.resize((32, 32), Image.Resampling.LANCZOS))
    assert torch.equal(nst.load_image(noise, 32), expected)


# Colour profiles ----------------------------------------------------------------------------------


SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def swapped_profile() -> bytes:
    """sRGB, but what is called red is blue."""
    profile = SRGB
    for old, new in ((b"rXYZ", b"????"), (b"bXYZ", b"rXYZ"), (b"????", b"bXYZ")):
        profile = profile.replace(old, new, 1)
    return profile


def linear_grey_profile() -> bytes:
    """A grey profile without a gamma: 0.5 is half as much light as white."""
    d50 = struct.pack(">3i", 63190, 65536, 54061)
    white = b"XYZ \0\0\0\0" + d50
    curve = b"curv\0\0\0\0" + struct.pack(">IHH", 1, 256, 0)  # gamma 1.0, padded
    table = struct.pack(">I", 2)
    table += struct.pack(">4sII", b"wtpt", 156, 20) + struct.pack(">4sII", b"kTRC", 176, 16)
    header = struct.pack(">II", 192, 0) + b"\2\x10\0\0mntrGRAYXYZ " + bytes(12)
    header += b"acsp" + bytes(28) + d50
    return header.ljust(128, b"\0") + table + white + curve


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_an_embedded_profile_is_converted_to_srgb(kind):
    image = nst.load_image(encoded(four_corners(), kind, icc_profile=swapped_profile()))
    assert_close(corners(image), torch.stack([BLUE, GREEN, RED, WHITE]), atol=0.06)


@pytest.mark.parametrize(("kind", "mode"), [("PNG", "RGBA"), ("PNG", "PA"), ("TIFF", "RGBA")])
def test_a_profile_leaves_the_transparency_alone(kind, mode):
    picture = four_corners()
    if mode == "RGBA":
        picture = picture.convert("RGBA")
        picture.paste((0, 0, 0, 0), (0, 0, 32, 24))
    image, visible = nst.load_painting(encoded(picture, kind, mode, icc_profile=swapped_profile()))
    assert corners(visible)[:, 0].tolist() == [0, 1, 1, 1]
    assert_close(corners(image)[1:], torch.stack([GREEN, RED, WHITE]), atol=0.06)


@pytest.mark.parametrize("mode", ["L", "LA", "I;16"])
def test_a_grey_profile_is_converted_too(mode):
    grey = Image.new("RGB", SIZE, (128, 128, 128))
    plain = nst.load_image(encoded(grey, "PNG", mode))
    linear = nst.load_image(encoded(grey, "PNG", mode, icc_profile=linear_grey_profile()))
    assert plain.mean() == pytest.approx(0.5, abs=0.01)
    assert linear.mean() == pytest.approx(0.735, abs=0.01)


UNFIT_PROFILES = {
    "text": ("RGB", b"no profile"),
    "cut off": ("RGB", swapped_profile()[:200]),
    "without its curve": ("RGB", linear_grey_profile().replace(b"kTRC", b"XTRC")),
    "of grey": ("RGB", linear_grey_profile()),
    "of colours": ("L", swapped_profile()),
    "for print": ("RGB", SRGB[:16] + b"CMYK" + SRGB[20:]),
}


@pytest.mark.parametrize(("mode", "profile"), UNFIT_PROFILES.values(), ids=UNFIT_PROFILES)
def test_an_unfit_profile_is_left_out_with_a_warning(mode, profile, tmp_path):
    path = tmp_path / "odd.png"
    path.write_bytes(encoded(four_corners(), "PNG", mode, icc_profile=profile))
    with pytest.warns(nst.StyleTransferWarning, match=r"odd\.png"):
        image = nst.load_image(path)
    assert_shows_corners(image, 0.01, mode)


def test_a_linear_png_is_converted_to_srgb():
    grey = Image.new("RGBA", SIZE, (55, 55, 55, 255))
    gamma = chunk(b"gAMA", struct.pack(">I", 100000))
    image = nst.load_image(with_chunk(encoded(grey, "PNG", "RGBA"), gamma))
    assert image.unique().tolist() == pytest.approx([128 / 255], abs=0.005)
    with_srgb = with_chunk(encoded(grey), gamma + chunk(b"sRGB", b"\0"))
    assert nst.load_image(with_srgb).unique().tolist() == pytest.approx([55 / 255])


@pytest.mark.parametrize("curve", [16, 18])  # PQ, HLG
@pytest.mark.parametrize("kind", ["PNG", "HEIF"])
def test_hdr_is_warned_of(kind, curve):
    if kind == "PNG":
        data = with_chunk(encoded(four_corners()), chunk(b"cICP", bytes([9, curve, 0, 1])))
    else:
        data = encoded(four_corners(), "HEIF", color_primaries=9, transfer_characteristics=curve)
    with pytest.warns(nst.StyleTransferWarning, match="the uploaded picture is HDR"):
        nst.load_image(data)


# Cut-outs and masks -------------------------------------------------------------------------------


def cut_out(hidden: str) -> Image.Image:
    """Four corners, of which an ellipse in the middle is opaque, the rest of another colour."""
    picture = Image.new("RGB", SIZE, hidden)
    shape = Image.new("L", SIZE)
    ImageDraw.Draw(shape).ellipse((12, 8, 51, 39), fill=255)
    picture.paste(four_corners(), mask=shape)
    picture.putalpha(shape)
    return picture


@pytest.mark.parametrize("max_size", [64, 32])
@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF"])
def test_what_is_hidden_counts_nowhere(kind, max_size):
    """Not its colour, and not at the edges either: those of what is visible go on."""
    options = {"lossless": True, "exact": True} if kind == "WEBP" else {}
    images = []
    for hidden in ("white", "black", "magenta"):
        data = encoded(cut_out(hidden), kind, "RGBA", **options)
        image, visible = nst.load_painting(data, max_size)
        assert torch.equal(image, nst.load_image(data, max_size))
        assert torch.equal(visible, nst.load_mask(data, max_size))
        images.append(image)
        inside = visible[0, 0] == 1
        opaque = nst.load_image(four_corners(), max_size)
        assert_close(image[0, :, inside], opaque[0, :, inside], atol=0.15)  # Lanczos sees less
        assert_shows_corners(image.round(), atol=0)
    assert torch.equal(images[0], images[1])
    assert torch.equal(images[0], images[2])


@pytest.mark.parametrize(("color", "around"), [("black", 1), ("yellow", 0), ("white", 0)])
def test_a_drawing_in_one_colour_keeps_its_shape(color, around):
    shape = Image.new("L", SIZE)
    shape.paste(255, (0, 0, 32, 48))
    drawing = Image.new("RGB", SIZE, color)
    drawing.putalpha(shape)
    image = nst.load_image(drawing)
    assert_close(image[..., :30], nst.load_image(Image.new("RGB", (30, 48), color)), atol=0)
    assert (image[..., 34:] == around).all()


def test_an_opaque_painting_is_visible_everywhere():
    painting, visible = nst.load_painting(four_corners().convert("RGBA"))
    assert visible is None
    assert torch.equal(painting, nst.load_image(four_corners()))


def test_a_mask_without_an_alpha_is_its_luminance():
    assert_shows_corners(nst.load_mask(four_corners().convert("RGBA")), 0.01, mode="L")
    with pytest.warns(nst.StyleTransferWarning, match="the picture is 100% white"):
        nst.load_mask(Image.new("RGB", SIZE, "white"))


@pytest.mark.parametrize("kind", [np.uint8, np.int32, np.uint16, np.float32, bool])
def test_a_mask_of_zeros_and_ones_is_black_and_white(kind):
    expected = half_mask((48, 64))
    labels = expected[0, 0].numpy().astype(kind)
    sources = [Image.fromarray(labels), encoded(Image.fromarray(labels.astype(np.uint8)))]
    if kind in (np.uint8, np.float32, bool):
        sources += [labels, labels[:, :, None], np.stack([labels] * 3, 2)]
    for source in sources:
        assert torch.equal(nst.load_mask(source), expected)


@pytest.mark.parametrize(
    ("size", "words"),
    [
        ((48, 64), ()),
        ((96, 128), ()),
        ((97, 128), ()),  # rounded
        ((50, 64), ("64 x 50", "64 x 48", "stretched")),
        ((64, 64), ("64 x 64", "64 x 48", "stretched")),
        ((128, 96), ("96 x 128", "64 x 48", "turn")),
    ],
)
@pytest.mark.parametrize("kind", ["masks", "keep", "start"])
def test_a_mask_of_another_aspect_is_warned_of_with_both_sizes(shallow, kind, size, words):
    photo, mask = torch.zeros(1, 3, 48, 64), half_mask(size)
    given = {kind: [mask] if kind == "masks" else mask}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        next(nst.stylize(photo, photo, SHALLOW, network=shallow, **given))
    messages = [str(warning.message) for warning in caught]
    assert len(messages) == bool(words)
    assert all(word in messages[0] for word in words)


# Raw files and TIFFs ------------------------------------------------------------------------------


def tiff(tags: dict[int, tuple]) -> bytes:
    """The four corners in a TIFF with more tags, {number: (type, value)}."""
    more = TiffImagePlugin.ImageFileDirectory_v2()
    for number, (kind, value) in tags.items():
        more.tagtype[number] = kind
        more[number] = value
    return encoded(four_corners(), "TIFF", tiffinfo=more)


def dng(orientation: int = 1) -> bytes:
    """The four corners as a sensor with a Bayer filter sees them, not developed."""
    colors = np.asarray(turned(orientation)) / 255
    sensor = np.zeros(colors.shape[:2], np.uint16)
    for y, x in np.ndindex(2, 2):
        sensor[y::2, x::2] = 60_000 * colors[y::2, x::2, y + x]  # red, green and green, blue
    from_xyz = (32405, -15371, -4985, -9693, 18760, 416, 556, -2040, 10572)  # to linear sRGB
    tags = [
        (50706, 1, 4, bytes([1, 4, 0, 0]), True),  # DNGVersion
        (33421, 3, 2, (2, 2), True),  # CFARepeatPatternDim
        (33422, 1, 4, bytes([0, 1, 1, 2]), True),  # CFAPattern
        (50717, 3, 1, 60_000, True),  # WhiteLevel
        (50721, 10, 9, tuple(n for value in from_xyz for n in (value, 10_000)), True),
        (50728, 5, 3, (1, 1) * 3, True),  # AsShotNeutral
        (274, 3, 1, orientation, True),
    ]
    file = io.BytesIO()
    tifffile.imwrite(file, sensor, photometric=32803, extratags=tags)
    return file.getvalue()


PLAIN = tiff({})
DAMAGED_RAW = {
    "sensor": dng()[:300],
    "DNG": tiff({50706: (1, b"\1\4\0\0")}),
    "NEF": tiff({254: (4, 1), 330: (4, (8,))}),
    "CR2": b"II*\0" + struct.pack("<I", len(PLAIN)) + b"CR\2\0" + PLAIN[12:] + PLAIN[8:],
    "CR3": b"\0\0\0\x18ftypcrx " + bytes(100),
    "RAF": b"FUJIFILMCCD-RAW " + bytes(100),
}


@pytest.mark.parametrize("max_size", [64, 32])
@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_a_raw_file_is_developed_and_turned_upright(orientation, max_size):
    image = nst.load_image(dng(orientation), max_size)
    assert max(image.shape[2:]) == max_size
    assert_shows_corners(image)


@pytest.mark.parametrize("data", DAMAGED_RAW.values(), ids=DAMAGED_RAW)
def test_a_raw_file_is_never_read_by_its_preview(data, monkeypatch):
    """Neither where it is damaged, nor where its library is missing."""
    with pytest.raises(ValueError, match="the uploaded picture is damaged"):
        nst.load_image(data)
    monkeypatch.setitem(sys.modules, "rawpy", None)
    with pytest.raises(ValueError, match=r"raw file.*pip install rawpy"):
        nst.load_image(data)


@pytest.mark.parametrize("tags", [{254: (4, 1)}, {330: (4, (8,))}])
def test_an_ordinary_tiff_with_other_pages_is_read(tags):
    assert_shows_corners(nst.load_image(tiff(tags)))


def wide_tiff(array: np.ndarray, **options) -> bytes:
    file = io.BytesIO()
    tifffile.imwrite(file, array, photometric="rgb", **options)
    return file.getvalue()


@pytest.mark.parametrize("planar", ["contig", "separate"])
@pytest.mark.parametrize(("dtype", "white"), [("<f4", 1), ("<u4", 65535), ("<f2", 1), (">f8", 1)])
@pytest.mark.parametrize("compression", [None, "zlib"])
def test_an_rgb_tiff_of_wide_numbers_is_read(dtype, white, planar, compression):
    array = (np.asarray(turned(3)) / 255 * white).astype(dtype)
    array = array.transpose(2, 0, 1) if planar == "separate" else array
    profile = swapped_profile()
    tags = [(274, 3, 1, 3, True), (34675, 7, len(profile), profile, True)]  # turned; ICC
    options = {"planarconfig": planar, "compression": compression, "extratags": tags}
    image = nst.load_image(wide_tiff(array, **options))
    assert_close(corners(image), torch.stack([BLUE, GREEN, RED, WHITE]), atol=0.06)


def test_a_wide_tiff_names_the_library_that_it_needs(monkeypatch):
    data = wide_tiff(np.zeros((20, 20, 3), "<f4"))
    monkeypatch.setitem(sys.modules, "tifffile", None)
    with pytest.raises(ValueError, match=r"TIFF.*pip install tifffile"):
        nst.load_image(data)


def test_a_tiff_of_other_samples_is_refused_with_what_they_are():
    file = io.BytesIO()
    tifffile.imwrite(file, np.zeros((20, 20, 4), "<f4"), photometric="separated")
    with pytest.raises(ValueError, match=r"4 samples of .*SEPARATED"):
        nst.load_image(file.getvalue())


@pytest.mark.parametrize("kind", [1, 0])
def test_of_a_tiff_with_a_preview_first_the_picture_is_read(kind):
    """Whether its tag says so or not; a larger mask of transparency is no picture."""
    small = Image.new("RGB", (16, 16), "magenta")
    file = io.BytesIO()
    with TiffImagePlugin.AppendingTiffWriter(file, True) as writer:
        for page, number in ((small, kind), (four_corners(), 0), (small.resize((80, 80)), 4)):
            page.save(writer, "TIFF", tiffinfo={254: number})
            writer.newFrame()
    assert_shows_corners(nst.load_image(file.getvalue()), 0.01)


# Damage -------------------------------------------------------------------------------------------


NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (24, 32, 3), dtype=np.uint8))
# Small files with enough detail that each cut-off byte is missed.
FILES = {
    "TIFF, packed": encoded(NOISE, "TIFF", compression="tiff_lzw"),
    "JPEG, progressive": encoded(NOISE, "JPEG", progressive=True),
    **{kind: encoded(NOISE, kind, modes[-1]) for kind, modes in MODES.items()},
}


@pytest.mark.parametrize("data", FILES.values(), ids=FILES)
def test_a_file_cut_off_anywhere_is_refused_or_whole(data):
    """Some formats end with bytes that no pixel needs."""
    whole = nst.load_image(data)
    refused = 0
    for end in range(0, len(data), 10):
        try:
            image = nst.load_image(data[:end])
            assert torch.equal(image, whole), f"half a picture at {end} bytes"
        except ValueError:
            refused += 1
    assert refused * 10 > 0.5 * len(data)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(data=st.data())
def test_random_bytes_are_a_picture_or_a_value_error(data):
    """In a file of each kind, cut and overwritten anywhere."""
    start = data.draw(st.sampled_from([*FILES.values(), *DAMAGED_RAW.values(), dng()]))
    position = data.draw(st.integers(0, len(start)))
    noise = data.draw(st.binary(max_size=64))
    end = data.draw(st.sampled_from([position + len(noise), len(start)]))
    with warnings.catch_warnings(), contextlib.suppress(ValueError):
        warnings.simplefilter("ignore")
        assert nst.load_image(start[:position] + noise + start[end:]).shape[:2] == (1, 3)


# Hostile files ------------------------------------------------------------------------------------


def png(width: int, height: int) -> bytes:
    """A grey PNG that claims to be of this size, and holds next to nothing."""
    size = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    pixels = chunk(b"IDAT", zlib.compress(bytes(9)))
    return b"\x89PNG\r\n\x1a\n" + size + pixels + chunk(b"IEND", b"")


UNSUPPORTED = r"not in a supported format \(.*JPEG.*PNG"
NO_PICTURES = {
    "a drawing": (b'<svg xmlns="http://www.w3.org/2000/svg"><script/></svg>', UNSUPPORTED),
    "PostScript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 48\nshowpage\n", UNSUPPORTED),
    "an icon": (b"\0\0\1\0\1\0\x40\x30\0\0\1\0\x20\0" + bytes(200), UNSUPPORTED),
    "a film": (b"\0\0\0\x20ftypisom\0\0\2\0isomiso2avc1mp41" + bytes(200), UNSUPPORTED),
    "nothing": (b"", UNSUPPORTED),
    "a page": (b"<!DOCTYPE html><html><body>404</body></html>", "a web page, not a picture"),
    "an odd page": (b"\n<!-- a --><HTML>", "a web page, not a picture"),
    "part of a page": (b"<p>Not found</p>", "a web page, not a picture"),
    "half a HEIC": (encoded(four_corners(), "HEIF")[:100], "HEIC, but damaged"),
    "a side of 2 ** 31": (png(2**31, 1), "2,147,483,648 pixels"),
    "too few pixels for its size": (png(*SIZE), "damaged"),
    "tags that lead nowhere": (b"II*\0" + struct.pack("<I", 2**32 - 8) + bytes(64), "damaged"),
    "a JPEG of markers": (b"\xff\xd8" + b"\xff\xe1\0\2" * 1000, "damaged"),
}


@pytest.mark.parametrize(("data", "words"), NO_PICTURES.values(), ids=NO_PICTURES)
def test_other_files_are_refused_whatever_their_names_say(data, words, tmp_path, monkeypatch):
    started = AssertionError("a program was started")  # as Pillow does for PostScript
    monkeypatch.setattr("subprocess.Popen", fail(started))
    path = tmp_path / "holiday.jpg"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=rf"holiday\.jpg' .*{words}"):
        nst.load_image(path)


LARGE = zlib.compress(bytes(2**21))


@pytest.mark.parametrize(
    "text",
    [chunk(b"zTXt", b"workflow\0\0" + LARGE), chunk(b"tEXt", b"workflow\0" + bytes(70_000_000))],
    ids=["packed", "plain"],
)
def test_a_png_with_a_large_text_is_read_and_pillows_limits_stay(text):
    before = PngImagePlugin.MAX_TEXT_CHUNK, PngImagePlugin.MAX_TEXT_MEMORY
    assert_shows_corners(nst.load_image(with_chunk(encoded(four_corners()), text)))
    with pytest.raises(ValueError, match="the uploaded picture"):
        nst.load_image(encoded(four_corners())[:60])
    assert before == (PngImagePlugin.MAX_TEXT_CHUNK, PngImagePlugin.MAX_TEXT_MEMORY)


def test_a_png_with_a_large_profile_is_read():
    profile = chunk(b"iCCP", b"icc\0\0" + LARGE)
    with pytest.warns(nst.StyleTransferWarning, match="profile of the uploaded picture"):
        image = nst.load_image(with_chunk(encoded(four_corners()), profile))
    assert_shows_corners(image)


@pytest.mark.parametrize("size", [(120, 90), (90, 200)])
def test_a_very_large_jpeg_is_decoded_smaller(size, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 60 * 50)
    monkeypatch.setattr(nst, "_MOST_JPEG_PIXELS", 90 * 200)
    shown = four_corners().resize(size)
    data = encoded(shown, "JPEG")
    image = nst.load_image(data, 40)
    assert max(image.shape[2:]) == 40
    assert_close(corners(image), expected_corners("RGB"), atol=0.1)
    for source, max_size, limit in ((data, max(size), 90 * 200), (data, 40, 100), (shown, 40, 0)):
        monkeypatch.setattr(nst, "_MOST_JPEG_PIXELS", limit)
        with pytest.raises(ValueError, match=f"{size[0] * size[1]:,} pixels.*shrink it"):
            nst.load_image(source, max_size)


def test_heic_is_named_where_its_library_is_missing(monkeypatch):
    data = encoded(four_corners(), "HEIF")
    monkeypatch.setattr(nst, "pillow_heif", None)
    monkeypatch.delitem(Image.OPEN, "HEIF")
    with pytest.raises(ValueError, match=r"HEIC.*pip install pillow-heif"):
        nst.load_image(data)


@pytest.mark.parametrize("filters", ["error", "ignore"])
@pytest.mark.parametrize("size", [(100_000, 100_000), (10_000, 9_000)])  # Pillow only warns of 2nd
def test_a_picture_with_too_many_pixels_is_refused_before_it_is_decoded(size, filters, monkeypatch):
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", fail(AssertionError("it was decoded")))
    with warnings.catch_warnings():
        warnings.simplefilter(filters)  # whatever the program around does with Pillow's warning
        with pytest.raises(ValueError, match="89,478,485"):
            nst.load_image(png(*size))
