import pytest

from lom_server.costs import RunCost

MS = 1_000_000
S = 1000 * MS


def test_is_interpolated_between_sizes_and_extrapolated_above_them() -> None:
    cost = RunCost({1: 100, 2: 120, 4: 200, 8: 600})
    assert [cost.estimate_ns(rows, 0) for rows in (1, 2, 3, 4, 6, 8, 9, 16)] == [
        100,
        120,
        160,
        200,
        400,
        600,
        700,
        1400,
    ]


def test_one_size_extrapolates_in_proportion() -> None:
    cost = RunCost({4: 400})
    assert [cost.estimate_ns(rows, 0) for rows in (1, 4, 10)] == [100, 400, 1000]


def test_a_larger_batch_is_never_estimated_cheaper() -> None:
    cost = RunCost({4: 80, 1: 50, 2: 90})
    assert [cost.estimate_ns(rows, 0) for rows in (1, 2, 3, 4, 8)] == [50, 90, 90, 90, 90]


def test_without_measurements_nothing_is_known_or_learnt() -> None:
    cost = RunCost({})
    assert cost.estimate_ns(8, 0) == 0
    cost.observe(8, 10 * MS, 0)
    assert cost.estimate_ns(8, 0) == 0


def test_slow_first_runs_do_not_poison_it() -> None:
    cost = RunCost({1: 10 * MS})
    for run in range(7):
        cost.observe(1, 500 * MS, run * MS)
    assert cost.estimate_ns(1, 6 * MS) == 10 * MS


def test_a_slow_machine_is_believed_within_a_second_and_so_is_a_quick_one() -> None:
    cost, now_ns = RunCost({1: 10 * MS}), 0
    while cost.estimate_ns(1, now_ns) < 30 * MS:
        now_ns += 30 * MS
        cost.observe(1, 30 * MS, now_ns)
    assert now_ns == 8 * 30 * MS  # half of the runs that are remembered, and one
    slow_until_ns = now_ns
    while cost.estimate_ns(1, now_ns) > 10 * MS:
        now_ns += 10 * MS
        cost.observe(1, 10 * MS, now_ns)
    assert now_ns - slow_until_ns < S


def test_a_hiccup_is_not_believed() -> None:
    cost = RunCost({1: 10 * MS})
    for run in range(30):
        cost.observe(1, 90 * MS if run % 3 == 0 else 12 * MS, run * MS)
    assert cost.estimate_ns(1, 29 * MS) == 12 * MS


def test_the_slowdown_of_one_size_is_that_of_all() -> None:
    cost = RunCost({1: 100, 8: 800})
    for _ in range(8):
        cost.observe(1, 200, 0)
    assert cost.estimate_ns(8, 0) == 1600


def test_a_quicker_run_lowers_the_table_for_good() -> None:
    cost = RunCost({1: 100, 8: 800})  # measured while something else kept the machine busy
    cost.observe(8, 400, 0)
    assert (cost.estimate_ns(1, 0), cost.estimate_ns(8, 0)) == (50, 400)
    cost.observe(8, 800, 0)
    assert cost.estimate_ns(8, 0) == 400


def test_ever_quicker_runs_leave_the_quickest() -> None:
    cost, run_ns = RunCost({1: MS}), MS
    for _ in range(10):
        run_ns = run_ns * 9 // 10
        cost.observe(1, run_ns, 0)
    assert cost.estimate_ns(1, 0) == pytest.approx(run_ns, rel=0.01)


def test_belief_fades_to_a_quarter_of_the_table_where_nothing_runs() -> None:
    cost = RunCost({1: 100 * MS})
    for _ in range(8):
        cost.observe(1, 500 * MS, 0)
    faded = [cost.estimate_ns(1, seconds * S) / MS for seconds in range(7)]
    assert faded == pytest.approx([500, 405, 310, 215, 120, 25, 25])  # within five seconds: ten such runs


def test_memory_fades_with_belief() -> None:
    cost = RunCost({1: 100 * MS})
    for _ in range(15):
        cost.observe(1, 200 * MS, 0)
    cost.observe(1, 100 * MS, 1600 * MS)  # of two seconds: three slow runs are remembered, and this one
    assert cost.estimate_ns(1, 1600 * MS) == 200 * MS
    cost.observe(1, 100 * MS, 2100 * MS)  # of one second: two and two
    assert cost.estimate_ns(1, 2100 * MS) == 100 * MS


def test_short_runs_are_forgotten_within_a_second() -> None:
    cost = RunCost({1: 4 * MS})
    cost.observe(1, 4 * MS, 0)
    assert [cost.estimate_ns(1, ms * MS) for ms in (0, 500, 1000, 9000)] == [4 * MS, 2.5 * MS, 1 * MS, 1 * MS]


def test_a_fresh_table_is_believed_when_it_is_first_asked() -> None:
    cost = RunCost({1: 4 * MS})
    assert cost.estimate_ns(1, 5000 * S) == 4 * MS
    assert cost.estimate_ns(1, 5001 * S) == 1 * MS


@pytest.mark.parametrize("run_ns", [0, 1])
def test_a_clock_that_stands_still_breaks_nothing(run_ns: int) -> None:
    cost = RunCost({1: 100})
    for _ in range(3):
        cost.observe(1, run_ns, 0)
    assert cost.estimate_ns(1, 0) == 1
    for _ in range(8):
        cost.observe(1, 100, 0)
    assert cost.estimate_ns(1, 0) == 100
