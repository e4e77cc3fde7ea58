"""DeepFloyd IF, stages I (64 pixels) and II (256), behind the same denoiser contract as every network here.

    prompts = load_prompts("prompts.safetensors")            # or read_prompts([...]), which needs T5
    stage = load_stage("I")
    denoise = stage.guided(prompts["a rocket ship"], prompts[""], w=7)
    x = torch.randn(1, 3, 64, 64, generator=rng).cuda()
    small = last(ddpm_learned(denoise, x, stage.schedule, stage.times(20), rng)).x

The weights are gated: without an account, diffusers or a network, loading raises `NotAvailable`, which says
what to do. The safety checker and the watermark are not loaded; DeepFloyd's licence says what that allows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from coursekit.denoisers import Denoiser, Prediction, guided
from coursekit.diffusion import x0_from_eps
from coursekit.interop import limited, schedule_of, times_of
from coursekit.learned_variance import LearnedPrediction, with_variance
from coursekit.samplers import start_from
from coursekit.schedules import NoiseSchedule

SIZES = {"I": ("M", "L", "XL"), "II": ("M", "L")}  # 0.4, 0.9 and 4.3 thousand million numbers; II: 0.45 and 1.2
PAGE = "DeepFloyd/IF-I-XL-v1.0"  # a licence accepted here holds for all of them, and T5 lies here
TOKENS = 77  # as many as the networks were trained with


class NotAvailable(RuntimeError):
    """Something that DeepFloyd IF needs is missing; the message says what it was and what to do."""


class LowResolution(NamedTuple):
    """What stage II is shown: the small picture stretched to its size and noised, and the time it was noised to."""

    x: Tensor
    t: int


@dataclass(frozen=True, eq=False)
class Stage:
    """A network of diffusers that predicts noise and a learned variance for a prompt, and its schedulers.

    unet       UNet2DConditionModel, twice as many channels out as an image has
    scheduler  its DDPMScheduler
    noising    stage II only: the scheduler that noises the low-resolution image

    ValueError if they do not make such a stage.
    """

    unet: Any
    scheduler: Any
    noising: Any = None

    def __post_init__(self) -> None:
        net, config = self.unet.config, self.scheduler.config
        shown = net.out_channels // 2 * (1 if self.noising is None else 2)
        if net.in_channels != shown or net.out_channels % 2:
            raise ValueError(f"{'stage I' if self.noising is None else 'stage II'} sees {shown} channels and says two "
                             f"for each of an image's, got {net.in_channels} in and {net.out_channels} out")
        if (config.prediction_type, config.variance_type) != ("epsilon", "learned_range"):
            raise ValueError("a stage predicts epsilon with a variance of learned_range, got "
                             f"{config.prediction_type} and {config.variance_type}")

    @cached_property
    def schedule(self) -> NoiseSchedule:
        """The noise schedule, in our count of times."""
        return schedule_of(self.scheduler)

    def times(self, steps: int) -> list[int]:
        """The times that diffusers' pipeline walks in so many steps, then 0: with 20 of 1000, 951, 901, ..., 1, 0."""
        return times_of(self.scheduler, steps)

    def denoiser(self, prompt: Tensor, low: LowResolution | None = None) -> Denoiser:
        """What the network itself says when asked for a prompt: a denoiser of `LearnedPrediction`s.

        prompt: its embedding (tokens, width), or one for each image, (b, tokens, width). The network works
        in its own precision, images keep theirs: half the memory does not cost x its digits.
        """
        width = self.unet.config.encoder_hid_dim
        if not isinstance(prompt, Tensor) or prompt.ndim not in (2, 3) or prompt.shape[-1] != width:
            got = tuple(prompt.shape) if isinstance(prompt, Tensor) else repr(prompt)
            raise ValueError(f"a prompt is its embedding, (tokens, {width}) or (b, tokens, {width}), got {got}")
        if (low is None) != (self.noising is None):
            raise ValueError("stage II, and only stage II, is shown a low-resolution image: stage.enlarged(image)")

        def denoise(x_t: Tensor, t: Tensor) -> Prediction:
            eps, variance = self._evaluate(x_t, t, prompt, low).to(x_t.dtype).chunk(2, dim=1)
            return LearnedPrediction(x0_from_eps(x_t, t, eps, self.schedule), eps, (variance + 1) / 2)
        return denoise

    def guided(self, prompt: Tensor, nothing: Tensor, w: float, low: LowResolution | None = None) -> Denoiser:
        """Classifier-free guidance as diffusers' pipelines do it: x_0 thresholded, the prompt's own variance kept.

        nothing: the embedding of "". w is their guidance_scale where that is above 1 (7 suits stage I, 4 stage II);
        at 1 and below theirs only switches guidance off.
        """
        unasked = self.denoiser(nothing, low)
        return with_variance(self.denoiser(prompt, low),
                             lambda asked: limited(guided(asked, unasked, w), self.scheduler))

    def enlarged(self, image: Tensor, t: int = 251, rng: torch.Generator | None = None) -> LowResolution:
        """An image of stage I as stage II wants to see it. t: how much noise; diffusers' noise_level is t - 1."""
        if self.noising is None:
            raise ValueError("only stage II is shown a low-resolution image")
        size = self.unet.config.sample_size
        big = F.interpolate(image, (size, size), mode="bilinear", align_corners=True)
        return LowResolution(start_from(big, t, schedule_of(self.noising), rng), t)

    def _evaluate(self, x_t: Tensor, t: Tensor, prompt: Tensor, low: LowResolution | None) -> Tensor:
        if bool((t < 1).any()):
            raise ValueError(f"t counts 1..{self.schedule.T}, got {t.min()}")
        self.unet.eval()
        prompt = prompt.to(x_t.device, self.unet.dtype).expand(len(x_t), -1, -1)
        if low is None:
            shown, level = x_t, None
        else:
            shown = torch.cat([x_t, low.x.to(x_t).expand_as(x_t)], dim=1)
            level = torch.full((len(x_t),), low.t - 1, device=x_t.device)
        answer: Tensor = self.unet(shown.to(self.unet.dtype), t - 1, encoder_hidden_states=prompt,
                                   class_labels=level, return_dict=False)[0]
        return answer.to(x_t.device)


