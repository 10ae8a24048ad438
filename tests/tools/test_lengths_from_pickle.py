"""The authors' pickle becomes a CSV, and a pickle that would run code is refused in one line."""

import os
import pickle

import lengths_from_pickle
import numpy as np
import pytest

from vllm_sim.workload.data_sets import read_lengths


class Runs:
    """Makes a file when it is loaded by pickle itself."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_lengths_come_out_in_order(tmp_path, capfd):
    pairs = [(3, 4), (200, 47), [5, 10**7]]
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        (tmp_path / "a.pkl").write_bytes(pickle.dumps(pairs, protocol))
        args = ["--pickle", str(tmp_path / "a.pkl"), "--csv", str(tmp_path / "a.csv")]
        assert lengths_from_pickle.main(args) == 0 and capfd.readouterr() == ("", "")
        found = read_lengths(tmp_path / "a.csv")
        assert np.array(found).T.tolist() == [[*pair] for pair in pairs]


@pytest.mark.parametrize("protocol", [0, 2, pickle.HIGHEST_PROTOCOL])
def test_a_pickle_that_would_run_code_is_refused_and_nothing_runs(tmp_path, refused, protocol):
    trap, pkl, out = (tmp_path / name for name in ("trap", "a.pkl", "a.csv"))
    pkl.write_bytes(pickle.dumps([(1, 2), Runs(trap)], protocol))
    reason = refused(lengths_from_pickle, "--pickle", pkl, "--csv", out)
    assert "open', which could run code: nothing was run" in reason
    assert not trap.exists() and not out.exists()
    pickle.loads(pkl.read_bytes())[1].close()
    assert trap.exists()  # as it would have


@pytest.mark.parametrize(
    ("data", "told"),
    [
        (b"", "cannot be read as a pickle of lengths: "),
        (b"not a pickle\n\xff", "cannot be read as a pickle of lengths: "),
        (pickle.dumps([(1, 2)] * 9)[:-4], "cannot be read as a pickle of lengths: "),
        (b"\x80\x04r\xff\xff\xff\xff.", "cannot be read as a pickle of lengths: "),
        *(
            (pickle.dumps(found), "of its list is not a pair of integers from 1 to 10,000,000")
            for found in ([], {1: 2}, [(1, 2), (1,)], [(1, 2.0)], [(True, 2)], [(0, 2)], ["ab"], 7)
        ),
    ],
)
def test_what_is_no_list_of_pairs_takes_one_line(tmp_path, refused, data, told):
    (tmp_path / "a.pkl").write_bytes(data)
    args = ("--pickle", tmp_path / "a.pkl", "--csv", tmp_path / "a.csv")
    assert told in refused(lengths_from_pickle, *args) and not (tmp_path / "a.csv").exists()
    os.truncate(tmp_path / "a.pkl", 2**26 + 1)
    assert ": larger than 64 MiB" in refused(lengths_from_pickle, *args)
