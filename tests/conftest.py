"""What several test files share: sample pictures, one VGG19, and ways to make things go wrong."""

import io
import json
import re
import shlex
import sys
from collections.abc import Callable, Collection, Iterable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import matplotlib as mpl
import pytest
import torch
import torchvision
from PIL import Image
from torch import nn

import nst_helpers as nst

mpl.use("Agg")  # no window, whatever the machine

ROOT = Path(__file__).parent.parent
IMAGES = ROOT / "images"
README = (ROOT / "README.md").read_text(encoding="utf-8")
NAMES = ("china.jpg", "chelsea.png", "starry_night.jpg", "stained_glass.jpg")
NO_SPACE = OSError(28, "No space left on device")

# Small, quick and the same on every machine.
TINY = nst.StyleTransferConfig(
    weights="bundled",
    precision="float32",
    device="cpu",
    max_size=64,
    quality="quick",  # the others paint larger than the result
    num_steps=6,
    scales=2,
)
# As quick as can be, for what is the same with any network.
SHALLOW = replace(
    TINY,
    content_layers=("relu2_1",),
    style_layers=("relu1_1",),
)


def _has_half() -> bool:
    try:
        nn.functional.pad(torch.zeros(1, 1, 2, 2).half(), (1,) * 4, mode="replicate")
    except RuntimeError:
        return False
    return True


needs_half = pytest.mark.skipif(not _has_half(), reason="this torch has no float16 on a CPU")


def readme_command(beginning: str) -> list[str]:
    """The README's command that begins so, its program taken from this environment."""
    lines = re.findall(r"^\.venv/bin/.*$", README, re.MULTILINE)
    commands = [part.strip() for line in lines for part in line.split("&&")]
    (command,) = [command for command in commands if command.startswith(f".venv/bin/{beginning}")]
    program, *arguments = shlex.split(command)
    return [str(Path(sys.executable).parent / Path(program).name), *arguments]


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Random tensors are the same in every run."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def vgg() -> nst.VGG19Features:
    """The network for ``TINY``."""
    return nst.load_network(TINY)


@pytest.fixture(scope="session")
def shallow() -> nst.VGG19Features:
    """The network for ``SHALLOW``."""
    return nst.load_network(SHALLOW)


@pytest.fixture(scope="session")
def pictures() -> dict[str, torch.Tensor]:
    """The two photos and the two paintings, 128 pixels long, by the names of their files."""
    return {Path(name).stem: nst.load_image(IMAGES / name, 128) for name in NAMES}


@pytest.fixture(scope="session")
def pair(pictures) -> tuple[torch.Tensor, torch.Tensor]:
    """A photo and a painting, 64 pixels long."""
    return nst.shrink_to(pictures["china"], 64), nst.shrink_to(pictures["starry_night"], 64)


def last(steps: Iterable[nst.Step]) -> nst.Step:
    *_, step = steps
    return step


def paint(content: torch.Tensor, styles, network: nst.VGG19Features, **settings) -> torch.Tensor:
    """The picture that ``stylize`` ends with, given settings and pictures alike by their names."""
    names = ("masks", "keep", "start", "visible")
    given = {name: settings.pop(name) for name in names if name in settings}
    config = replace(SHALLOW if network.layers == SHALLOW.layers else TINY, **settings)
    return last(nst.stylize(content, styles, config, network=network, **given)).image


def mean_change(image: torch.Tensor, other: torch.Tensor) -> float:
    return (image - other).abs().mean().item()


def assert_close(image: torch.Tensor, expected: torch.Tensor, atol: float) -> None:
    torch.testing.assert_close(image, expected, atol=atol, rtol=0)


def half_mask(size, left: bool = True) -> torch.Tensor:
    """(1, 3, H, W), white in its left or its right half."""
    mask = torch.zeros(1, 3, *size)
    middle = size[1] // 2
    mask[..., slice(None, middle) if left else slice(middle, None)] = 1
    return mask


