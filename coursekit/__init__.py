"""The package behind the course: schedules, denoisers, samplers, networks, losses, and what carries them.

Images are float tensors (b, c, h, w) in [-1, 1], t counts 1..T with 0 clean, randomness comes in as a
torch.Generator. Import what you need from its module, as `from coursekit.samplers import ddim`.
"""
