"""Paint ``images/settings/`` and its README: ``python tests/pictures_of_settings.py [NAME ...]``.

One strip a setting: low, default, high, at 256 pixels, of the same photo and painting; with
names of some settings, only their strips. It takes ten to twenty minutes on two cores.
"""

import sys
from dataclasses import replace
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import nst_helpers as nst  # noqa: E402

CONFIG = nst.StyleTransferConfig(weights="bundled", precision="float32", max_size=256)
FOLDER = ROOT / "images" / "settings"
TILE = (150, 100)
LARGE = replace(CONFIG, max_size=512)
NOISY = replace(CONFIG, noise=0.3)
WEIGHTS = CONFIG.style_layer_weights


def load(name: str, size: int = 256) -> torch.Tensor:
    return nst.load_image(ROOT / "images" / name, size, upscale=True)


def ramp() -> torch.Tensor:
    """Black on the left, white on the right, softly."""
    photo = load("china.jpg")
    return torch.linspace(-2, 3, photo.shape[3]).clamp(0, 1).expand_as(photo)


def settings() -> dict[str, dict[str, nst.StyleTransferConfig]]:
    """{setting: {label: config}}."""

    def values(name: str, *options, base=CONFIG) -> dict[str, nst.StyleTransferConfig]:
        return {str(option): replace(base, **{name: option}) for option in options}

    deep, shallow = ("relu3_1", "relu4_1", "relu5_1"), ("relu1_1", "relu2_1")
    layers = {
        "relu1_1, relu2_1": replace(CONFIG, style_layers=shallow, style_layer_weights=(1, 1)),
        "all four": CONFIG,
        "relu3_1 to relu5_1": replace(CONFIG, style_layers=deep, style_layer_weights=(1, 1, 1)),
    }
    content_layers = ("relu2_2", "relu4_2", "relu5_2")
    late = (1, 1, 4, 8)
    return {
        "max_size": values("max_size", 128, 512, 1024),
        "quality": values("quality", "quick", "normal", "best"),
        "num_steps": values("num_steps", 10, 100, 300),
        "scales": values("scales", 1, 2, "auto", base=LARGE),  # 256 pixels have only two
        "content_weight": values("content_weight", 0, 5.0, 50),
        "style_weight": values("style_weight", 10, 100.0, 1000),
        "tv_weight": values("tv_weight", 0, 2.0, 200),
        "detail": values("detail", 0, 0.5, 1.0),
        "color": values("color", "style", "content", "luminance"),
        "style_scale": values("style_scale", 0.5, 1.0, 2),
        "style_blend": values("style_blend", (1, 0), "equal", (0, 1)),
        "init": values("init", "content", "noise", "style"),
        "optimizer": values("optimizer", "lbfgs", "adam"),
        "learning_rate": values("learning_rate", 0.002, 0.02, 0.2),
        "content_layers": {
            name: replace(CONFIG, content_layers=(name,)) for name in content_layers
        },
        "style_layers": layers,
        "style_layer_weights": values("style_layer_weights", (1, 0, 0, 0), WEIGHTS, late),
        "pooling": values("pooling", "max", "average"),
        "precision": values("precision", "float32", "bfloat16"),
        "checkpoint": values("checkpoint", False, True),
        "noise": values("noise", 0.0, 0.3, 1.0),
        "seed": values("seed", 0, 1, 2, base=NOISY),
    }


def pictures() -> dict[str, dict[str, dict]]:
    """{argument: {label: arguments of stylize}}."""
    left, right = 1 - ramp(), ramp()
    return {
        "masks": {"none": {}, "left, right": {"masks": [left, right]}},
        "keep": {"none": {}, "left": {"keep": left}},
    }


def paint(config: nst.StyleTransferConfig, two_styles: bool = False, **arguments) -> Image.Image:
    styles = [load("starry_night.jpg", max(512, config.max_size))]
    if two_styles:
        styles.append(load("stained_glass.jpg"))
    for step in nst.stylize(load("china.jpg", config.max_size), styles, config, **arguments):
        image = step.image
    return nst.to_pil(image)


def strip(pictures: dict[str, Image.Image]) -> Image.Image:
    width, height = TILE
    sheet = Image.new("RGB", (len(pictures) * (width + 4) - 4, height + 16), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=11)
    for i, (label, picture) in enumerate(pictures.items()):
        sheet.paste(picture.resize(TILE, Image.Resampling.LANCZOS), (i * (width + 4), 0))
        draw.text((i * (width + 4) + width // 2, height + 8), label, "black", font, "mm")
    return sheet


def paint_strip(name: str) -> Image.Image:
    if name in pictures():
        two_styles = name == "masks"
        labelled = pictures()[name].items()
        return strip({label: paint(CONFIG, two_styles, **given) for label, given in labelled})
    two_styles = name == "style_blend"
    configs = settings()[name].items()
    return strip({label: paint(config, two_styles) for label, config in configs})


def page() -> str:
    """The README of the strips."""
    about = "`china.jpg` in the style of `starry_night.jpg` at 256 pixels (`scales` at 512)"
    parts = [
        f"# What each setting looks like\n\n{about}; the second painting is\n`stained_glass.jpg`."
    ]
    for name in [*settings(), *pictures()]:
        parts.append(f"`{name}`\n\n![{name}: its values side by side]({name}.jpg)")
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    (FOLDER / "README.md").write_text(page())
    for name in sys.argv[1:] or [*settings(), *pictures()]:
        paint_strip(name).save(FOLDER / f"{name}.jpg", quality=85)
        print(name, flush=True)
