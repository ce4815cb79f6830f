"""Parts of a data set."""

import numpy as np
import pytest

from kd_jax import data


def test_classes_and_fraction():
  labels = np.arange(1000) % 10
  everything = data.transfer_set(labels)
  np.testing.assert_array_equal(everything, np.arange(1000))
  no3 = data.transfer_set(labels, classes=(0, 1, 2, 4, 5, 6, 7, 8, 9))
  assert len(no3) == 900 and 3 not in labels[no3]
  some = data.transfer_set(labels, fraction=0.03, seed=1)
  assert len(some) == len(set(some)) == 30
  assert (np.diff(some) > 0).all()
  again = data.transfer_set(labels, fraction=0.03, seed=1)
  np.testing.assert_array_equal(some, again)
  other = data.transfer_set(labels, fraction=0.03, seed=2)
  assert set(some) != set(other)
  both = data.transfer_set(labels, classes=(7,), fraction=0.5, seed=1)
  half = data.transfer_set(labels, fraction=0.5, seed=1)
  np.testing.assert_array_equal(both, half[labels[half] == 7])
  assert 20 < len(both) < 80


@pytest.mark.parametrize("fraction", [0, -0.1, 1.1])
def test_a_fraction_out_of_range(fraction):
  with pytest.raises(ValueError, match="fraction is"):
    data.transfer_set(np.zeros(3), fraction=fraction)
