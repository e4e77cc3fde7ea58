"""`pytest tests/benchmarks`: the ratios that the course promises, with room for a busy machine."""

import bench_course
import pytest


def test_importing_the_course_costs_little_more_than_torch():
    seconds = bench_course.imports(rounds=2)
    assert seconds["coursekit.schedules"] < seconds["torch"] + 1
    assert seconds["coursekit.recipes"] < seconds["torch"] + 8


def test_batches_beat_the_dataloader_by_far():
    ours, theirs = bench_course.batches(rounds=3, count=20).values()
    assert ours > 5 * theirs


def test_the_unet_trains_several_times_faster_than_its_peers():
    pytest.importorskip("diffusers")
    speeds = bench_course.training(rounds=2)
    ours = next(iter(speeds.values()))
    assert all(ours > 3 * speed for name, speed in speeds.items() if not name.startswith("nets."))
