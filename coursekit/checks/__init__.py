"""Self-checks for notebooks and graders: one function per exercise, called on the learner's function.

A check prints *passed* with the fact it established, or raises CheckFailed naming the likely mistake.
"""

from coursekit.checks.bits import decoder_bits, distortion_at, jump_bits, rate_curve
from coursekit.checks.codes import (
    causal_mask,
    code_logits,
    codebook_loss,
    draw_codes,
    nats_per_image,
    nearest,
    seen_by,
    straight_through,
)
from coursekit.checks.colour import attends_at, ema_update, kernel_distance, mirrored, zero_snr
from coursekit.checks.core import CheckFailed
from coursekit.checks.denoising import gaussian_blur, one_step, posterior_step, psnr, wiener
from coursekit.checks.digits import (
    ancestral_sampler,
    error_factor,
    from_velocity,
    noise_prediction_loss,
    time_features,
)
from coursekit.checks.editing import anagram, edit, hybrid, jump_back, keep_known, seam, shuffled
from coursekit.checks.guidance import diversity, drop_labels, guided, one_hot, our_weight, slerp
from coursekit.checks.hybrids import audit, coloured_step, distortion, noised_prior, reverse_step, spread
from coursekit.checks.kernels import (
    filter_pixels,
    int8_kernels,
    precision_matrix,
    prediction,
    pyramid,
    read_head,
)
from coursekit.checks.latents import (
    between,
    bounded,
    decode_latents,
    equal_steps,
    latent_loss,
    latent_statistics,
    unit_latents,
)
from coursekit.checks.noising import (
    add_noise,
    alpha_bar,
    noise_step,
    rescaled_betas,
    start_noise,
    times_for,
    to_bytes,
    to_float,
    useless_share,
)
from coursekit.checks.one_pass import best_denoiser, known_noise_loss, multiply_adds, noisy, on_its_own
from coursekit.checks.paths import euler_jump, gated, time_code, velocity_loss
from coursekit.checks.prior import (
    bernoulli_mask,
    data_term,
    hidden_psnr,
    most_scales,
    restoration,
    running_average,
    shaken,
    windowed_variance,
)
from coursekit.checks.unets import blocks, conv, down_conv, flatten, unet, unflatten, up_conv

__all__ = ["CheckFailed", "add_noise", "alpha_bar", "anagram", "ancestral_sampler", "attends_at", "audit",
           "bernoulli_mask", "best_denoiser", "between", "blocks", "bounded", "causal_mask", "code_logits",
           "codebook_loss", "coloured_step", "conv", "data_term", "decode_latents", "decoder_bits", "distortion",
           "distortion_at", "diversity", "down_conv", "draw_codes", "drop_labels", "edit", "ema_update", "equal_steps",
           "error_factor", "euler_jump", "filter_pixels", "flatten", "from_velocity", "gated", "gaussian_blur",
           "guided", "hidden_psnr", "hybrid", "int8_kernels", "jump_back", "jump_bits", "keep_known",
           "kernel_distance", "known_noise_loss", "latent_loss", "latent_statistics", "mirrored", "most_scales",
           "multiply_adds", "nats_per_image", "nearest", "noise_prediction_loss", "noise_step", "noised_prior",
           "noisy", "on_its_own", "one_hot", "one_step", "our_weight", "posterior_step", "precision_matrix",
           "prediction", "psnr", "pyramid", "rate_curve", "read_head", "rescaled_betas", "restoration", "reverse_step",
           "running_average", "seam", "seen_by", "shaken", "shuffled", "slerp", "spread", "start_noise",
           "straight_through", "time_code", "time_features", "times_for", "to_bytes", "to_float", "unet", "unflatten",
           "unit_latents", "up_conv", "useless_share", "velocity_loss", "wiener", "windowed_variance", "zero_snr"]
