"""DeepFloyd's two stages under our samplers, step for step with diffusers' own pipelines, on tiny random networks."""

import sys

import pytest
import torch
from support import generator, randn
from torch.testing import assert_close

from coursekit.denoisers import anagram, guided
from coursekit.interop import limited, schedule_of
from coursekit.learned_variance import ddpm_learned, with_variance
from coursekit.samplers import ddim, ddpm, last
from coursekit.schedules import cosine_schedule
from coursekit.text_to_image import (
    PAGE,
    LowResolution,
    NotAvailable,
    Stage,
    load_prompts,
    load_stage,
    read_prompts,
    save_prompts,
)

diffusers = pytest.importorskip("diffusers")
CLOSE = {"atol": 1e-4, "rtol": 0}
T1 = torch.ones(2, dtype=torch.long)


def tiny_unet(**more):
    """The layout of DeepFloyd's networks with a few thousandths of their numbers."""
    torch.manual_seed(0)
    return diffusers.UNet2DConditionModel(
        sample_size=16, layers_per_block=1, block_out_channels=(32, 64),
        down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
        **{"in_channels": 3} | more, out_channels=6, cross_attention_dim=32, encoder_hid_dim=64,
        addition_embed_type="text", addition_embed_type_num_heads=2, attention_head_dim=8,
        cross_attention_norm="group_norm", resnet_time_scale_shift="scale_shift").eval()


def if_scheduler(**more):
    return diffusers.DDPMScheduler(**{
        "beta_schedule": "squaredcos_cap_v2", "variance_type": "learned_range", "thresholding": True,
        "dynamic_thresholding_ratio": 0.95, "sample_max_value": 1.5} | more)


@pytest.fixture(scope="module")
def one():
    return Stage(tiny_unet(), if_scheduler())


@pytest.fixture(scope="module")
def two():
    return Stage(tiny_unet(in_channels=6, class_embed_type="timestep"), if_scheduler(sample_max_value=1.0),
                 diffusers.DDPMScheduler(beta_schedule="squaredcos_cap_v2"))


@pytest.fixture(scope="module")
def prompts():
    return dict(zip(["a rocket", "a skull", ""], randn(3, 77, 64, dtype=torch.float32), strict=True))


def pipeline(stage):
    """diffusers' own pipeline around a stage's network, without text encoder, safety checker or watermark."""
    pytest.importorskip("transformers")
    kind = diffusers.IFPipeline if stage.noising is None else diffusers.IFSuperResolutionPipeline
    more = {} if stage.noising is None else {"image_noising_scheduler": stage.noising}
    pipe = kind(tokenizer=None, text_encoder=None, unet=stage.unet, scheduler=stage.scheduler, safety_checker=None,
                feature_extractor=None, watermarker=None, requires_safety_checker=False, **more)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def walked(pipe, **asked):
    """Every picture on the pipeline's way."""
    on_the_way = []
    pipe(output_type="pt", callback=lambda i, t, x: on_the_way.append(x.clone()), **asked)
    return on_the_way


# --- step for step with diffusers' pipelines ---

@pytest.mark.parametrize("w, steps", [(7.0, 20), (2.5, 8)])
def test_stage_one_walks_with_their_pipeline(one, prompts, w, steps):
    theirs = walked(pipeline(one), prompt_embeds=prompts["a rocket"][None].expand(2, -1, -1),
                    negative_prompt_embeds=prompts[""][None].expand(2, -1, -1), guidance_scale=w,
                    num_inference_steps=steps, generator=generator(1))
    rng = generator(1)
    x = torch.randn(2, 3, 16, 16, generator=rng)
    ours = list(ddpm_learned(one.guided(prompts["a rocket"], prompts[""], w), x, one.schedule, one.times(steps), rng))
    assert ours[-1].t == 0
    for mine, their in zip(ours, theirs, strict=True):
        assert_close(mine.x, their, **CLOSE)


def test_stage_one_without_guidance_walks_with_their_pipeline(one, prompts):
    """Their guidance_scale of 1 evaluates the prompt alone; our w = 1 is the same denoiser."""
    theirs = walked(pipeline(one), prompt_embeds=prompts["a skull"][None], guidance_scale=1.0, num_inference_steps=10,
                    generator=generator(1))
    alone = with_variance(one.denoiser(prompts["a skull"]), lambda d: limited(d, one.scheduler))
    for denoise in (alone, one.guided(prompts["a skull"], prompts[""], w=1.0)):
        rng = generator(1)
        x = torch.randn(1, 3, 16, 16, generator=rng)
        for mine, their in zip(ddpm_learned(denoise, x, one.schedule, one.times(10), rng), theirs, strict=True):
            assert_close(mine.x, their, **CLOSE)


