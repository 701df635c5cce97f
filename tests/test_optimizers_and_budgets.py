"""L-BFGS and Adam on problems whose answer is known, and runs that go by quality or by time."""

from dataclasses import replace

import pytest
import torch
from conftest import SHALLOW, last

import nst_helpers as nst

WIDE = (-100.0, 100.0)  # limits that no pixel reaches
KINDS = {"lbfgs": nst.LbfgsOnCanvas, "adam": nst.AdamOnCanvas}


def scale_of(steps: int, rate: float) -> nst.Scale:
    return nst.Scale((16, 16), steps, rate)


def minimise(optimizer, curvatures: torch.Tensor, steps: int) -> None:
    """Steps on the quadratic Σ c x² / 2, whose minimum is at 0."""
    for _ in range(steps):
        optimizer.move(optimizer.canvas.detach() * curvatures)


# L-BFGS -------------------------------------------------------------------------------------------


def test_lbfgs_finds_the_minimum_of_a_quadratic_of_few_curvatures_and_adam_is_slower():
    """With four pairs it knows the three curvatures exactly, and steps straight to 0."""
    curvatures = torch.tensor([1.0, 3.0, 9.0]).repeat(16).view(1, 3, 4, 4)
    distances = {}
    for name, kind in KINDS.items():
        canvas = torch.ones(1, 3, 4, 4, requires_grad=True)
        minimise(kind(canvas, scale_of(20, 0.3), WIDE), curvatures, 20)
        distances[name] = canvas.detach().abs().max().item()
    assert distances["lbfgs"] < 1e-4
    assert distances["lbfgs"] < distances["adam"]


def test_the_direction_of_lbfgs_is_the_inverse_hessian_of_bfgs_times_the_gradient():
    """As equation 6.17 of Nocedal and Wright makes it of the pairs, as a matrix."""
    torch.manual_seed(0)
    curvatures = torch.rand(1, 3, 2, 2) + 0.1
    canvas = torch.randn(1, 3, 2, 2).requires_grad_()
    optimizer = nst.LbfgsOnCanvas(canvas, scale_of(9, 0.5), WIDE)
    minimise(optimizer, curvatures, 4)
    inverse_hessian = optimizer.gradient_factor * torch.eye(12)
    for s, y, rho in optimizer.pairs:
        project = torch.eye(12) - rho * torch.outer(s.flatten(), y.flatten())
        inverse_hessian = project @ inverse_hessian @ project.T
        inverse_hessian += rho * torch.outer(s.flatten(), s.flatten())
    assert len(optimizer.pairs) == 3
    gradient = torch.randn(1, 3, 2, 2)
    expected = -inverse_hessian @ gradient.flatten()
    torch.testing.assert_close(optimizer._direction(gradient).flatten(), expected)


def test_with_pairs_of_half_precision_lbfgs_still_finds_the_minimum():
    curvatures = torch.tensor([1.0, 3.0, 9.0]).repeat(16).view(1, 3, 4, 4)
    canvas = torch.ones(1, 3, 4, 4, requires_grad=True)
    optimizer = nst.LbfgsOnCanvas(canvas, scale_of(20, 0.3), WIDE, torch.bfloat16)
    minimise(optimizer, curvatures, 20)
    assert canvas.detach().abs().max() < 1e-3


@pytest.mark.parametrize(
    ("in_strips", "pair_type"),
    [(nst.ALL_BLOCKS, torch.bfloat16), (1, torch.bfloat16), (0, torch.float32)],
)
def test_in_strips_what_lbfgs_remembers_takes_half(shallow, in_strips, pair_type):
    canvas = torch.rand(1, 3, 16, 16, requires_grad=True)
    extractor = nst.FeatureExtractor(shallow, replace(SHALLOW, optimizer="lbfgs"), in_strips)
    optimizer = nst.make_optimizer(canvas, scale_of(3, 0.1), (0.0, 1.0), extractor)
    for _ in range(3):
        optimizer.move(torch.randn(1, 3, 16, 16))
    assert len(optimizer.pairs) == 2
    for s, y, _ in optimizer.pairs:
        assert s.dtype == y.dtype == pair_type


@pytest.mark.parametrize("name", ["lbfgs", "adam"])
def test_the_first_move_is_short_and_none_is_much_longer_than_the_rate(name):
    torch.manual_seed(0)
    canvas = torch.rand(1, 3, 8, 8, requires_grad=True)
    optimizer = KINDS[name](canvas, scale_of(12, 0.02), WIDE)
    for number in range(12):
        before = canvas.detach().clone()
        optimizer.move(torch.randn(1, 3, 8, 8))
        length = (canvas.detach() - before).abs().mean().item()
        if number == 0 and name == "lbfgs":
            assert length == pytest.approx(nst.FIRST_MOVE * 0.02, rel=1e-3)
        assert length <= nst.LONGEST_MOVE * 0.02 * 1.001


