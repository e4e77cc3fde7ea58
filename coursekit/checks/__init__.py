"""Self-checks for notebooks and graders: one function per exercise, called on the learner's function.

A check prints *passed* with the fact it established, or raises CheckFailed naming the likely mistake.
"""

from coursekit.checks.core import CheckFailed
from coursekit.checks.denoising import gaussian_blur, one_step, posterior_step, psnr, wiener
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

__all__ = ["CheckFailed", "add_noise", "alpha_bar", "gaussian_blur", "noise_step", "one_step",
           "posterior_step", "psnr", "rescaled_betas", "start_noise", "times_for", "to_bytes", "to_float",
           "useless_share", "wiener"]
