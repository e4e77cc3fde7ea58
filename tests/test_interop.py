"""What diffusers samples with our networks is what we sample, and the other way round."""

import math

import pytest
import torch
from support import Says, generator, randn
from torch.testing import assert_close

from coursekit.checkpoints import denoiser, pretrained
from coursekit.denoisers import Prediction, clipped, from_eps, from_v, from_x0
from coursekit.interop import from_diffusers, limited, schedule_of, thresholded, times_of, to_scheduler
from coursekit.samplers import ddim, ddpm, last
from coursekit.schedules import NoiseSchedule, StraightPath, cosine_schedule, linear_schedule, zero_terminal_snr
from coursekit.toys import GaussianData

diffusers = pytest.importorskip("diffusers")
DDIM, DDPM = diffusers.DDIMScheduler, diffusers.DDPMScheduler
SCHEDULES = {"linear": linear_schedule(), "cosine": cosine_schedule(), "short": linear_schedule(300, 1e-3, 0.05),
             "zero terminal SNR": zero_terminal_snr(linear_schedule())}
every_schedule = pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
READ = {"eps": from_eps, "x0": from_x0, "v": from_v}
CLOSE = {"atol": 1e-4, "rtol": 0}


def by_diffusers(scheduler, model, x, steps, rng, **cond):
    """The loop that the docstring of to_scheduler shows."""
    scheduler.set_timesteps(steps)
    with torch.no_grad():
        for i in scheduler.timesteps:
            x = scheduler.step(model(x, (i + 1).expand(len(x)), **cond), i, x, generator=rng).prev_sample
    return x


# --- our networks, their schedulers ---

@pytest.mark.parametrize("kind", [DDIM, DDPM])
@pytest.mark.parametrize("name, cond, size", [
    ("mnist-ddpm", {}, (1, 28, 28)), ("mnist-class", {"label": torch.tensor([7, -1])}, (1, 28, 28)),
    ("cats-ddpm", {}, (3, 64, 64))])
def test_a_checkpoint_draws_the_same_under_their_schedulers(name, cond, size, kind):
    model, (denoise, schedule) = pretrained(name), denoiser(name, **cond)
    x = randn(2, *size, dtype=torch.float32)
    theirs = by_diffusers(to_scheduler(kind, schedule, model.predicts), model, x, 5, generator(1), **cond)
    ours = (ddim(denoise, x, schedule, schedule.spaced(5)) if kind is DDIM else
            ddpm(denoise, x, schedule, schedule.spaced(5), generator(1)))
    assert_close(last(ours).x, theirs, **CLOSE)


@pytest.mark.parametrize("kind", [DDIM, DDPM])
@pytest.mark.parametrize("predicts", READ)
@every_schedule
def test_whatever_a_network_predicts_on_whatever_schedule(schedule, predicts, kind):
    if predicts == "eps" and schedule.alpha_bar[-1] == 0:
        pytest.skip("eps says nothing where no signal is left")
    model = Says(lambda x, t: 0.7 * x + 0.2 * torch.sin(3 * x) * torch.cos(t / 200).view(-1, 1, 1, 1))
    x, denoise = randn(2, 1, 4, 4, dtype=torch.float32), READ[predicts](model, schedule)
    theirs = by_diffusers(to_scheduler(kind, schedule, predicts), model, x, 50, generator(1))
    ours = (ddim(denoise, x, schedule, schedule.spaced(50)) if kind is DDIM else
            ddpm(denoise, x, schedule, schedule.spaced(50), generator(1)))
    size = theirs.abs().max().clamp(min=1)  # where hardly any signal is left, a foolish eps makes a huge x_0
    assert_close(last(ours).x / size, theirs / size, **CLOSE)


def test_other_schedulers_of_theirs_bring_an_exact_denoiser_home():
    """DPM-Solver knows the flow of Gaussian data as well as we do: x_0 = mean + std x_T."""
    schedule, data = cosine_schedule(), GaussianData(0.5, 0.25)
    eps = Says(lambda x, t: data.denoiser(schedule)(x, t).eps)
    x = randn(50, 1, 1, 1, dtype=torch.float32)
    end = by_diffusers(to_scheduler(diffusers.DPMSolverMultistepScheduler, schedule, "eps"), eps, x, 25, None)
    assert_close(end, 0.5 + 0.5 * x, atol=0.02, rtol=0)


@pytest.mark.parametrize("given, says", [
    ((DDIM, linear_schedule(), "noise"), r"one of \['eps', 'v', 'x0'\], got 'noise'"),
    ((DDIM, StraightPath(), "v"), "walk a NoiseSchedule, got a StraightPath"),
    ((diffusers.FlowMatchEulerDiscreteScheduler, linear_schedule(), "v"), "takes no trained_betas"),
])
def test_a_scheduler_that_cannot_be_is_refused(given, says):
    with pytest.raises(ValueError, match=says):
        to_scheduler(*given)


# --- their networks, our samplers ---

@pytest.fixture(scope="module")
def unet():
    torch.manual_seed(0)
    return diffusers.UNet2DModel(sample_size=8, in_channels=1, out_channels=1, block_out_channels=(8, 16),
                                 down_block_types=("DownBlock2D", "AttnDownBlock2D"),
                                 up_block_types=("AttnUpBlock2D", "UpBlock2D"), layers_per_block=1,
                                 norm_num_groups=4, num_class_embeds=3).eval()


