"""Drawn cats: the same from the same seed, whatever the number and the size; varied; quick."""

import time

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from coursekit.drawn import COATS, coats, drawn_cats


@settings(max_examples=15, deadline=None)
@given(n=st.integers(1, 3), size=st.integers(8, 72), seed=st.integers(0, 2**40))
def test_any_number_at_any_size(n: int, size: int, seed: int) -> None:
    x = drawn_cats(n, size, seed)
    assert x.shape == (n, 3, size, size) and x.dtype == torch.uint8
    assert torch.equal(x, drawn_cats(n, size, seed))
    assert x.float().std() > 10  # there is something to see


def test_cat_i_does_not_depend_on_how_many_are_drawn() -> None:
    assert torch.equal(drawn_cats(5, 32, seed=3)[:2], drawn_cats(2, 32, seed=3))


def test_a_cat_is_the_same_cat_at_every_size() -> None:
    small, large = drawn_cats(6, 32).float(), drawn_cats(6, 128).float()
    shrunk = F.interpolate(large, (32, 32), mode="area")
    own = (small - shrunk).abs().mean((1, 2, 3))
    other = (small - shrunk.roll(1, 0)).abs().mean((1, 2, 3))
    assert (own < 6).all() and (other > 4 * own).all()


def test_no_two_cats_are_alike() -> None:
    x = torch.cat([drawn_cats(25, 16, seed).float() for seed in (0, 1)])
    distance = torch.cdist(x.flatten(1), x.flatten(1)) / (3 * 16 * 16) ** 0.5
    assert distance.fill_diagonal_(99).min() > 8


def test_every_coat_is_worn_and_shows() -> None:
    worn = coats(400)
    assert worn.bincount(minlength=len(COATS)).min() > 15  # 40 expected
    x, worn = drawn_cats(50, 16).float(), coats(50)
    forehead = x[:, :, 6:8, 7:9].mean((1, 2, 3))
    white, black = (forehead[worn == COATS.index(kind)] for kind in ("white", "black"))
    assert white.min() > black.max() + 60


def test_a_cat_looks_at_you() -> None:
    """On average a face is nearly its own mirror image; moved aside it is not."""
    face = drawn_cats(60, 24, seed=5).float().mean((0, 1))[6:20]
    mirrored, aside = face.flip(-1), face.flip(-1).roll(5, -1)
    assert (face - mirrored).abs().mean() < 0.5 * (face - aside).abs().mean()


@pytest.mark.parametrize(("arguments", "wanted"), [
    ({"n": 0}, "n = 0"), ({"n": 1, "size": 7}, "size = 7"), ({"n": 1, "seed": -1}, "-1")])
def test_bad_input_is_refused_by_its_value(arguments: dict, wanted: str) -> None:
    with pytest.raises(ValueError, match=wanted):
        drawn_cats(**arguments)


def test_drawing_is_quick() -> None:
    drawn_cats(1)
    start = time.process_time()
    drawn_cats(40)
    assert 40 / (time.process_time() - start) > 30  # about 150 on one core; a slow machine passes
