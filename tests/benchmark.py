"""How fast and how lean it is, measured on this machine: ``python tests/benchmark.py [--quick] [--json FILE]``.

The textbook loop that it is compared with is what a reader of the paper would write: float32, one scale, the whole
picture at once, in PyTorch's usual layout, autograd for the Gram matrices, 1000 steps of Adam or 300 of L-BFGS. Ten of
its steps are timed and multiplied. Every picture is judged by one
reference objective: the default losses at full size, in float32 and without the margin.
"""

import argparse
import json
import math
import platform
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import nst_helpers as nst  # noqa: E402

GB = 1e9


def load(size: int, config: nst.StyleTransferConfig) -> list[torch.Tensor]:
    """The default pair with a long side of ``size``; larger than the files are, they are enlarged."""
    device = nst.pick_device(config.device)
    names = ("china.jpg", "starry_night.jpg")
    return [nst.load_image(ROOT / "images" / name, size, upscale=True, device=device) for name in names]


def wait(device: torch.device) -> None:
    if device.type != "cpu":
        getattr(torch, device.type).synchronize()


def paint(size: int, **settings) -> tuple[torch.Tensor, float]:
    """A picture in the default way, and the seconds that its optimisation took."""
    config = nst.StyleTransferConfig(weights="bundled", max_size=size, **settings)
    network = nst.VGG19Features.from_config(config)
    content, style = load(size, config)
    start = time.perf_counter()
    for step in nst.stylize(content, style, config, network):
        image = step.image
    wait(network.device)
    return image, time.perf_counter() - start


class Objective:
    """The default losses at full size in float32, as plain autograd over the network without our layout."""

    def __init__(self, size: int) -> None:
        self.config = nst.StyleTransferConfig(weights="bundled", precision="float32", max_size=size)
        self.network = nst.VGG19Features.from_config(self.config).to(memory_format=torch.contiguous_format)
        self.content, style = load(size, self.config)
        with torch.no_grad():
            self.photo = {x: f for x, f in self.network(self.content).items() if x in nst.CONTENT_LAYERS}
            style = self.network(nst.shrink_to(style, size))
            self.grams = {x: self.gram(style[x]) for x in nst.STYLE_LAYERS}

    @staticmethod
    def gram(features: torch.Tensor) -> torch.Tensor:
        flat = features.flatten(2)
        return flat @ flat.mT / flat.shape[2]

    def __call__(self, image: torch.Tensor) -> torch.Tensor:
        found = {x: self.gram(f) if x in self.grams else f for x, f in self.network(image).items()}
        return nst.calculate_losses(image, found, self.photo, self.grams, self.config)["total"]


def textbook(objective: Objective, method: str, steps: int) -> tuple[float, float]:
    """The median seconds of a step, and the reference objective after ``steps`` of them."""
    image = objective.content.clone(memory_format=torch.contiguous_format).requires_grad_()
    times = []
    if method == "adam":
        optimiser = torch.optim.Adam([image], 0.02)
    else:
        optimiser = torch.optim.LBFGS([image], max_iter=1)

    def closure() -> torch.Tensor:
        optimiser.zero_grad()
        loss = objective(image)
        loss.backward()
        return loss

    for _ in range(steps):
        start = time.perf_counter()
        optimiser.step(closure)
        with torch.no_grad():
            image.clamp_(0, 1)
        wait(image.device)
        times.append(time.perf_counter() - start)
    with torch.no_grad():
        return statistics.median(times), objective(image).item()


def convolution_peak(dtype: torch.dtype, device: torch.device) -> float:
    """The FLOP/s of the best of a few plain convolutions of VGG19's own shapes."""
    best = 0.0
    for channels, side in ((64, 256), (128, 128), (256, 64)):
        x = torch.randn(1, channels, side, side, device=device).to(dtype, memory_format=torch.channels_last)
        kernel = torch.randn(channels, channels, 3, 3, device=device).to(dtype, memory_format=torch.channels_last)
        times = []
        for _ in range(12):
            start = time.perf_counter()
            F.conv2d(x, kernel, padding=1)
            wait(device)
            times.append(time.perf_counter() - start)
        best = max(best, 2 * 9 * channels**2 * side**2 / statistics.median(times[2:]))
    return best


