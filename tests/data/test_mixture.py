"""The order of the stream: fixed composition, exact shares, epochs, no state."""

import random
import subprocess
import sys
import time
from collections import Counter
from fractions import Fraction
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from biascare.data.mixture import (
    MAX_BLOCK,
    GlobalBatchSampler,
    Mixture,
    apportion,
    permute,
    sample_key,
)

FEW = settings(deadline=None, max_examples=25)
COUNTS = st.lists(st.integers(1, 400), min_size=1, max_size=8)


def language_only(sources, seed=0):
    return Mixture([], sources, (0, 1), seed=seed)


@pytest.mark.parametrize("key", [0, 1, sample_key(3, "segmentation", 0, 5), 2**63 - 1])
def test_the_permutation_is_a_bijection_for_every_small_size(key):
    for n in range(1, 201):
        assert sorted(permute(i, n, key) for i in range(n)) == list(range(n))


def test_every_order_of_three_units_occurs_about_equally_often():
    orders = Counter(tuple(permute(i, 3, sample_key(key)) for i in range(3)) for key in range(1200))
    assert len(orders) == 6
    assert min(orders.values()) > 150  # 200 expected, standard deviation 13


def test_a_large_permutation_is_unrelated_to_the_identity():
    n = 3_440_000
    images = [permute(i, n, 11) for i in range(4000)]
    assert len(set(images)) == len(images)
    halves = sum(image < n // 2 for image in images)
    assert abs(halves - 2000) < 130  # four standard deviations
    rising = sum(b > a for a, b in pairwise(images))
    assert abs(rising - 2000) < 130


@FEW
@given(st.integers(0, 2**63), st.lists(st.integers(0, 9) | st.text("ab,'", max_size=3), max_size=3))
def test_a_sample_key_has_63_bits_and_tells_its_parts_apart(seed, parts):
    key = sample_key(seed, *parts)
    assert 0 <= key < 2**63
    assert key == sample_key(seed, *parts)
    assert key != sample_key(seed, *parts, 0)
    assert key != sample_key(seed + 1, *parts)
    assert sample_key(seed, 1) != sample_key(seed, "1")
    assert sample_key(seed, "a", "b") != sample_key(seed, "ab")


def test_keys_and_order_are_the_same_in_another_process():
    code = (
        "from biascare.data.mixture import Mixture, sample_key;"
        "m = Mixture([(7, 1.0), (5, 2.5)], [(3, None)], (2, 1), seed=4);"
        "print(sample_key(4, 'x', 9), [tuple(m.locate(p)) for p in range(40)])"
    )
    runs = [
        subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            check=True,
            env={"PYTHONHASHSEED": seed, "PYTHONPATH": "."},
        ).stdout
        for seed in ("1", "2")
    ]
    assert runs[0] == runs[1]
    mixture = Mixture([(7, 1.0), (5, 2.5)], [(3, None)], (2, 1), seed=4)
    here = f"{sample_key(4, 'x', 9)} {[tuple(mixture.locate(p)) for p in range(40)]}\n"
    assert runs[0] == here


@FEW
@given(COUNTS, COUNTS, st.integers(1, 4), st.integers(1, 4), st.integers(0, 10**12))
def test_every_aligned_micro_batch_has_the_composition_of_the_ratio(
    segmentation, language, first, second, batch
):
    mixture = Mixture(
        [(n, None) for n in segmentation], [(n, None) for n in language], (first, second), seed=1
    )
    start = batch * mixture.period
    tasks = [mixture.locate(p).task for p in range(start, start + mixture.period)]
    assert tasks.count("segmentation") * second == tasks.count("language") * first


def test_the_tasks_alternate_inside_a_micro_batch():
    mixture = Mixture([(5, None)], [(5, None)], (3, 3), seed=0)
    assert mixture.period == 2
    assert [mixture.locate(p).task[0] for p in range(6)] == ["s", "l", "s", "l", "s", "l"]


@FEW
@given(COUNTS)
def test_without_weights_one_block_is_one_epoch_of_every_source(sizes):
    mixture = language_only([(n, None) for n in sizes])
    items = [mixture.locate(p) for p in range(sum(sizes))]
    assert Counter((i.source, i.unit) for i in items) == {
        (source, unit): 1 for source, n in enumerate(sizes) for unit in range(n)
    }


