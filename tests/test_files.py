"""Calls to the operating system that others' calls may come between."""

import os
import threading

import numpy as np

from replaystore.files import map_whole


def test_file_that_is_replaced_meanwhile_is_mapped_as_it_was_or_as_it_is(tmp_path):
    path, done = tmp_path / "shard", threading.Event()
    path.write_bytes(b"a" * 9000)

    def replace():
        for number in range(10**6):
            if done.is_set():
                return
            part = tmp_path / "shard.partial"
            part.write_bytes(b"a" * 9000 if number % 2 else b"b" * 100)
            os.replace(part, path)

    thread = threading.Thread(target=replace)
    thread.start()
    try:
        found = [map_whole(path) for _ in range(3000)]
    finally:
        done.set()
        thread.join()
    assert {(len(data), *np.unique(data).tolist()) for data in found} == {(9000, 97), (100, 98)}


def test_empty_file_is_mapped_as_no_bytes(tmp_path):
    (tmp_path / "empty").touch()
    assert map_whole(tmp_path / "empty").shape == (0,)
