"""Flow solvers against diffusers' schedulers and against flows whose end is known."""

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler

from eightfold.generate.flow import FlowStep, flow_dpm, flow_euler, flow_step, solve

SOLVERS = {"dpm": flow_dpm, "euler": flow_euler}


def peer(name, steps, shift):
    if name == "euler":
        scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    else:
        scheduler = DPMSolverMultistepScheduler(
            use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=shift
        )
    scheduler.set_timesteps(steps)
    return scheduler


def field(x, time):
    """A velocity that is not linear in x."""
    return torch.tanh(1.5 * x.flip(-1)) + 0.3 * torch.sin(x * (1 + time / 300))


@pytest.mark.parametrize("shift", [1.0, 3.0, 6.0])
@pytest.mark.parametrize("steps", [1, 2, 3, 14, 20, 50])
@pytest.mark.parametrize("name", SOLVERS)
def test_schedule_is_diffusers(name, steps, shift):
    schedule, scheduler = SOLVERS[name](steps, shift), peer(name, steps, shift)
    assert list(schedule.times) == scheduler.timesteps.tolist()
    assert schedule.sigmas == pytest.approx(scheduler.sigmas.tolist(), abs=1e-7)
    assert [step.sigma for step in schedule.steps] == list(schedule.sigmas[:-1])


@pytest.mark.parametrize("shift", [3.0, 6.0])
@pytest.mark.parametrize("steps", [1, 2, 14, 20])
@pytest.mark.parametrize("name", SOLVERS)
def test_trajectory_is_diffusers(name, steps, shift):
    schedule, scheduler = SOLVERS[name](steps, shift), peer(name, steps, shift)
    noise = torch.randn(2, 4, 5, 7)
    want, x, previous = noise, noise, None
    for time, step, their_time in zip(schedule.times, schedule.steps, scheduler.timesteps, strict=True):
        want = scheduler.step(field(want, float(their_time)), their_time, want).prev_sample
        x, previous = flow_step(x, field(x, time), previous, step)
        torch.testing.assert_close(x, want, rtol=1e-5, atol=1e-5)
    assert torch.equal(solve(schedule, field, noise), x)


def test_known_values():
    """Of the released setting: 20 steps, shift 3."""
    dpm, euler = flow_dpm(20), flow_euler(20)
    assert dpm.times[:4] == (999, 982, 963, 944)
    assert (dpm.times[-1], dpm.sigmas[-1]) == (136, 0.0)
    assert (dpm.sigmas[0], dpm.sigmas[-2]) == pytest.approx((0.99967, 0.13624), abs=1e-5)
    assert flow_dpm(20, 6.0).sigmas[-2] == pytest.approx(0.23981, abs=1e-5)
    assert euler.sigmas[:2] == pytest.approx((1.0, 0.9819), abs=1e-4)
    assert euler.sigmas[-3:] == pytest.approx((0.1498, 0.0089, 0.0), abs=1e-4)


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("steps", [1, 2, 7])
def test_a_straight_flow_ends_at_its_data(name, steps):
    data, noise = torch.randn(2, 3, 8), torch.randn(2, 3, 8)
    schedule = SOLVERS[name](steps)
    start = (1 - schedule.sigmas[0]) * data + schedule.sigmas[0] * noise
    torch.testing.assert_close(solve(schedule, lambda x, time: noise - data, start), data, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", SOLVERS)
def test_the_last_step_gives_what_is_predicted(name):
    x, velocity, before = torch.randn(3, 4, 6).unbind()
    end, predicted = flow_step(x, velocity, before, SOLVERS[name](5).steps[-1])
    torch.testing.assert_close(end, predicted, rtol=0, atol=0)


def test_second_order_is_nearer_than_first():
    """On the flow to data of normal(0, s^2), where x / noise is the deviation of x at each sigma."""
    s, noise = 0.3, torch.randn(100)

    def deviation(sigma):
        return ((1 - sigma) ** 2 * s**2 + sigma**2) ** 0.5

    def error(schedule, steps):
        x, previous = noise * deviation(schedule.sigmas[0]), None
        for sigma, step in zip(schedule.sigmas, steps[:-1]):
            mean_velocity = x * (sigma - (1 - sigma) * s**2) / deviation(sigma) ** 2
            x, previous = flow_step(x, mean_velocity, previous, step)
        return (x / noise - deviation(schedule.sigmas[-2])).abs().max()

    schedule = flow_dpm(20)
    first_order = [FlowStep(step.sigma, step.keep, 1 - step.keep, 0.0) for step in schedule.steps]
    assert error(schedule, schedule.steps) < 0.2 * error(schedule, first_order)


@pytest.mark.parametrize("name", SOLVERS)
def test_coefficients_as_tensors(name, device):
    """One step for all: it reads coefficients from memory, starts with any finite x0, and asks the device nothing."""
    schedule, noise = SOLVERS[name](14), torch.randn(2, 4, 5, 7).to(device)
    times, steps = schedule.tensors(device)
    assert (times.shape, steps.shape, steps.device.type) == ((14,), (14, 4), device.type)
    x, previous = noise, torch.zeros_like(noise)
    for time, step in zip(times, steps, strict=True):
        x, previous = flow_step(x, field(x, time), previous, step)
    torch.testing.assert_close(x, solve(schedule, field, noise), rtol=1e-5, atol=1e-5)


def test_coefficients_can_be_compiled_and_faked():
    step = torch.compile(flow_step, fullgraph=True, backend="eager")
    x, velocity, before = torch.randn(3, 4).unbind()
    row = flow_dpm(6).tensors()[1][2]
    assert torch.equal(step(x, velocity, before, row)[0], flow_step(x, velocity, before, row)[0])


def test_low_precision_in_float32_out():
    x, velocity = torch.randn(2, 8).bfloat16().unbind()
    out, predicted = flow_step(x, velocity, None, flow_dpm(4).steps[0])
    assert out.dtype == predicted.dtype == torch.float32


@pytest.mark.parametrize("solver", [flow_dpm, flow_euler])
def test_errors_name_the_argument(solver):
    for steps in (0, -1, 1000, 2.0):
        with pytest.raises(ValueError, match=f"steps: expected 1 to 999, got {steps}"):
            solver(steps)
    for shift in (0.0, -3.0, 1e4, float("nan")):
        with pytest.raises(ValueError, match=f"shift: expected 0.001 to 1000, got {shift}"):
            solver(20, shift)


@pytest.mark.parametrize("solver", [flow_dpm, flow_euler])
@pytest.mark.parametrize("steps", [1, 20, 999])
@pytest.mark.parametrize("shift", [1e-3, 1e3])
def test_all_that_is_accepted_is_finite_and_descends(solver, steps, shift):
    schedule = solver(steps, shift)
    assert all(a > b >= 0 for a, b in zip(schedule.sigmas, schedule.sigmas[1:]))
    assert all(torch.isfinite(values).all() for values in schedule.tensors())