@FEW
@given(st.integers(1, 30), st.integers(0, 100))
def test_each_unit_occurs_once_per_epoch_and_epochs_differ_in_order(num_units, seed):
    mixture = language_only([(num_units, 2.0), (9, 1.0)], seed)
    draws = [i.unit for i in map(mixture.locate, range(6 * num_units)) if i.source == 0]
    epochs = [draws[e * num_units : (e + 1) * num_units] for e in range(3)]
    assert all(sorted(epoch) == list(range(num_units)) for epoch in epochs)
    if num_units > 12:  # equal by chance once in 12! times
        assert epochs[0] != epochs[1] != epochs[2]


def test_shares_typed_as_decimals_are_exact():
    mixture = language_only([(100, 0.5), (100, 0.3), (100, 0.2)])
    drawn = Counter(mixture.locate(p).source for p in range(10))
    assert drawn == {0: 5, 1: 3, 2: 2}
    assert mixture.num_drawn(10**9) == {
        "segmentation": [],
        "language": [5 * 10**8, 3 * 10**8, 2 * 10**8],
    }


@settings(deadline=None, max_examples=8)
@given(st.lists(st.floats(0.01, 50), min_size=2, max_size=8))
def test_realised_shares_stay_close_to_the_weights_everywhere(weights):
    mixture = language_only([(1000, weight) for weight in weights])
    for position in (7, 100, 3001, 123_456, 2**20):
        drawn = mixture.num_drawn(position)["language"]
        for count, weight in zip(drawn, weights, strict=True):
            assert abs(count - position * weight / sum(weights)) < 2.5


@FEW
@given(st.lists(st.integers(1, 1000), min_size=1, max_size=9), st.integers(0, 5000))
def test_largest_remainder_is_within_one_of_the_quota(weights, total):
    shares = [Fraction(w, sum(weights)) for w in weights]
    counts = apportion(shares, total)
    assert sum(counts) == total
    assert all(abs(count - share * total) < 1 for count, share in zip(counts, shares, strict=True))


def test_largest_remainder_of_a_worked_example():
    # Quotas of 10 seats: 4.16, 3.38, 1.55, 0.91 -> 4, 3, 1, 0 and the rest to 0.91 and 0.55.
    shares = [Fraction(n, 1000) for n in (416, 338, 155, 91)]
    assert apportion(shares, 10) == [4, 3, 2, 1]


