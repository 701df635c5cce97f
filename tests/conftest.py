"""What several test files share: the sample pictures and one VGG19 with its real weights."""

from pathlib import Path

import matplotlib
import pytest

import nst_helpers as nst

matplotlib.use("Agg")  # no window, whatever the machine

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="session")
def vgg() -> nst.VGG19Features:
    return nst.VGG19Features(weights="bundled")


@pytest.fixture(scope="session")
def pictures() -> dict:
    """The two photos and the two paintings, 128 pixels long."""
    names = ("china.jpg", "chelsea.png", "starry_night.jpg", "stained_glass.jpg")
    return {Path(name).stem: nst.load_image(ROOT / "images" / name, 128) for name in names}