def test_a_pair_without_curvature_is_as_if_it_were_not_there():
    """A gradient that does not change teaches nothing: the step stays what it was."""
    canvas = torch.zeros(1, 3, 4, 4, requires_grad=True)
    optimizer = nst.LbfgsOnCanvas(canvas, scale_of(3, 0.1), WIDE)
    moves = []
    for _ in range(3):
        before = canvas.detach().clone()
        optimizer.move(torch.ones(1, 3, 4, 4))
        moves.append(canvas.detach() - before)
    assert all(torch.allclose(move, moves[0]) for move in moves)
    assert moves[0].mean() == pytest.approx(-0.1 * nst.FIRST_MOVE)


@pytest.mark.parametrize("name", ["lbfgs", "adam"])
def test_pixels_stay_within_their_limits_and_a_gradient_of_zero_moves_none(name):
    canvas = torch.full((1, 3, 4, 4), 0.99, requires_grad=True)
    optimizer = KINDS[name](canvas, scale_of(3, 0.5), (0.0, 1.0))
    optimizer.move(torch.zeros(1, 3, 4, 4))
    assert torch.equal(canvas.detach(), torch.full((1, 3, 4, 4), 0.99))
    optimizer.move(-torch.ones(1, 3, 4, 4))
    assert canvas.max() == 1
    assert optimizer.picture.isfinite().all()


def test_lbfgs_remembers_what_the_picture_did_after_the_clamp():
    """Half of the pixels are stopped at 1; their pairs say that they hardly moved."""
    canvas = torch.full((1, 1, 2, 2), 0.9, requires_grad=True)
    optimizer = nst.LbfgsOnCanvas(canvas, scale_of(3, 0.5 / nst.FIRST_MOVE), (0.0, 1.0))
    optimizer.move(torch.tensor([[-1.0, 1.0], [-1.0, 1.0]]).view(1, 1, 2, 2))
    optimizer.move(torch.tensor([[-0.5, 0.5], [-0.5, 0.5]]).view(1, 1, 2, 2))
    ((moved, changed, _),) = optimizer.pairs
    torch.testing.assert_close(moved.flatten(), torch.tensor([0.1, -0.5, 0.1, -0.5]))
    torch.testing.assert_close(changed.flatten(), torch.tensor([0.5, -0.5, 0.5, -0.5]))


def test_adam_hardly_moves_a_pixel_that_hardly_matters():
    canvas = torch.zeros(1, 1, 1, 2, requires_grad=True)
    optimizer = nst.AdamOnCanvas(canvas, scale_of(9, 0.1), WIDE)
    optimizer.move(torch.tensor([1.0, 1e-4]).view(1, 1, 1, 2))
    large, small = canvas.detach().abs().flatten().tolist()
    assert small < large / 50


# Budgets ------------------------------------------------------------------------------------------


@pytest.fixture
def steady(monkeypatch) -> None:
    """A machine that takes a microsecond a pixel and step, on every look."""
    monkeypatch.setattr(nst, "measure_rate", lambda *_: 1e-6)