def step_flops(network: nst.VGG19Features, height: int, width: int) -> float:
    """The FLOP of the convolutions of one step: forward, and the gradient for all but the weights."""
    total = 0.0
    for name, module in network.network.named_children():
        if name.startswith("conv"):
            scale = 2 ** (int(name[4]) - 1)
            total += 2 * module.weight.numel() * (height // scale) * (width // scale)
    return 2 * total


def share_of_peak(size: int) -> dict[str, float]:
    """Steps at full size, each beside a measurement of the peak, so that both see the same machine."""
    config = nst.StyleTransferConfig(weights="bundled", max_size=size, scales=1, num_steps=8)
    network = nst.VGG19Features.from_config(config)
    content, style = load(size, config)
    height, width = (side + 2 * nst.MARGIN for side in content.shape[2:])
    seconds, peaks = [], []
    steps = nst.stylize(content, style, config, network)
    next(steps)
    for _ in range(config.num_steps - 1):
        start = time.perf_counter()
        next(steps)
        wait(network.device)
        seconds.append(time.perf_counter() - start)
        peaks.append(convolution_peak(network.dtype, network.device))
    rate, peak = step_flops(network, height, width) / statistics.median(seconds), statistics.median(peaks)
    return {"step_gflops": rate / GB, "peak_gflops": peak / GB, "share_of_peak": rate / peak}


def peak_memory(size: int, checkpoint: bool) -> float:
    """Bytes a pixel at the peak of three steps at one scale, above the start; run in a process of its own."""
    config = nst.StyleTransferConfig(weights="bundled", max_size=size, scales=1, num_steps=3, checkpoint=checkpoint)
    network = nst.VGG19Features.from_config(config)
    content, style = load(size, config)
    if network.device.type == "cuda":
        start = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
    else:
        process, ended = psutil.Process(), threading.Event()
        start = highest = process.memory_info().rss

        def watch() -> None:
            nonlocal highest
            while not ended.wait(0.005):
                highest = max(highest, process.memory_info().rss)

        watcher = threading.Thread(target=watch)
        watcher.start()
    for step in nst.stylize(content, style, config, network):
        image = step.image
    if network.device.type == "cuda":
        highest = torch.cuda.max_memory_allocated()
    else:
        ended.set()
        watcher.join()
    return (highest - start) / image[0, 0].numel()


def in_a_process(code: str) -> float:
    """What ``code`` prints, run by a fresh Python that knows this file as ``benchmark``."""
    paths = f"import sys; sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / 'tests')!r}]\n"
    done = subprocess.run([sys.executable, "-c", paths + code], capture_output=True, text=True, check=True)
    return float(done.stdout)


START_CODE = """
import time; start = time.perf_counter()
import nst_helpers as nst
config = nst.StyleTransferConfig(weights="bundled")
content, style = (nst.load_image(f"images/{name}") for name in ("china.jpg", "starry_night.jpg"))
next(nst.stylize(content, style, config))
print(time.perf_counter() - start)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="the picture and the share of the peak, at 256 px")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to FILE as well")
    arguments = parser.parse_args()
    size = 256 if arguments.quick else 512
    objective = Objective(size)
    precision = nst.VGG19Features.from_config(nst.StyleTransferConfig(weights="bundled")).dtype
    results = {
        "machine": f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads",
        "device": torch.cuda.get_device_name() if objective.content.is_cuda else str(objective.content.device),
        "torch": torch.__version__,
        "precision": str(precision).removeprefix("torch."),
        "size": size,
    }
    image, seconds = paint(size)
    with torch.no_grad():
        results |= {"default_seconds": seconds, "default_objective": objective(image).item()}
        results["photo_objective"] = objective(objective.content).item()
    adam_seconds, adam_objective = textbook(objective, "adam", 10)
    lbfgs_seconds, lbfgs_objective = textbook(objective, "lbfgs", 10)
    results |= {
        "textbook_step_seconds": adam_seconds,
        "textbook_objective_after_10_steps": adam_objective,
        "textbook_lbfgs_step_seconds": lbfgs_seconds,
        "textbook_lbfgs_objective_after_10_steps": lbfgs_objective,
        "ratio_to_textbook_1000_steps": 1000 * adam_seconds / seconds,
        "ratio_to_textbook_lbfgs_300_steps": 300 * lbfgs_seconds / seconds,
    }
    results |= share_of_peak(size)
    if not arguments.quick:
        for pixels in (512, 1024, 2048):
            for name, checkpoint in (("bytes_per_pixel", True), ("bytes_per_pixel_plain", False)):
                code = f"import benchmark; print(benchmark.peak_memory({pixels}, {checkpoint}))"
                results[f"{name}_{pixels}"] = in_a_process(code)
        times = {512: seconds} | {other: paint(other)[1] for other in (256, 1024, 2048)}
        results |= {f"seconds_{side}": times[side] for side in sorted(times)}
        results["time_growth_exponent"] = math.log(times[2048] / times[256]) / math.log((2048 / 256) ** 2)
        results["time_growth_exponent_512_2048"] = math.log(times[2048] / times[512]) / math.log((2048 / 512) ** 2)
        results["start_seconds"] = in_a_process(f"import os; os.chdir({str(ROOT)!r})\n{START_CODE}")
    for name, value in results.items():
        print(f"{name:40} {value:.4g}" if isinstance(value, float) else f"{name:40} {value}")
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