def load_stage(stage: str, size: str | None = None, *, source: str | Path | None = None,
               dtype: torch.dtype = torch.float16, variant: str | None = "fp16", device_map: Any = "auto") -> Stage:
    """Stage "I" or "II" with its network and its schedulers, and nothing else: 8.6 GB for the largest.

    size        "M", "L" or (stage I) "XL"; the largest by default
    source      a repository or folder of the same layout, instead of DeepFloyd's
    dtype       half precision fits a GPU; a CPU wants torch.float32
    variant     which weights to read; None for a folder that was saved without one
    device_map  as accelerate understands it: "auto" fills the GPU and leaves the rest in memory; or "cuda", "cpu"

    NotAvailable, saying what to do, where the weights cannot be had.
    """
    if stage not in SIZES or size not in (None, *SIZES[stage]):
        raise ValueError(f"the stages and sizes are {SIZES}, got {stage!r} and {size!r}")
    source = source or f"DeepFloyd/IF-{stage}-{size or SIZES[stage][-1]}-v1.0"
    with _explained("diffusers", "accelerate"):
        from diffusers import DDPMScheduler, UNet2DConditionModel

        scheduler = DDPMScheduler.from_pretrained(source, subfolder="scheduler")
        noising = DDPMScheduler.from_pretrained(source, subfolder="image_noising_scheduler") if stage == "II" else None
        unet = UNet2DConditionModel.from_pretrained(source, subfolder="unet", variant=variant, torch_dtype=dtype,
                                                    device_map=device_map, use_safetensors=True)
    return Stage(unet, scheduler, noising)


