"""SIGKILL at random moments; `tools/crash.py` does the same a thousand times."""

import random

import killing


def test_acknowledged_rows_survive_kills_of_their_writers_on_one_store(tmp_path):
    tallies = killing.kill_again_and_again(tmp_path, 50, random.Random(0), deep_every=10)
    for moment, tally in tallies.items():
        assert (tally.lost, tally.failed) == (0, 0), moment
    assert sum(tally.acknowledged for tally in tallies.values()) > 500
    assert tallies["all closed at the end"].leftovers <= 8, "what kills leave must not grow"
