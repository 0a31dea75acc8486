"""How the steps of a round are shared: the sum is kept, nobody gets none, a faster site never fewer."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from fedserver.rounds.sharing import FASTEST, MOST, SLOWEST, Training, shares, usual

SPEEDS = st.dictionaries(
    st.text("abcdefgh", min_size=1, max_size=3),
    st.one_of(st.none(), st.floats(SLOWEST, FASTEST)),
    min_size=1,
    max_size=12,
)
MEANS = st.integers(1, 5000)


@given(SPEEDS, MEANS)
def test_the_sum_is_kept_and_everybody_gets_at_least_one_and_not_too_many(
    speeds: dict[str, float | None], mean: int
) -> None:
    given_steps = shares(speeds, mean)
    assert given_steps.keys() == speeds.keys()
    assert sum(given_steps.values()) == mean * len(speeds)
    assert all(1 <= n <= MOST * mean for n in given_steps.values())


@given(SPEEDS, MEANS)
def test_a_faster_site_never_gets_fewer_and_one_that_was_not_measured_gets_the_mean(
    speeds: dict[str, float | None], mean: int
) -> None:
    given_steps = shares(speeds, mean)
    known = {name: speed for name, speed in speeds.items() if speed is not None}
    for name, speed in known.items():
        assert all(given_steps[name] >= given_steps[other] for other, slower in known.items() if slower < speed)
    assert all(given_steps[name] == mean for name in speeds.keys() - known.keys())


@given(
    st.dictionaries(st.text("abcdefgh", min_size=1, max_size=3), st.floats(1e-3, 1e3), min_size=1, max_size=9), MEANS
)
def test_no_step_given_to_another_site_would_end_the_round_sooner(speeds: dict[str, float], mean: int) -> None:
    given_steps = shares(dict(speeds), mean)
    last = max(speeds, key=lambda name: given_steps[name] / speeds[name])
    if given_steps[last] > 1:
        for name, steps in given_steps.items():
            after = (steps + 1) / speeds[name]
            assert name == last or steps == MOST * mean or after >= given_steps[last] / speeds[last] * (1 - 1e-9)


@given(SPEEDS, MEANS)
def test_it_does_not_depend_on_the_order_in_which_sites_are_named(speeds: dict[str, float | None], mean: int) -> None:
    assert shares(dict(reversed(speeds.items())), mean) == shares(speeds, mean)


@given(st.integers(0, 1 << 53), st.integers(0, 1 << 53), st.floats(0, allow_infinity=False))
def test_whatever_a_site_says_of_itself_a_round_can_be_shared(steps: int, examples: int, seconds: float) -> None:
    said = Training.of(1, steps, examples, seconds)
    if said is not None:
        assert SLOWEST <= said.steps_per_second <= FASTEST
        assert 0 <= said.examples_per_second <= FASTEST
        given_steps = shares({"odd": said.steps_per_second, "even": 2.0}, 100)
        assert sum(given_steps.values()) == 200
        assert min(given_steps.values()) >= 1
    else:
        assert not steps or not seconds


def test_an_example_by_hand() -> None:
    assert shares({"fast": 4.0, "mid": 2.0, "slow": 1.0}, 7) == {"fast": 12, "mid": 6, "slow": 3}
    assert shares({"fast": 1e9, "slow": 1.0, "new": None}, 20) == {"fast": 39, "slow": 1, "new": 20}


def test_the_usual_speed_is_the_median_and_of_this_run_if_it_was_measured_there() -> None:
    assert usual([]) is None
    past = [Training(1, 9.0, 0.0), Training(2, 4.0, 40.0), Training(2, 5.0, 0.0), Training(2, 100.0, 60.0)]
    here = usual(past, 2)
    assert here is not None
    assert (here.steps_per_second, here.examples_per_second) == (5.0, 50.0)
    elsewhere = usual(past, 3)
    assert elsewhere is not None
    assert elsewhere.steps_per_second == 7.0
