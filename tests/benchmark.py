"""How fast and how lean it is, measured on this machine.

usage: python tests/benchmark.py [--quick] [--json FILE]

The textbook loop that it is compared with is what a reader of the paper would write: float32, one
size, the whole picture at once, autograd for the Gram matrices, L-BFGS. Ten of its steps are timed.
"""

import argparse
import json
import statistics
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import psutil
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import nst_helpers as nst  # noqa: E402

GAUGE_SECONDS = 0.005  # between two looks at the memory
CONFIG = nst.StyleTransferConfig(weights="bundled")
FIVE_LAYERS = (*CONFIG.style_layers, "relu5_1")


def load(size: int) -> list[torch.Tensor]:
    """The sample pair with a long side of ``size``; larger than the files are, it is enlarged."""
    files = [ROOT / "images" / name for name in ("china.jpg", "starry_night.jpg")]
    return [nst.load_image(file, size, upscale=True, device="auto") for file in files]


def wait(device: torch.device) -> None:
    if device.type != "cpu":
        getattr(torch, device.type).synchronize()


def seconds_of_a_run(size: int, **settings) -> float:
    """How long painting the sample pair takes."""
    config = replace(CONFIG, max_size=size, **settings)
    network = nst.load_network(config)
    content, style = load(size)
    begin = time.perf_counter()
    for step in nst.stylize(content, style, config, network=network):
        image = step.image
    wait(image.device)
    return time.perf_counter() - begin


def gram(features: torch.Tensor) -> torch.Tensor:
    flat = features.flatten(2)
    return flat @ flat.mT / flat.shape[2]


def seconds_of_a_textbook_step(size: int) -> float:
    """The median of ten steps of the loop that a reader of the paper would write."""
    config = replace(CONFIG, style_layers=FIVE_LAYERS, precision="float32")
    network = nst.load_network(config)
    network.to(memory_format=torch.contiguous_format)
    content, style = load(size)
    with torch.no_grad():
        photo = network(content, CONFIG.content_layers)
        targets = {layer: gram(found) for layer, found in network(style, FIVE_LAYERS).items()}
    image = content.clone(memory_format=torch.contiguous_format).requires_grad_()
    optimizer = torch.optim.LBFGS([image], max_iter=1)

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        features = network(image)
        of_style = [
            (gram(features[layer]) - target).square().sum() for layer, target in targets.items()
        ]
        total = sum(of_style) + nst.calculate_content_loss(features, photo)
        total.backward()
        return total

    times = []
    for _ in range(10):
        begin = time.perf_counter()
        optimizer.step(loss)
        wait(image.device)
        times.append(time.perf_counter() - begin)
    return statistics.median(times)


def bytes_a_pixel(size: int, optimizer: str, checkpoint: bool) -> float:
    """The peak of a run, above its start; to be run in a process of its own."""
    config = replace(
        CONFIG, max_size=size, optimizer=optimizer, checkpoint=checkpoint, precision="float32"
    )
    network = nst.load_network(config)
    content, style = load(size)
    process, has_ended = psutil.Process(), threading.Event()
    start = process.memory_info().rss
    seen = [start]

    def gauge() -> None:
        while not has_ended.wait(GAUGE_SECONDS):
            seen.append(process.memory_info().rss)

    gauging = threading.Thread(target=gauge)
    gauging.start()
    for _ in nst.stylize(content, style, config, network=network):
        pass
    has_ended.set()
    gauging.join()
    return (max(seen) - start) / content[0, 0].numel()


def in_a_process(call: str) -> float:
    """What a function of this file gives in a fresh Python."""
    paths = [str(ROOT), str(ROOT / "tests")]
    code = f"import sys; sys.path[:0] = {paths}\nimport benchmark\nprint(benchmark.{call})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return float(done.stdout.splitlines()[-1])


def results(is_quick: bool) -> dict[str, object]:
    size = 256 if is_quick else 512
    textbook = seconds_of_a_textbook_step(size)
    normal = seconds_of_a_run(size)
    found: dict[str, object] = {
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "precision": str(nst.load_network(CONFIG).dtype),
        f"seconds, {size} px": normal,
        f"seconds, {size} px, quick": seconds_of_a_run(size, quality="quick"),
        f"seconds, {size} px, adam": seconds_of_a_run(size, optimizer="adam"),
        f"seconds of a textbook step, {size} px": textbook,
        "times faster than 300 textbook steps": 300 * textbook / normal,
    }
    if is_quick:
        return found
    for other in (256, 1024, 2048):
        found[f"seconds, {other} px"] = seconds_of_a_run(other)
    for optimizer in ("lbfgs", "adam"):
        for checkpoint in (False, True):
            call = f"bytes_a_pixel(512, {optimizer!r}, {checkpoint})"
            how = "with" if checkpoint else "without"
            name = f"bytes a pixel, {optimizer}, {how} checkpoints"
            found[name] = in_a_process(call)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="only runs at 256 pixels")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to FILE too")
    arguments = parser.parse_args()
    found = results(arguments.quick)
    for name, value in found.items():
        print(f"{name:45} {value:.4g}" if isinstance(value, float) else f"{name:45} {value}")
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
