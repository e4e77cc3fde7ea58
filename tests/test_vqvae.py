"""The VQ-VAE: its count, rounding to the nearest vector, its straight-through gradient, two ways to move the book."""

import itertools
import math

import pytest
import torch
from support import DEVICES, generator, randn
from torch.testing import assert_close

from coursekit import checkpoints
from coursekit.checkpoints import Card
from coursekit.nets import VQVAE
from coursekit.nets.vqvae import Quantizer
from coursekit.training import fit

WAYS = ["ema", "gradient"]


def small(**changes):
    torch.manual_seed(0)
    return VQVAE(**{"channels": (4, 6), "blocks": 1, "codes": 8, "dim": 3} | changes)


def book(codebook="ema", codes=8, dim=3, seed=0):
    quantizer = Quantizer(codes, dim, codebook)
    with torch.no_grad():
        quantizer.vectors.copy_(randn(codes, dim, seed=seed))
        if codebook == "ema":
            quantizer.count.fill_(1.0)
            quantizer.total.copy_(quantizer.vectors)
    return quantizer


def images(n=4, seed=0):
    return torch.rand(n, 1, 28, 28, generator=generator(seed)) * 2 - 1


def test_the_keras_example_has_exactly_as_many_parameters_as_published():
    net = VQVAE(channels=(32, 64), blocks=0, kernel=3, codes=128, dim=16, codebook="gradient")
    assert sum(p.numel() for p in net.parameters()) == 49_937


@pytest.mark.parametrize("kernel", [3, 4])
@pytest.mark.parametrize("device", DEVICES)
def test_28_pixels_are_7_codes_and_come_back(kernel, device):
    net = small(kernel=kernel).to(device)
    x = images().to(device)
    z_e = net.encode(x)
    z_q, codes, loss = net.quantize(z_e)
    assert z_e.shape == z_q.shape == (4, 3, 7, 7) and codes.shape == (4, 7, 7) and codes.dtype == torch.int64
    assert loss.ndim == 0 and net.decode(z_q).shape == x.shape and net.embed(codes).shape == z_q.shape
    assert z_q.device.type == device == net(x).codes.device.type