@pytest.mark.parametrize(("quality", "factor"), [("quick", 1 / 3), ("normal", 1), ("best", 5)])
@pytest.mark.parametrize("long_side", [64, 512, 2048])
def test_quality_is_a_share_of_the_work_of_the_normal_steps(shallow, quality, factor, long_side):
    config = replace(SHALLOW, num_steps="auto", quality=quality, scales="auto")
    photo = torch.zeros(1, 3, 1, 1).expand(1, 3, long_side * 2 // 3, long_side)
    pictures = nst.Pictures(photo, [photo])
    steps = nst.choose_num_steps(pictures, config, shallow)
    assert (steps == nst.NORMAL_STEPS) is (quality == "normal")
    normal = replace(config, quality="normal")
    runs = ((nst.NORMAL_STEPS, normal), (steps, config), (steps + 1, config))
    works = [
        sum(scale.work for scale in nst.plan_scales(pictures.size, number, settings))
        for number, settings in runs
    ]
    assert works[1] <= factor * works[0] < works[2]
    assert nst.choose_num_steps(pictures, replace(config, num_steps=7), shallow) == 7


@pytest.mark.parametrize("long_side", [384, 512, 1024, 2048])
def test_steps_beyond_the_normal_ones_are_at_the_two_finest_scales(long_side):
    size = (long_side * 2 // 3, long_side)
    normal, more = (nst.plan_scales(size, steps, nst.StyleTransferConfig()) for steps in (75, 188))
    gained = [after.steps - before.steps for before, after in zip(normal, more, strict=True)]
    assert gained == [0] * (len(normal) - 2) + [56, 57]


def test_with_fewer_scales_the_further_steps_go_to_those_that_there_are():
    for scales in (1, 2, 3):
        config = nst.StyleTransferConfig(scales=scales)
        plan = nst.plan_scales((200, 300), 100, config)
        assert len(plan) == scales
        assert sum(scale.steps for scale in plan) == 100


@pytest.mark.parametrize("seconds", [0.05, 1.0, 30.0])
def test_seconds_buy_the_steps_that_fit_and_no_more(steady, shallow, pair, seconds):
    config = replace(SHALLOW, num_steps="auto", seconds=seconds)
    pictures = nst.gather_pictures(*pair)
    steps = nst.choose_num_steps(pictures, config, shallow)
    for number, fits in ((steps, True), (steps + 1, False)):
        plan = nst.plan_scales(pictures.size, number, config)
        taken = nst.seconds_needed(plan, pictures, config, shallow, 1e-6)
        assert (taken <= seconds) is fits


def test_more_time_goes_to_the_full_size_too(steady, shallow, pair):
    def at_full_size(seconds: float) -> int:
        config = replace(SHALLOW, num_steps="auto", seconds=seconds)
        pictures = nst.gather_pictures(*pair)
        steps = nst.choose_num_steps(pictures, config, shallow)
        return nst.plan_scales(pictures.size, steps, config)[-1].steps

    assert at_full_size(10.0) > 5 * at_full_size(1.0)


def test_seconds_too_few_for_one_step_are_refused_before_the_loop(steady, shallow, pair):
    config = replace(SHALLOW, num_steps="auto", seconds=1e-4)
    with pytest.raises(ValueError, match="seconds") as error:
        nst.stylize(*pair, config, network=shallow)
    assert "0.0001" in str(error.value)


@pytest.mark.parametrize("values", [{"seconds": 0}, {"seconds": 5, "num_steps": 9}])
def test_seconds_that_cannot_be_are_refused(values):
    with pytest.raises(ValueError, match="seconds"):
        nst.StyleTransferConfig(**values)


def test_a_run_whose_machine_gets_slower_ends_in_time_with_a_finished_picture(
    monkeypatch, steady, shallow, pair
):
    """Each step takes three times as long as was measured."""
    clock = [0.0]
    monkeypatch.setattr(nst.time, "perf_counter", lambda: clock[0])
    config = replace(SHALLOW, num_steps="auto", seconds=0.6)
    planned = nst.choose_num_steps(nst.gather_pictures(*pair), config, shallow)
    steps = []
    for step in nst.stylize(*pair, config, network=shallow):
        steps.append(step)
        clock[0] += 3e-6 * nst.painted_pixels(step.image.shape[2:])
    assert clock[0] < 1.5 * 0.6
    assert steps[-1].image.shape == pair[0].shape
    assert steps[-1].record["finished"]
    assert steps[-1].number == steps[-1].total == len(steps) < planned
    assert steps[-1].record["settings"]["num_steps"] == len(steps)
    assert steps[-1].progress == 1


def test_a_run_that_keeps_its_speed_takes_all_its_steps(monkeypatch, steady, shallow, pair):
    clock = [0.0]
    monkeypatch.setattr(nst.time, "perf_counter", lambda: clock[0])
    config = replace(SHALLOW, num_steps="auto", seconds=0.6)
    planned = nst.choose_num_steps(nst.gather_pictures(*pair), config, shallow)
    step = last(tick(nst.stylize(*pair, config, network=shallow), clock))
    assert step.number == planned


def test_a_run_that_goes_on_smaller_has_all_the_time_that_is_left(
    monkeypatch, steady, shallow, pair
):
    """The smaller size is that of an earlier scale, whose time is up."""
    clock = [0.0]
    monkeypatch.setattr(nst.time, "perf_counter", lambda: clock[0])
    forward = nst.VGG19Features.forward

    def run_out(self, image, *args, **kwargs):
        if image.requires_grad and image.shape[3] == pair[0].shape[3] + 2 * nst.MARGIN:
            raise MemoryError
        return forward(self, image, *args, **kwargs)

    monkeypatch.setattr(nst.VGG19Features, "forward", run_out)
    config = replace(SHALLOW, num_steps="auto", seconds=0.6, checkpoint=True)
    planned = nst.choose_num_steps(nst.gather_pictures(*pair), config, shallow)
    steps = tick(nst.stylize(*pair, config, network=shallow), clock, nst.SLOWDOWNS[nst.ALL_BLOCKS])
    with pytest.warns(nst.RecoveryWarning):
        step = last(steps)
    assert step.number == planned


def tick(steps, clock, slowdown=1.0):
    for step in steps:
        yield step
        clock[0] += slowdown * 1e-6 * nst.painted_pixels(step.image.shape[2:])


@pytest.mark.parametrize("optimizer", ["lbfgs", "adam"])
def test_two_runs_are_the_same_to_the_bit(shallow, pair, optimizer):
    config = replace(SHALLOW, optimizer=optimizer, num_steps=9)
    one, other = (last(nst.stylize(*pair, config, network=shallow)) for _ in range(2))
    assert torch.equal(one.image, other.image)