@pytest.mark.parametrize("kind", [DDIM, DDPM])
@pytest.mark.parametrize("options", [
    {"beta_schedule": "linear"}, {"beta_schedule": "squaredcos_cap_v2", "clip_sample": False},
    {"prediction_type": "v_prediction", "timestep_spacing": "trailing", "rescale_betas_zero_snr": True},
    {"prediction_type": "sample", "clip_sample_range": 0.5}, {"thresholding": True, "sample_max_value": 2.0},
    {"timestep_spacing": "linspace"}], ids=lambda options: " ".join(map(str, options.values())))
def test_their_network_draws_the_same_under_our_samplers(unet, options, kind):
    if kind is DDIM and options.get("timestep_spacing") == "linspace":
        pytest.skip("their DDIM steps down by T // steps, which are not the times that linspace names")
    scheduler, label = kind(**options), torch.tensor([2, 0])
    x = randn(2, 1, 8, 8, dtype=torch.float32)
    theirs, rng = x, generator(1)
    scheduler.set_timesteps(10)
    with torch.no_grad():
        for i in scheduler.timesteps:
            theirs = scheduler.step(unet(theirs, i, class_labels=label).sample, i, theirs, generator=rng).prev_sample
    denoise, schedule = from_diffusers(unet, scheduler, class_labels=label)
    times = times_of(scheduler, 10)
    ours = (ddim(denoise, x, schedule, times) if kind is DDIM else ddpm(denoise, x, schedule, times, generator(1)))
    assert_close(last(ours).x, theirs, **CLOSE)


def test_half_a_network_answers_in_the_images_precision(unet):
    half = diffusers.UNet2DModel.from_config(unet.config).to(torch.bfloat16)
    denoise, schedule = from_diffusers(half, DDPM(), class_labels=torch.tensor([1, 1]))
    said = denoise(randn(2, 1, 8, 8, dtype=torch.float32), torch.tensor([1, 1000]))
    assert said.x0.dtype == said.eps.dtype == torch.float32 and schedule.T == 1000


def test_their_networks_know_no_clean_image(unet):
    denoise, _ = from_diffusers(unet, DDPM(), class_labels=torch.tensor([1]))
    with pytest.raises(ValueError, match=r"t >= 1 \(their 0\), got t = 0"):
        denoise(randn(1, 1, 8, 8, dtype=torch.float32), torch.tensor([0]))


@every_schedule
def test_a_schedule_there_and_back_is_itself(schedule):
    assert_close(schedule_of(to_scheduler(DDPM, schedule, "v")).alpha_bar, schedule.alpha_bar, atol=1e-6, rtol=1e-4)


def test_what_has_no_betas_has_no_schedule():
    with pytest.raises(ValueError, match="a FlowMatchEulerDiscreteScheduler has none"):
        schedule_of(diffusers.FlowMatchEulerDiscreteScheduler())


def test_a_prediction_that_we_do_not_know_is_refused(unet):
    with pytest.raises(ValueError, match="got 'flow_prediction'"):
        from_diffusers(unet, diffusers.DPMSolverMultistepScheduler(prediction_type="flow_prediction"))


def test_times_are_theirs_plus_one_and_end_at_the_clean_image():
    scheduler = DDPM()
    assert times_of(scheduler, 4) == [751, 501, 251, 1, 0]
    assert len(scheduler.timesteps) == 1000  # asking leaves no mark
    trailing = to_scheduler(DDIM, linear_schedule(), "eps")
    assert times_of(trailing, 50) == linear_schedule().spaced(50)


# --- keeping x_0 in bounds ---

def test_thresholding_leaves_alone_what_is_in_bounds_and_shrinks_what_is_not():
    inside = randn(2, 3, 8, 8).clamp(-1, 1)
    says = lambda x0: lambda x_t, t: Prediction(x0, x_t)
    x0, eps = thresholded(says(inside))(inside, torch.ones(2))
    assert torch.equal(x0, inside) and torch.equal(eps, inside)
    both = torch.stack([inside[0], 1.2 * torch.linspace(-1, 1, 192, dtype=torch.float64).view(3, 8, 8)])
    x0 = thresholded(says(both), quantile=1.0)(both, torch.ones(2)).x0
    assert torch.equal(x0[0], both[0])  # each image has a threshold of its own
    assert_close(x0[1], both[1] / 1.2)  # nothing is cut off: the greys in between keep their order
    assert_close(thresholded(says(both), most=1.0)(both, torch.ones(2)).x0, both.clamp(-1, 1))


def test_a_quantile_of_the_largest_values_is_cut_off():
    x0 = torch.full((1, 1, 10, 10), 1.25).index_fill(2, torch.tensor([0]), 50.0)
    half = thresholded(lambda x_t, t: Prediction(x0.half(), x_t), 0.8)(x0.half(), torch.ones(1)).x0
    assert half.dtype == torch.float16 and torch.equal(half, torch.ones_like(half))


@pytest.mark.parametrize("quantile, most", [(0.0, 1.5), (1.1, 1.5), (0.9, 0.9), (math.nan, 1.5), (0.9, math.inf)])
def test_a_threshold_that_cannot_be_is_refused(quantile, most):
    with pytest.raises(ValueError, match="quantile in"):
        thresholded(clipped, quantile, most)


def test_a_scheduler_that_leaves_x0_alone_leaves_the_denoiser_alone():
    denoise = lambda x_t, t: Prediction(x_t, x_t)
    assert limited(denoise, DDPM(clip_sample=False)) is denoise
    assert isinstance(schedule_of(DDPM()), NoiseSchedule)