@pytest.mark.parametrize("way", WAYS)
def test_every_site_gets_the_nearest_vector(way):
    quantizer, z_e = book(way).eval(), randn(2, 3, 4, 5, seed=3).float()
    z_q, codes, _ = quantizer(z_e)
    far = (z_e[:, None] - quantizer.vectors.detach()[None, :, :, None, None]).square().sum(2)  # (b, K, h, w)
    assert torch.equal(codes, far.argmin(1)) and codes.unique().numel() > 3
    assert_close(z_q, quantizer.embed(codes))
    assert_close(quantizer.distances(z_e).view(2, 4, 5, 8).movedim(-1, 1), far, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("way", WAYS)
def test_the_gradient_goes_straight_through(way):
    """What the decoder wants of z_q is what z_e is told, untouched; the commitment comes on top, towards its vector."""
    quantizer = book(way).train()
    z_e = randn(1, 3, 2, 2, seed=4).float().requires_grad_()
    wish = randn(1, 3, 2, 2, seed=5).float()
    z_q, _, _ = quantizer(z_e)
    (z_q * wish).sum().backward()
    assert_close(z_e.grad, wish)
    assert way == "ema" or quantizer.vectors.grad is None or not quantizer.vectors.grad.any()


def test_the_two_terms_of_the_published_loss_pull_one_side_each():
    quantizer = book("gradient").train()
    z_e = randn(1, 3, 2, 2, seed=4).float().requires_grad_()
    _, codes, loss = quantizer(z_e)
    loss.backward()
    e = quantizer.embed(codes).detach()
    error = z_e.detach() - e
    assert_close(loss.detach(), 1.25 * error.square().mean())
    assert_close(z_e.grad, 0.25 * 2 * error / error.numel())  # commitment, beta = 0.25
    wanted = torch.zeros(8, 3)
    wanted.index_add_(0, codes.flatten(), -2 * error.movedim(1, -1).flatten(0, 2) / error.numel())
    assert_close(quantizer.vectors.grad, wanted)


def test_the_ema_loss_is_the_commitment_alone():
    quantizer, z_e = book().eval(), randn(1, 3, 2, 2, seed=4).float()
    z_q, _, loss = quantizer(z_e)
    assert_close(loss, 0.25 * (z_e - z_q).square().mean())


def test_the_ema_book_settles_on_the_means_of_what_is_rounded_to_it():
    """Three clusters, three vectors: after many batches each vector is the mean of its cluster."""
    centres = torch.tensor([[0.0, 0.0], [4.0, 0.0], [0.0, 4.0]])
    quantizer = Quantizer(3, 2)
    with torch.no_grad():
        quantizer.vectors.copy_(centres + 0.8)
        quantizer.count.fill_(5.0)
        quantizer.total.copy_(5 * quantizer.vectors)
    points = centres.repeat(20, 1) + 0.1 * randn(60, 2).float()
    for _ in range(1500):
        quantizer(points.T.reshape(1, 2, 60, 1))
    assert_close(quantizer.vectors, points.view(20, 3, 2).mean(0), atol=1e-3, rtol=0)
    assert_close(quantizer.count, torch.full((3,), 20.0), atol=1e-3, rtol=0)


def test_the_book_moves_in_training_mode_only():
    quantizer = book()
    before = quantizer.vectors.clone()
    quantizer.eval()(randn(2, 3, 4, 4).float())
    assert torch.equal(quantizer.vectors, before)
    quantizer.train()(randn(2, 3, 4, 4).float())
    assert not torch.equal(quantizer.vectors, before)


def test_an_idle_vector_restarts_at_an_encoder_output():
    quantizer = book()
    with torch.no_grad():
        quantizer.vectors[5] = quantizer.total[5] = 1e3  # nothing is near it
        quantizer.count[5] = quantizer.dead
    z_e = randn(2, 3, 4, 4, seed=6).float()
    quantizer.train()(z_e, generator(1))
    sites = z_e.movedim(1, -1).flatten(0, 2)
    assert (sites == quantizer.vectors[5]).all(1).any() and quantizer.count[5] == 1
    again = book()
    with torch.no_grad():
        again.vectors[5] = again.total[5] = 1e3
        again.count[5] = again.dead
    again.train()(z_e, generator(1))
    assert torch.equal(again.vectors, quantizer.vectors)  # rng decides


def test_a_new_book_starts_on_the_first_batch():
    quantizer, z_e = Quantizer(4, 3), 50 + randn(2, 3, 4, 4).float()
    quantizer(z_e, generator())
    assert quantizer.vectors.min() > 30


def test_collapse_of_a_published_book_and_its_cure():
    """Vectors start near 0, data lies far away: by gradient one vector takes all, the other book uses most."""
    data = 3 + randn(32, 3, 4, 4, seed=2).float()
    used = {}
    for way in WAYS:
        torch.manual_seed(0)
        quantizer = Quantizer(16, 3, way)
        optimizer = torch.optim.Adam(quantizer.parameters(), lr=1e-2) if way == "gradient" else None
        for _ in range(200):
            _, codes, loss = quantizer(data, generator(1))
            if optimizer:
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        used[way] = codes.unique().numel()
    assert used["gradient"] <= 8 < 12 <= used["ema"]


def test_statistics_make_latents_of_mean_0_and_deviation_1_and_are_undone():
    net = small()
    net.measure([images(8), images(8, seed=1)])
    z_e = net.encode(torch.cat([images(8), images(8, seed=1)])).detach()
    z = net.normalise(z_e)
    assert_close(z.mean((0, 2, 3)), torch.zeros(3), atol=1e-4, rtol=0)
    assert_close(z.std((0, 2, 3)), torch.ones(3), atol=1e-3, rtol=0)
    assert_close(net.denormalise(z), z_e, atol=1e-5, rtol=1e-5)
    assert "mean" in net.state_dict() and "std" in net.state_dict()


def test_statistics_of_nothing_and_of_a_silent_channel_are_refused():
    net = small()
    with pytest.raises(ValueError, match="two sites or more"):
        net.measure([])
    with torch.no_grad():
        net.encoder[-1].weight[0] = net.encoder[-1].bias[0] = 0.0
    with pytest.raises(ValueError, match="says the same everywhere"):
        net.measure([images()])


def test_mixed_precision_rounds_to_the_same_codes():
    quantizer, z_e = book().eval(), 30 + randn(8, 3, 7, 7, seed=9).float()
    with torch.no_grad():
        quantizer.vectors.add_(30)
    wanted = quantizer(z_e).codes
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(quantizer(z_e).codes, wanted)


def test_a_resumed_training_has_the_same_book_bit_for_bit(tmp_path):
    def loss(model, x, rng):
        out = model(x, rng)
        return (out.x - x).square().mean() + out.loss

    def run(until, path):
        torch.manual_seed(0)
        rng = generator(3)
        return fit(small(), itertools.repeat(images(8)), lambda model, x: loss(model, x, rng), steps=8, until=until,
                   rng=rng, save_to=path, progress=False).model.state_dict()
    whole = run(8, tmp_path / "whole")
    run(3, tmp_path / "parts")
    parts = run(8, tmp_path / "parts")
    assert all(torch.equal(parts[key], value) for key, value in whole.items())


@pytest.mark.parametrize("way", WAYS)
def test_it_learns(way):
    net, x = small(codebook=way, codes=32), images(16)
    optimizer, found = torch.optim.Adam(net.train().parameters(), lr=3e-3), []
    for _ in range(30):
        out = net(x, generator())
        found.append((out.x - x).square().mean())
        optimizer.zero_grad()
        (found[-1] + out.loss).backward()
        optimizer.step()
    assert found[-1] < found[0] and all(p.grad is not None for p in net.parameters())


@pytest.mark.parametrize("wrong, sentence", [
    ({"channels": ()}, "a halving or more"), ({"kernel": 5}, "kernel of 3 or 4"), ({"codes": 1}, "two codes"),
    ({"blocks": -1}, "blocks"), ({"commitment": -1.0}, "commitment"), ({"codebook": "k-means"}, "'k-means'")])
def test_settings_that_cannot_be_right_are_refused(wrong, sentence):
    with pytest.raises(ValueError, match=sentence):
        small(**wrong)


def test_inputs_that_cannot_be_right_are_refused():
    net = small()
    with pytest.raises(ValueError, match="4"):
        net.encode(torch.zeros(1, 1, 30, 28))
    with pytest.raises(ValueError, match=r"\(b, 3, h, w\), got \(1, 4, 7, 7\)"):
        net.quantize(torch.zeros(1, 4, 7, 7))
    with pytest.raises(ValueError, match="int64"):
        net.embed(torch.zeros(1, 7, 7))
    with pytest.raises(ValueError, match="from 0 to 7, got 0 to 8"):
        net.embed(torch.tensor([[[0, 8]]]))


def test_a_batch_of_one_works_and_an_empty_one_is_refused():
    out = small().train()(images(1), generator())
    assert out.x.shape == (1, 1, 28, 28) and out.codes.shape == (1, 7, 7)
    with pytest.raises(ValueError, match="28"):
        small()(images(1)[:0])


@pytest.mark.parametrize("way", WAYS)
def test_it_travels_in_a_checkpoint(way, tmp_path):
    net = small(codebook=way).eval()
    net.measure([images()])
    checkpoints.save(net, tmp_path / "x.safetensors", Card(
        name="x", recipe="test", data="none", images=0, steps=0, metrics={}))
    again = checkpoints.load(tmp_path / "x.safetensors")
    assert_close(again.encode(images()), net.encode(images()), atol=1e-2, rtol=1e-2)  # half precision
    assert_close(again.mean, net.mean, atol=1e-3, rtol=1e-3)
    assert not math.isnan(again(images()).loss.item())
