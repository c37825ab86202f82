"""Durations with units."""

import pytest

from dlcourse.contracts import InputError
from dlcourse.training import durations


@pytest.mark.parametrize(("text", "steps"), [
    ("1epoch", 5), ("10epochs", 43), ("0.5epochs", 3), ("2000steps", 2000), ("50examples", 2), ("0steps", 0),
    ("5minutes", None), ("0.1epochs", 1)])
def test_steps_cover_the_duration(text, steps):
    assert durations.parse(text).steps(batch_size=32, num_examples=137) == steps


def test_rounding_errors_add_no_step():
    assert durations.parse("0.1epochs").steps(batch_size=3, num_examples=90) == 3


@pytest.mark.parametrize(
    "text", ["", "10", "epochs", "ten epochs", "-1epochs", "1.5steps", "1e3steps", "3hours", "infepochs"])
def test_a_mistake_names_the_flag(text):
    with pytest.raises(InputError, match=f"--train_for={text}: "):
        durations.parse(text, "train_for")