@pytest.mark.parametrize("level", [0, 250])
def test_stage_two_walks_with_their_pipeline(two, prompts, level):
    small = randn(2, 3, 4, 4, dtype=torch.float32).clamp(-1, 1)
    theirs = walked(pipeline(two), image=small, prompt_embeds=prompts["a rocket"][None].expand(2, -1, -1),
                    negative_prompt_embeds=prompts[""][None].expand(2, -1, -1), guidance_scale=4.0, noise_level=level,
                    num_inference_steps=10, generator=generator(1))
    rng = generator(1)
    x = torch.randn(2, 3, 16, 16, generator=rng)
    low = two.enlarged(small, level + 1, rng)
    denoise = two.guided(prompts["a rocket"], prompts[""], 4.0, low)
    for mine, their in zip(ddpm_learned(denoise, x, two.schedule, two.times(10), rng), theirs, strict=True):
        assert_close(mine.x, their, **CLOSE)


@pytest.mark.parametrize("steps", [50, 1000])
def test_a_step_is_their_schedulers_step(one, prompts, steps):
    """The same without transformers, which the pipelines cannot be imported without; and one step of 1000."""
    scheduler = if_scheduler()
    scheduler.set_timesteps(steps)
    x = randn(2, 3, 16, 16, dtype=torch.float32)
    prompt = prompts["a rocket"].expand(2, -1, -1)
    denoise = with_variance(one.denoiser(prompts["a rocket"]), lambda d: limited(d, one.scheduler))
    for i, t, s in [(scheduler.timesteps[k], *one.times(steps)[k:k + 2]) for k in (0, steps // 2, steps - 1)]:
        with torch.no_grad():
            said = one.unet(x, i, encoder_hidden_states=prompt, return_dict=False)[0]
        their = scheduler.step(said, i, x, generator=generator(3))
        mine = last(ddpm_learned(denoise, x, one.schedule, [t, s], generator(3)))
        assert_close(mine.x, their.prev_sample, **CLOSE)
        assert_close(mine.x0, their.pred_original_sample, atol=1e-4 * (1 if t < 990 else 100), rtol=0)


# --- the denoiser contract ---

def test_our_times_are_theirs_and_the_schedule_is_the_cosine(one):
    assert one.times(34)[:2] == [958, 929] and one.times(100)[-3:] == [11, 1, 0]
    assert_close(one.schedule.alpha_bar, cosine_schedule().alpha_bar, atol=1e-6, rtol=1e-4)


def test_every_sampler_and_combinator_takes_it(one, prompts):
    asked = [one.guided(prompts[name], prompts[""], 7.0) for name in ("a rocket", "a skull")]
    both = anagram(asked, [lambda x: x, lambda x: x.flip(-2)])
    x, times = randn(1, 3, 16, 16, dtype=torch.float32), one.schedule.spaced(4)
    learned = with_variance(asked[0], lambda d: anagram([d, asked[1]], [lambda x: x, lambda x: x.flip(-2)]))
    for steps in (ddim(both, x, one.schedule, times), ddpm(both, x, one.schedule, times, generator()),
                  ddpm_learned(learned, x, one.schedule, times, generator())):
        assert last(steps).x.isfinite().all()
    swapped = anagram(asked[::-1], [lambda x: x, lambda x: x.flip(-2)])
    turned = last(ddim(swapped, x.flip(-2), one.schedule, times)).x  # reading it upside down changes nothing else
    assert_close(last(ddim(both, x, one.schedule, times)).x, turned.flip(-2), atol=1e-3, rtol=0)


def test_the_prompts_variance_is_kept_and_the_empty_ones_is_not(one, prompts):
    x, t = randn(2, 3, 16, 16, dtype=torch.float32), torch.tensor([900, 100])
    with torch.no_grad():
        asked, unasked = (one.denoiser(prompts[name])(x, t) for name in ("a rocket", ""))
        both = one.guided(prompts["a rocket"], prompts[""], 7.0)(x, t)
    assert torch.equal(both.mix, asked.mix) and (asked.mix - unasked.mix).abs().max() > 1e-3
    plain = guided(lambda *_: asked, lambda *_: unasked, 7.0)(x, t)
    assert_close(both.eps, plain.eps)
    assert both.x0.abs().max() <= 1 < plain.x0.abs().max()


def test_a_prompt_may_be_one_for_all_or_one_for_each(one, prompts):
    x, t = randn(2, 3, 16, 16, dtype=torch.float32), torch.tensor([500, 500])
    each = torch.stack([prompts["a rocket"], prompts["a skull"]])
    with torch.no_grad():
        together = one.denoiser(each)(x, t).eps
        for i, name in enumerate(["a rocket", "a skull"]):
            assert_close(together[i], one.denoiser(prompts[name])(x, t).eps[i], **CLOSE)


def test_the_network_works_in_half_precision_and_the_image_does_not(prompts):
    stage = Stage(tiny_unet().to(torch.bfloat16), if_scheduler())
    x = randn(1, 3, 16, 16)
    said = stage.denoiser(prompts[""])(x, torch.tensor([500]))
    assert said.eps.dtype == said.mix.dtype == torch.float64
    assert last(ddim(stage.denoiser(prompts[""]), x, stage.schedule, [100, 0])).x.dtype == torch.float64


def test_stage_two_is_shown_a_picture_of_its_own_size_noised_as_told(two):
    flat = torch.full((1, 3, 4, 4), 0.5)
    low = two.enlarged(flat, 1, generator())
    assert low.t == 1 and low.x.shape == (1, 3, 16, 16) and (low.x - 0.5).abs().max() < 0.05
    noisy = two.enlarged(flat, 1000, generator()).x
    assert abs(noisy.mean()) < 5 / noisy.numel() ** 0.5 and abs(noisy.std() - 1) < 0.2
    ramp = torch.linspace(-1, 1, 4).expand(1, 3, 4, 4)
    assert_close(two.enlarged(ramp, 1, generator()).x[0, 0, 0], torch.linspace(-1, 1, 16), atol=0.05, rtol=0)


def test_stage_two_looks_at_what_it_is_shown(two, prompts):
    x, t = randn(1, 3, 16, 16, dtype=torch.float32), torch.tensor([500])
    shown = [LowResolution(randn(1, 3, 16, 16, seed=seed), time) for seed, time in [(1, 251), (2, 251), (1, 900)]]
    with torch.no_grad():
        said = [two.denoiser(prompts[""], low)(x, t).eps for low in shown]
    assert (said[0] - said[1]).abs().max() > 1e-3 and (said[0] - said[2]).abs().max() > 1e-4


def test_what_does_not_make_a_stage_is_refused(one, two, prompts):
    with pytest.raises(ValueError, match="stage I sees 3 channels .* got 6 in and 6 out"):
        Stage(two.unet, two.scheduler)
    with pytest.raises(ValueError, match="stage II sees 6 channels .* got 3 in and 6 out"):
        Stage(one.unet, one.scheduler, two.noising)
    with pytest.raises(ValueError, match="learned_range, got epsilon and fixed_small"):
        Stage(one.unet, diffusers.DDPMScheduler())
    with pytest.raises(ValueError, match=r"\(tokens, 64\) .* got \(77, 32\)"):
        one.denoiser(torch.zeros(77, 32))
    with pytest.raises(ValueError, match="got 'a rocket'"):
        one.denoiser("a rocket")
    for stage, low in [(one, LowResolution(torch.zeros(1, 3, 16, 16), 1)), (two, None)]:
        with pytest.raises(ValueError, match="only stage II, is shown"):
            stage.denoiser(prompts[""], low)
    with pytest.raises(ValueError, match="only stage II is shown"):
        one.enlarged(torch.zeros(1, 3, 4, 4))
    with pytest.raises(ValueError, match=r"t counts 1\.\.1000, got 0"):
        one.denoiser(prompts[""])(torch.zeros(2, 3, 16, 16), 0 * T1)


# --- loading ---

def test_a_stage_is_loaded_with_its_network_and_schedulers_alone(two, prompts, tmp_path):
    pytest.importorskip("accelerate")
    two.unet.save_pretrained(tmp_path / "unet", variant="fp16")
    two.scheduler.save_pretrained(tmp_path / "scheduler")
    two.noising.save_pretrained(tmp_path / "image_noising_scheduler")
    x, t, low = randn(1, 3, 16, 16, dtype=torch.float32), torch.tensor([500]), LowResolution(randn(1, 3, 16, 16), 251)
    stage = load_stage("II", source=tmp_path, dtype=torch.float32, device_map="cpu")
    with torch.no_grad():
        assert_close(stage.denoiser(prompts[""], low)(x, t).x0, two.denoiser(prompts[""], low)(x, t).x0)
    assert_close(schedule_of(stage.noising).alpha_bar, two.schedule.alpha_bar)
    half = load_stage("II", "M", source=tmp_path)  # wherever accelerate puts it
    assert half.unet.dtype == torch.float16 and not half.unet.training
    with pytest.raises(ValueError, match="stage I sees 3 channels"):
        load_stage("I", source=tmp_path)


@pytest.mark.parametrize("stage, size", [("III", None), ("II", "XL"), (1, None)])
def test_a_stage_that_there_is_not_is_refused(stage, size):
    with pytest.raises(ValueError, match="the stages and sizes are"):
        load_stage(stage, size)


@pytest.mark.parametrize("load, absent", [
    (lambda: load_stage("I"), "diffusers"), (lambda: load_stage("I"), "accelerate"),
    (lambda: read_prompts([""], bits=16), "transformers"), (lambda: read_prompts([""], bits=16), "accelerate"),
    (lambda: read_prompts([""]), "bitsandbytes")])
def test_one_message_says_which_package_is_missing_and_what_to_do(load, absent, monkeypatch):
    monkeypatch.setitem(sys.modules, absent, None)
    with pytest.raises(NotAvailable, match=f"{absent}.* not installed") as told:
        load()
    for step in ("pip install 'coursekit[text-to-image]'", f"https://huggingface.co/{PAGE}", "hf auth login"):
        assert step in str(told.value)


def test_the_same_message_offline(monkeypatch, tmp_path):
    pytest.importorskip("accelerate")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(NotAvailable, match="the Hub cannot be reached.*hf auth login") as told:
        load_stage("I")
    assert "\n" not in str(told.value)


def test_the_same_message_where_the_licence_was_not_accepted(monkeypatch):
    pytest.importorskip("accelerate")
    errors = pytest.importorskip("huggingface_hub.errors")

    def gated(*_, **__):
        error = errors.GatedRepoError.__new__(errors.GatedRepoError)  # to be made it wants a server's answer
        error.args = ("401 Client Error",)
        raise error

    monkeypatch.setattr("diffusers.configuration_utils.hf_hub_download", gated)
    with pytest.raises(NotAvailable, match=f"accepted the licence.*accept its licence at .*{PAGE}"):
        load_stage("I")


def test_any_other_trouble_is_told_as_it_was(tmp_path):
    pytest.importorskip("accelerate")
    with pytest.raises(NotAvailable, match=r"scheduler_config\.json"):
        load_stage("I", source=tmp_path)


# --- prompts ---

def test_prompts_are_kept_in_one_file_the_empty_one_too(prompts, tmp_path):
    save_prompts(prompts, tmp_path / "prompts.safetensors")
    back = load_prompts(tmp_path / "prompts.safetensors")
    assert back.keys() == prompts.keys() and all(torch.equal(back[key], prompts[key]) for key in prompts)


def test_a_pickle_of_prompts_is_refused(prompts, tmp_path):
    torch.save(prompts, tmp_path / "prompts.pth")
    with pytest.raises(ValueError, match=r"prompts\.pth is not a safetensors file"):
        load_prompts(tmp_path / "prompts.pth")


@pytest.fixture(scope="module")
def t5(tmp_path_factory):
    """A tiny random T5 with a vocabulary of ten words, in the layout of DeepFloyd's repository."""
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    pytest.importorskip("accelerate")
    folder = tmp_path_factory.mktemp("t5")
    words = ["<pad>", "</s>", "<unk>", "a", "rocket", "skull"]
    spelt = tokenizers.Tokenizer(tokenizers.models.WordLevel({w: i for i, w in enumerate(words)}, "<unk>"))
    spelt.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    spelt.post_processor = tokenizers.processors.TemplateProcessing("$A </s>", special_tokens=[("</s>", 1)])
    transformers.PreTrainedTokenizerFast(tokenizer_object=spelt, pad_token="<pad>", eos_token="</s>",
                                         unk_token="<unk>").save_pretrained(folder / "tokenizer")
    torch.manual_seed(0)
    config = transformers.T5Config(vocab_size=6, d_model=64, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    transformers.T5EncoderModel(config).save_pretrained(folder / "text_encoder")
    return folder


def test_prompts_are_read_as_their_pipeline_reads_them(t5, one):
    transformers = pytest.importorskip("transformers")
    pipe = pipeline(one)
    pipe.register_modules(tokenizer=transformers.AutoTokenizer.from_pretrained(t5 / "tokenizer"),
                          text_encoder=transformers.T5EncoderModel.from_pretrained(t5 / "text_encoder").eval())
    found = read_prompts(["A rocket ", ""], source=t5, bits=16, variant=None, device_map="cpu")
    asked, nothing = pipe.encode_prompt("A rocket ")
    assert found["A rocket "].shape == (77, 64) and found[""].dtype == torch.float16
    assert_close(found["A rocket "].float(), asked[0], atol=2e-2, rtol=2e-2)
    assert_close(found[""].float(), nothing[0], atol=2e-2, rtol=2e-2)
    assert (asked - nothing).abs().max() > 0.1


def test_a_prompt_that_would_be_cut_short_is_refused(t5):
    read_prompts(["a " * 76], source=t5, bits=16, variant=None, device_map="cpu")
    with pytest.raises(ValueError, match="at most 77 tokens, got 78"):
        read_prompts(["a " * 77], source=t5, bits=16, variant=None, device_map="cpu")


def test_t5_is_read_in_8_or_16_bits():
    with pytest.raises(ValueError, match="8 or 16 bits, got bits = 4"):
        read_prompts(["a rocket"], bits=4)
