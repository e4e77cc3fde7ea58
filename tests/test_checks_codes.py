"""Every self-check of notebook 10 passes the right answer and names each mistake it claims to catch."""

import math

import torch
import torch.nn.functional as F
from support import suite_of

from coursekit import checks
from coursekit.checks.codes import _counting
from coursekit.nets import PixelCNN
from coursekit.nets.pixelcnn import SEES, MaskedConv
from coursekit.nets.vqvae import Quantizer


def flat(z):
    return z.movedim(1, -1).flatten(0, -2)


def rounding(to=lambda far: far.argmin(1), far=lambda z, e: torch.cdist(z, e).square(), flat=flat,
             shape=lambda b, h, w: (b, h, w)):
    """Nearest codes with one thing changed."""
    def nearest(z_e, vectors):
        return to(far(flat(z_e), vectors)).view(shape(len(z_e), *z_e.shape[2:]))
    return nearest


def book(z, e):
    return (z.detach() - e).square().mean()


def hold(z, e):
    return (z - e.detach()).square().mean()


def mse(z, e):
    return (z - e).square().mean()


def masking(seen):
    def causal_mask(size, sees_itself):
        y, x = torch.meshgrid(*[torch.arange(size) - size // 2] * 2, indexing="ij")
        return seen(y, x, (y == 0) & (x == 0) & sees_itself)
    return causal_mask


before = masking(lambda y, x, itself: (SEES["before"](y, x) | itself).float())


def seeing(answer=lambda out, i, j: out[0, :, i, j].sum(), end=lambda grad: grad.abs().sum((0, 1)) > 0,
           copy=lambda x: x.clone().requires_grad_()):
    """What a site sees, with one thing changed."""
    def seen_by(net, x, i, j):
        x = copy(x)
        answer(net(x), i, j).backward()
        return end(x.grad)
    return seen_by


def costing(axis=1, end=lambda log_p: -log_p.sum((1, 2))):
    def nats_per_image(logits, codes):
        return end(logits.log_softmax(axis).gather(1, codes[:, None])[:, 0])
    return nats_per_image


def drawing(order=lambda site, size: divmod(site, size), logits=lambda out, i, j: out[:, :, i, j], dtype=torch.int64,
            sites=lambda size: range(size**2), pick=lambda choose, logits: choose(logits)):
    """The loop over the sites, with one thing changed."""
    def draw_codes(net, n, size, choose):
        codes = torch.zeros(n, size, size, dtype=dtype)
        for site in sites(size):
            i, j = order(site, size)
            codes[:, i, j] = pick(choose, logits(net(codes.long()), i, j)).to(dtype)
        return codes
    return draw_codes


def in_one_pass(net, n, size, choose):
    codes = torch.zeros(n, size, size, dtype=torch.int64)
    logits = net(codes)
    for site in range(size**2):
        codes[:, site // size, site % size] = choose(logits[:, :, site // size, site % size])
    return codes


def never_written(net, n, size, choose):
    codes = torch.zeros(n, size, size, dtype=torch.int64)
    for site in range(size**2):
        choose(net(codes)[:, :, site // size, site % size])
    return codes


def begun_anew(net, n, size, choose):
    filled = torch.zeros(n, size, size, dtype=torch.int64)
    for site in range(size**2):
        codes = torch.zeros(n, size, size, dtype=torch.int64)
        codes[:, site // size, site % size] = choose(net(filled)[:, :, site // size, site % size])
        filled[:, site // size, site % size] = codes[:, site // size, site % size]
    return codes


def one_before(out, i, j):
    return out[:, :, i, max(0, j - 1)]


RIGHT = {
    "nearest": [rounding(), lambda z_e, vectors: (z_e.movedim(1, -1)[..., None, :] - vectors).norm(dim=-1).argmin(-1)],
    "straight_through": lambda z_e, e: z_e + (e - z_e).detach(),
    "codebook_loss": lambda z_e, e, beta: book(z_e, e) + beta * hold(z_e, e),
    "causal_mask": before,
    "seen_by": [seeing(), lambda net, x, i, j: torch.autograd.functional.jacobian(
        lambda x: net(x)[0, :, i, j], x).abs().sum((0, 1, 2)) > 0],
    "nats_per_image": [costing(), lambda logits, codes: F.cross_entropy(logits, codes, reduction="none").sum((1, 2))],
    "draw_codes": drawing(),
    "code_logits": [lambda far, tau: -far / tau, lambda far, tau: (-far / tau).log_softmax(1)],
}

PLANTED = [
    ("nearest", rounding(to=lambda far: far.argmax(1)), "farthest"),
    ("nearest", rounding(flat=lambda z: z.reshape(-1, 4)), "torn apart"),
    ("nearest", rounding(far=lambda z, e: -2 * z @ e.T), "long vectors"),
    ("nearest", rounding(far=lambda z, e: -F.normalize(z) @ F.normalize(e).T), "smallest angle"),
    ("nearest", rounding(far=lambda z, e: torch.cdist(z, e, p=1)), "absolute differences"),
    ("nearest", rounding(far=lambda z, e: (z[:, :1] - e[:, 0]).square()), "at some sites"),
    ("nearest", rounding(shape=lambda b, h, w: (b * h * w,)), "one code for each site"),
    ("nearest", rounding(to=lambda far: far.argmin(1).float()), "int64, got torch.float32"),
    ("nearest", lambda z_e, vectors: vectors[rounding()(z_e, vectors)].movedim(-1, 1), "these are vectors"),
    ("straight_through", lambda z_e, e: e, "all of the gradient goes to e"),
    ("straight_through", lambda z_e, e: z_e + e - z_e, "cancels in the gradient"),
    ("straight_through", lambda z_e, e: e.detach(), "no gradient reaches"),
    ("straight_through", lambda z_e, e: z_e + e.detach() - z_e, "no gradient reaches"),
    ("straight_through", lambda z_e, e: z_e + e - z_e.detach(), "also pulls at e"),
    ("straight_through", lambda z_e, e: e + (z_e - e).detach(), "not rounded"),
    ("straight_through", lambda z_e, e: z_e, "not rounded"),
    ("straight_through", lambda z_e, e: (z_e + e) / 2, "half-way"),
    ("straight_through", lambda z_e, e: z_e * e, "in value"),
    ("straight_through", lambda z_e, e: 2 * z_e + (e - 2 * z_e).detach(), "unchanged"),
    ("codebook_loss", lambda z, e, beta: beta * book(z, e) + hold(z, e), "swapped"),
    ("codebook_loss", lambda z, e, beta: (1 + beta) * mse(z, e), "no stop-gradient"),
    ("codebook_loss", lambda z, e, beta: (1 + beta) * mse(z.detach(), e.detach()), "nothing learns"),
    ("codebook_loss", lambda z, e, beta: (1 + beta) * book(z, e), "z_e never moves"),
    ("codebook_loss", lambda z, e, beta: (1 + beta) * hold(z, e), "e never moves"),
    ("codebook_loss", lambda z, e, beta: book(z, e) + beta * mse(z, e), "a gradient is not"),
    ("codebook_loss", lambda z, e, beta: z.numel() * (book(z, e) + beta * hold(z, e)), "a sum over all"),
    ("codebook_loss", lambda z, e, beta: 4 * (book(z, e) + beta * hold(z, e)), "over the channels"),
    ("codebook_loss", lambda z, e, beta: book(z, e), "only one"),
    ("codebook_loss", lambda z, e, beta: beta * hold(z, e), "only one"),
    ("codebook_loss", lambda z, e, beta: book(z, e) + hold(z, e), "beta is missing"),
    ("codebook_loss", lambda z, e, beta: book(z, e).sqrt() + beta * hold(z, e).sqrt(), "roots"),
    ("codebook_loss", lambda z, e, beta: book(z, e) - beta * hold(z, e), "should be"),
    ("codebook_loss", lambda z, e, beta: (z - e).square().mean((1, 2, 3)), "one number"),
    ("causal_mask", lambda size, itself: before(size, True), "told to itself"),
    ("causal_mask", lambda size, itself: before(size, False), "the centre is 1"),
    ("causal_mask", lambda size, itself: before(size, itself).flip(0, 1), "upside down"),
    ("causal_mask", lambda size, itself: before(size, itself).T, "columns first"),
    ("causal_mask", masking(lambda y, x, itself: (y < 0).float()), "only the rows above"),
    ("causal_mask", masking(lambda y, x, itself: ((y <= 0) & (x <= 0) & ((y < 0) | (x < 0)) | itself).float()),
     "also to the right"),
    ("causal_mask", masking(lambda y, x, itself: SEES["before"](y, x) | itself), "got torch.bool"),
    ("causal_mask", masking(lambda y, x, itself: torch.ones_like(y).float()), "looks at other places"),
    ("causal_mask", lambda size, itself: torch.ones(3, 3).tril() if size == 3 else before(3, itself), "other places"),
    ("causal_mask", lambda size, itself: before(size, itself)[None, None], "should have shape"),
    ("seen_by", seeing(copy=lambda x: x.clone()), "must require a gradient"),
    ("seen_by", seeing(end=lambda grad: grad.abs() > 0), "each channel"),
    ("seen_by", seeing(end=lambda grad: grad.abs().sum((0, 1))), "yes or no"),
    ("seen_by", seeing(end=lambda grad: grad.sum((0, 1)).abs() > 0), "cancel"),
    ("seen_by", seeing(end=lambda grad: grad[0, 0] != 0), "only the first channel"),
    ("seen_by", seeing(end=lambda grad: (grad > 0).any(1)[0]), "negative gradients"),
    ("seen_by", seeing(answer=lambda out, i, j: out.sum()), "all outputs"),
    ("seen_by", seeing(answer=lambda out, i, j: out[0, :, j, i].sum()), "swapped"),
    ("seen_by", seeing(copy=lambda x: x.requires_grad_()), "earlier call"),
    ("seen_by", seeing(answer=lambda out, i, j: out[0, 0, i, j]), "first output"),
    ("seen_by", seeing(answer=lambda out, i, j: out[0, 1, i, j]), "not the sites"),
    ("seen_by", seeing(end=lambda grad: grad.abs().sum(1) > 0), "one answer for each site"),
    ("nats_per_image", lambda logits, codes: F.cross_entropy(logits, codes, reduction="none"), "nats of each site"),
    ("nats_per_image", costing(end=lambda log_p: -log_p.mean((1, 2))), "mean over the sites"),
    ("nats_per_image", costing(end=lambda log_p: -log_p.sum((1, 2)) / math.log(2)), "bits"),
    ("nats_per_image", costing(end=lambda log_p: log_p.sum((1, 2))), "change the sign"),
    ("nats_per_image", lambda logits, codes: -logits.gather(1, codes[:, None]).sum((1, 2, 3)), "log_softmax over"),
    ("nats_per_image", costing(axis=3), "wrong axis"),
    ("nats_per_image", lambda logits, codes: -logits.log_softmax(1).amax(1).sum((1, 2)), "likeliest"),
    ("nats_per_image", costing(end=lambda log_p: -2 * log_p.sum((1, 2))), "was wanted"),
    ("nats_per_image", lambda logits, codes: F.cross_entropy(logits, codes), "the caller averages"),
    ("draw_codes", in_one_pass, "from an empty map"),
    ("draw_codes", never_written, "nothing was written"),
    ("draw_codes", begun_anew, "anew in the loop"),
    ("draw_codes", drawing(order=lambda site, size: divmod(site, size)[::-1]), "down the columns"),
    ("draw_codes", drawing(logits=one_before), "the logits at"),
    ("draw_codes", drawing(logits=lambda out, i, j: out), "logits of one site"),
    ("draw_codes", drawing(pick=lambda choose, logits: choose(logits.softmax(1).argmax(1))), "logits of one site"),
    ("draw_codes", drawing(pick=lambda choose, logits: logits.argmax(1)), "asked 0 times"),
    ("draw_codes", drawing(sites=lambda size: range(size**2 - 1)), "asked 8 times"),
    ("draw_codes", drawing(dtype=torch.float32), "codes are int64"),
    ("draw_codes", lambda *args: drawing()(*args).flatten(1), "n maps of"),
    ("code_logits", lambda far, tau: far / tau, "sign trap"),
    ("code_logits", lambda far, tau: -far * tau, "tau multiplies"),
    ("code_logits", lambda far, tau: -far, "not used"),
    ("code_logits", lambda far, tau: -(far**2) / tau, "squared already"),
    ("code_logits", lambda far, tau: -far.sqrt() / tau, "a root too many"),
    ("code_logits", lambda far, tau: (-far / tau).softmax(1), "probabilities"),
    ("code_logits", lambda far, tau: -far / (2 * tau**2), "are -d"),
    ("code_logits", lambda far, tau: (-far / tau).argmax(1), "should have shape"),
]


test_right_answers_pass, test_planted_mistakes_are_named, test_no_check_is_forgotten = suite_of(
    RIGHT, PLANTED, "codes")


def test_the_exercises_are_what_the_course_computes():
    z, rng = torch.randn(2, 4, 3, 3, generator=torch.Generator().manual_seed(0)), torch.Generator().manual_seed(1)
    quantizer = Quantizer(6, 4, "gradient").eval()
    with torch.no_grad():
        quantizer.vectors.copy_(torch.randn(6, 4, generator=rng))
    said = quantizer(z)
    assert torch.equal(said.codes, RIGHT["nearest"][0](z, quantizer.vectors))
    loss = RIGHT["codebook_loss"](z, quantizer.embed(said.codes), 0.25)
    torch.testing.assert_close(said.loss, loss)
    for sees, itself in {"before": False, "up to": True}.items():
        assert torch.equal(MaskedConv(1, 1, (5, 5), sees).mask, before(5, itself))


def test_the_loop_of_the_exercise_draws_what_the_network_samples():
    torch.manual_seed(0)
    net = PixelCNN(codes=5, size=3, width=4, layers=2).double().eval()
    with torch.no_grad():
        drawn = drawing()(net, 6, 3, lambda logits: logits.argmax(1))
    assert torch.equal(drawn, net.sample(6, temperature=0))
    assert _counting(drawn).shape == (6, 11, 3, 3) and checks.draw_codes.__module__ == "coursekit.checks.codes"
