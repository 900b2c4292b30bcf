import numpy as np

from megatron_atum.data.rng import Random


def test_same_purpose_same_numbers() -> None:
    assert Random(1, "crop", 5, 0).uniform() == Random(1, "crop", 5, 0).uniform()


def test_neighbouring_purposes_differ() -> None:
    purposes = [(1, "crop", 5, 0), (1, "crop", 5, 1), (1, "crop", 50), (1, "order", 5, 0), (2, "crop", 5, 0)]
    assert len({Random(*purpose).uniform() for purpose in purposes}) == len(purposes)


def test_large_numbers_keep_their_purposes_apart() -> None:
    purposes = [(seed, "crop", pack) for seed in (0, 2**64, 2**128) for pack in (0, 2**64, 2**128)]
    assert len({Random(*purpose).uniform() for purpose in purposes}) == len(purposes)


def test_known_values_do_not_change_between_releases() -> None:
    assert Random(42, "order", "web", 0).permutation(6).tolist() == [0, 5, 2, 4, 1, 3]
    assert Random(42, "pieces", "web", 0).uniform() == 0.41757843777695836


def test_ranges() -> None:
    random = Random(0, "test")
    assert all(2.0 <= random.uniform(2.0, 3.0) < 3.0 for _ in range(100))
    assert {random.integer(3) for _ in range(100)} == {0, 1, 2}
    assert np.array_equal(np.sort(random.permutation(50)), np.arange(50))


def test_many_at_once_are_the_same_numbers() -> None:
    one = Random(3, "pieces")
    numbers = Random(3, "pieces").uniforms(20)
    assert numbers.dtype == np.float64 and numbers.tolist() == [one.uniform() for _ in range(20)]
    assert Random(3, "pieces").uniforms(0).shape == (0,)


def test_uniform_numbers_are_uniform() -> None:
    numbers = Random(4, "test").uniforms(20_000)
    counts = np.histogram(numbers, 20, (0.0, 1.0))[0]
    assert ((counts - 1000) ** 2 / 1000).sum() < 43.8  # chi-square, 19 degrees of freedom, 0.1 %