def test_a_rare_source_appears_at_regular_distances():
    sources = [(50_000, None), *[(200 + i, None) for i in range(20)], (40, None)]
    mixture = language_only(sources)
    total = sum(n for n, _ in sources)
    places = [p for p in range(total // 4) if mixture.locate(p).source == len(sources) - 1]
    distances = [b - a for a, b in pairwise([-total // 80, *places])]
    print(f"every {total / 40:.0f} items expected, found {min(distances)} to {max(distances)}")
    assert len(places) == 10 and max(distances) < 2 * total / 40


def test_the_rarest_source_of_a_long_mixture_is_never_starved():
    mixture = language_only([(3_440_000, None), (5, None)])
    assert mixture.num_drawn(MAX_BLOCK)["language"][1] >= 1


@FEW
@given(COUNTS, COUNTS, st.integers(1, 3), st.integers(1, 3), st.integers(0, 3000))
def test_num_drawn_counts_what_locate_gives(segmentation, language, first, second, position):
    mixture = Mixture(
        [(n, float(n)) for n in segmentation],
        [(n, None) for n in language],
        (first, second),
        seed=0,
    )
    counted = Counter((i.task, i.source) for i in map(mixture.locate, range(position)))
    for task, drawn in mixture.num_drawn(position).items():
        assert drawn == [counted[task, source] for source in range(len(drawn))]


def test_the_stream_does_not_depend_on_what_was_asked_before():
    arguments = ([(11, 1.0), (7, 3.0)], [(5, None)])
    straight = Mixture(*arguments, seed=2)
    expected = {p: straight.locate(p) for p in range(300)}
    shuffled = Mixture(*arguments, seed=2)
    positions = random.Random(0).sample(range(300), 300)
    assert {p: shuffled.locate(p) for p in positions} == expected
    assert Mixture(*arguments, seed=3).locate(5) != expected[5]


def test_a_far_position_costs_microseconds():
    mixture = Mixture([(3_440_000, None)], [(1793, 3.0), (19_654, 1.0)], seed=0)
    start = time.perf_counter()
    for position in range(10**9, 10**9 + 200):
        mixture.locate(position)
    each = (time.perf_counter() - start) / 200
    print(f"locate at 1e9: {each * 1e6:.0f} us")
    assert each < 1e-3


@pytest.mark.parametrize(
    ("segmentation", "language", "ratio", "message"),
    [
        ([(5, 1.0), (5, None)], [(5, None)], (1, 1), r"none for \[1\].*set every weight"),
        ([(5, None)], [], (1, 1), r"add a folder to data.language"),
        ([(5, None)], [(5, None)], (1, 0), r"remove the folders of data.language"),
        ([(0, None)], [(5, None)], (1, 1), r"data.segmentation\[0\]: got 0 units"),
        ([(5, -1.0)], [(5, None)], (1, 1), r"weight: got -1.0"),
        ([(5, float("nan"))], [(5, None)], (1, 1), r"weight: got nan"),
        ([(5, None)], [(5, None)], (0, 0), r"not both 0"),
        ([(5, 1.0), (5, 1e-9)], [(5, None)], (1, 1), r"\[1\]: got a share of 1.00e-09"),
    ],
)
def test_a_mixture_that_cannot_be_honoured_is_refused(segmentation, language, ratio, message):
    with pytest.raises(ValueError, match=message):
        Mixture(segmentation, language, ratio, seed=0)


def test_a_micro_batch_that_breaks_the_composition_is_refused_with_the_nearest_size():
    mixture = Mixture([(5, None)], [(5, None)], (2, 1), seed=0)
    mixture.check_micro_batch(6)
    with pytest.raises(ValueError, match=r"got 4, expected a multiple of 3 .* nearest is 3"):
        mixture.check_micro_batch(4)
    with pytest.raises(ValueError, match="position: got -1"):
        mixture.locate(-1)


@FEW
@given(st.integers(1, 4), st.integers(1, 4), st.integers(0, 50), st.integers(1, 3))
def test_a_step_has_the_same_micro_batches_for_any_number_of_ranks(micro, unit, start, steps):
    global_batch = micro * unit * 12
    expected = None
    for world_size in (1, 2, 3, 4, 6, 12):
        ranks = [
            list(GlobalBatchSampler(global_batch, micro, rank, world_size, start, steps))
            for rank in range(world_size)
        ]
        accumulation = global_batch // micro // world_size
        assert all(len(batches) == steps * accumulation for batches in ranks)
        for step in range(steps):
            mine = slice(step * accumulation, (step + 1) * accumulation)
            found = sorted(tuple(batch) for batches in ranks for batch in batches[mine])
            first = (start + step) * global_batch
            assert [p for batch in found for p in batch] == list(range(first, first + global_batch))
            assert all(len(batch) == micro for batch in found)
        steps_found = sorted(tuple(batch) for batches in ranks for batch in batches)
        expected = expected or steps_found
        assert steps_found == expected


def test_positions_of_a_rank_worked_by_hand():
    sampler = GlobalBatchSampler(8, 2, rank=1, world_size=2, start_step=3, num_steps=1)
    # Step 3 starts at 24; accumulation 0 gives rank 1 its second pair, accumulation 1 the fourth.
    assert list(sampler) == [[26, 27], [30, 31]]
    assert len(sampler) == 2 and sampler.accumulation == 2


def test_resuming_continues_with_the_next_micro_batch():
    whole = list(GlobalBatchSampler(12, 2, 1, 3, 0, 10))
    resumed = list(GlobalBatchSampler(12, 2, 1, 3, 4, 6))
    assert resumed == whole[-len(resumed) :]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((10, 4, 0, 1, 0, 1), "nearest is 8"),
        ((2, 4, 0, 1, 0, 1), "nearest is 4"),
        ((8, 0, 0, 1, 0, 1), "micro_batch >= 1"),
        ((8, 2, 2, 2, 0, 1), "rank=2"),
        ((8, 2, 0, 1, -1, 1), "start_step=-1"),
    ],
)
def test_impossible_batches_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        GlobalBatchSampler(*arguments)