def read_prompts(prompts: Sequence[str], *, source: str | Path = PAGE, bits: int = 8, variant: str | None = "fp16",
                 device_map: Any = "auto") -> dict[str, Tensor]:
    """{prompt: (77, 4096)}: how T5-XXL reads each prompt, in half precision on the CPU, for `save_prompts`.

    bits: 8 takes 6 GB of a GPU, 16 takes 11 GB of a GPU or of memory. Once, for all the prompts you will ever
    want, "" among them, which guidance needs: T5 is let go of when this returns. ValueError for a prompt of
    more than 77 tokens.
    """
    if isinstance(prompts, str):
        raise ValueError(f"prompts are a list of them, got one: [{prompts!r}] is a list")
    if bits not in (8, 16):
        raise ValueError(f"T5 is read in 8 or 16 bits, got bits = {bits}")
    with _explained("transformers", "accelerate", *(["bitsandbytes"] if bits == 8 else [])):
        from transformers import AutoTokenizer, BitsAndBytesConfig, T5EncoderModel

        tokenize = AutoTokenizer.from_pretrained(source, subfolder="tokenizer")
        t5 = T5EncoderModel.from_pretrained(
            source, subfolder="text_encoder", variant=variant, torch_dtype=torch.float16, device_map=device_map,
            use_safetensors=True, quantization_config=BitsAndBytesConfig(load_in_8bit=True) if bits == 8 else None)
    t5.eval()
    found = {}
    for prompt in prompts:
        text = prompt.lower().strip()  # as encode_prompt of diffusers' pipelines does
        if len(tokenize(text).input_ids) > TOKENS:
            raise ValueError(f"a prompt has at most {TOKENS} tokens, got {len(tokenize(text).input_ids)}: {prompt!r}")
        words = tokenize(text, padding="max_length", max_length=TOKENS, return_tensors="pt").to(t5.device)
        with torch.no_grad():
            found[prompt] = t5(words.input_ids, attention_mask=words.attention_mask)[0][0].half().cpu()
    return found


def save_prompts(prompts: dict[str, Tensor], path: str | Path) -> None:
    """Write {prompt: embedding} as one safetensors file, so that nobody needs T5 again."""
    save_file({prompt: embedding.contiguous() for prompt, embedding in prompts.items()}, path)


def load_prompts(path: str | Path) -> dict[str, Tensor]:
    """{prompt: embedding} from the file that `save_prompts` wrote. A pickle (.pth) is refused."""
    try:
        return load_file(path)
    except SafetensorError:
        raise ValueError(f"{path} is not a safetensors file of prompts, as save_prompts writes it") from None


@contextmanager
def _explained(*packages: str) -> Iterator[None]:
    """One message for the four ways in which the weights may be out of reach."""
    missing = [name for name in packages if find_spec(name) is None]
    try:
        if missing:
            raise ImportError(f"{' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} not installed")
        yield
    except (ImportError, OSError) as error:
        raise NotAvailable(
            f"DeepFloyd IF is not available here: {_reason(error)}. To have it, once: "
            f"pip install 'coursekit[text-to-image]'; accept its licence at https://huggingface.co/{PAGE} "
            "(that one page is enough for all of its models); hf auth login. "
            "Everything else in the course works without it.") from error


def _reason(error: BaseException | None) -> str:
    said, kinds = str(error).strip().rstrip("."), set()
    while error is not None:  # diffusers raises an OSError of its own over what the Hub said
        kinds |= {kind.__name__ for kind in type(error).__mro__}
        error = error.__cause__ or error.__context__
    if kinds & {"GatedRepoError", "RepositoryNotFoundError", "LocalTokenNotFoundError"}:
        return "the Hub gives its weights only to those who are logged in and have accepted the licence"
    if kinds & {"OfflineModeIsEnabled", "LocalEntryNotFoundError", "ConnectionError", "ConnectError"}:
        return "its weights are not on this machine, and the Hub cannot be reached"
    return said