def style_loss(image: torch.Tensor, style: torch.Tensor, vgg: nst.VGG19Features) -> float:
    """How far ``image`` is from the style of ``style``, in the style layers."""
    found, target = (vgg.look(seen, (), TINY.style_layers)[1] for seen in (image, style))
    return nst.calculate_style_loss(found, target).item()


def content_loss(image: torch.Tensor, content: torch.Tensor, vgg: nst.VGG19Features) -> float:
    found, target = (vgg(seen, TINY.content_layers) for seen in (image, content))
    return nst.calculate_content_loss(found, target).item()


def encoded(picture: Image.Image, kind: str = "PNG", **options) -> bytes:
    """The bytes of a file with ``picture`` in it."""
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


def record_in(path: Path) -> dict:
    """The record in a PNG, read as anybody would."""
    with Image.open(path) as picture:
        return json.loads(picture.text["style_transfer"])


def ours(caught) -> list:
    """The library's own warnings: old versions of other packages deprecate much."""
    return [warning for warning in caught if warning.category is nst.StyleTransferWarning]


def fail(error: BaseException) -> Callable:
    """A function that takes anything and raises ``error``."""

    def raising(*_, **__):
        raise error

    return raising


class Look(NamedTuple):
    """What ``VGG19Features.look`` is asked, in the order of its arguments."""

    network: nst.VGG19Features
    image: torch.Tensor
    content_layers: Collection[str] = ()
    style_layers: Collection[str] = ()
    guides: dict[str, torch.Tensor] | None = None
    blocks_in_strips: int = 0

    @property
    def is_canvas(self) -> bool:
        return self.image.requires_grad


def replace_looks(monkeypatch, see: Callable) -> None:
    """Let ``see(asked, look)`` answer every ``Look``; ``look(*asked)`` is what is really there."""
    look = nst.VGG19Features.look
    replaced = lambda *args, **given: see(Look(*args, **given), look)  # noqa: E731
    monkeypatch.setattr(nst.VGG19Features, "look", replaced)


def break_looks(monkeypatch, at_step: int, change: Callable) -> None:
    """Let ``change`` replace what the network sees of the canvas, ``(content, style)``, once."""
    steps = []

    def see(asked, look):
        seen = look(*asked)
        steps.append(asked.is_canvas)
        return change(*seen) if asked.is_canvas and sum(steps) == at_step else seen

    replace_looks(monkeypatch, see)


def note_looks(monkeypatch) -> list[Look]:
    """A list that gets every ``Look``, with a copy of its image, since the canvas changes."""
    looks = []

    def see(asked, look):
        copy = asked.image.detach().clone().requires_grad_(asked.is_canvas)
        looks.append(asked._replace(image=copy))
        return look(*asked)

    replace_looks(monkeypatch, see)
    return looks


def free_memory(monkeypatch, free: float) -> None:
    """Let so many bytes be free, whatever the machine."""
    monkeypatch.setattr(nst, "_free_bytes", lambda device: free)


@pytest.fixture
def low_strips(monkeypatch) -> None:
    """Strips of 8 rows, so that all five blocks have several in a small image."""
    monkeypatch.setattr(nst, "_STRIP_ROWS", 8)


def random_vgg(modules: int) -> nn.Sequential:
    """The first so many of torchvision's modules, with random weights."""
    with torch.device("meta"):
        features = torchvision.models.vgg19().features[:modules]
    features.to_empty(device="cpu")
    torch.manual_seed(0)
    for module in features:
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            nn.init.uniform_(module.bias, -0.1, 0.1)
    return features.requires_grad_(False).eval()


def save_checkpoint(features: nn.Sequential, path: Path) -> Path:
    """A file as torchvision publishes it: features.0.weight and so on."""
    state = {f"features.{name}": value for name, value in features.state_dict().items()}
    torch.save(state, path)
    return path
