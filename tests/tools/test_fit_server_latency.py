"""The search for constants: it finds a valley's floor on the grid, and stays within bounds."""

import pytest
from fit_server_latency import GRID, MOST, search


def test_the_floor_of_a_valley_is_found_on_the_grid():
    floor = {"flops": 0.87, "tail": 1.35}

    def error(at):
        return sum(((at[name] - floor[name]) / GRID[name]) ** 2 for name in floor)

    assert search({"flops": 0.7, "tail": 0.5}, error) == pytest.approx(floor)


def test_a_share_stays_below_its_most_and_above_nothing():
    most = {"bandwidth": MOST["bandwidth"]}
    assert search({"bandwidth": 0.9}, lambda at: -at["bandwidth"]) == most
    assert search({"tail": 0.3}, lambda at: at["tail"]) == {"tail": GRID["tail"]}
