import numpy as np

from megatron_atum.data.rng import Random


def test_same_purpose_same_numbers():
    assert Random(1, "crop", 5, 0).uniform() == Random(1, "crop", 5, 0).uniform()


def test_neighbouring_purposes_differ():
    purposes = [(1, "crop", 5, 0), (1, "crop", 5, 1), (1, "crop", 50), (1, "order", 5, 0), (2, "crop", 5, 0)]
    assert len({Random(*purpose).uniform() for purpose in purposes}) == len(purposes)


def test_known_values_do_not_change_between_releases():
    assert Random(42, "order", "web", 0).permutation(6).tolist() == [0, 5, 2, 4, 1, 3]


def test_ranges():
    random = Random(0, "test")
    assert all(2.0 <= random.uniform(2.0, 3.0) < 3.0 for _ in range(100))
    assert {random.integer(3) for _ in range(100)} == {0, 1, 2}
    assert np.array_equal(np.sort(random.permutation(50)), np.arange(50))
