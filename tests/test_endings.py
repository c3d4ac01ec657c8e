"""How processes and files end: killed groups and workers, SIGTERM, files cut or thrown away beneath a reader."""

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from faulty_disk import BEFORE, assert_whole, begin, committed
from recording import Recorder, check_transitions, schema
from test_processes import PRELUDE, started

from replaystore import ReplayStore
from replaystore.dataset import ReplayDataset
from replaystore.errors import CorruptionError, StoreGone
from replaystore.files import chunk_path
from replaystore.verify import verify

pytestmark = pytest.mark.usefixtures("_no_syncs")


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return begin(tmp_path_factory.mktemp("endings") / "store")


RECORD_ON_A_STREAM = """
sys.path.insert(0, sys.argv[2])
from recording import Recorder
import time
replaystore.writer.COMMIT_SECONDS = 0.05
store = ReplayStore.open(path, "a")
recorder = Recorder(store)
for _ in range(100_000):
    recorder.step(5)
    store.flush()
    say([store._writer.number, recorder.count])
    time.sleep(0.005)
"""


def lines_of(writer: subprocess.Popen, count: int) -> list[list[int]]:
    return [[int(n) for n in writer.stdout.readline().strip("[]\n").split(",")] for _ in range(count)]


def test_of_three_writers_one_is_killed_and_the_others_go_on_within_a_second(tmp_path):
    ReplayStore.create(tmp_path / "store", schema()).close()
    writers = [started(RECORD_ON_A_STREAM, tmp_path / "store", Path(__file__).parent) for _ in range(3)]
    try:
        told = {writer: lines_of(writer, 3)[-1] for writer in writers}
        assert sorted(stream for stream, _ in told.values()) == [0, 1, 2]
        writers[1].kill()
        for writer in (writers[0], writers[2]):
            start = time.monotonic()
            told[writer] = lines_of(writer, 20)[-1]
            assert time.monotonic() - start < 20, "20 flushes of 5 steps took longer than a second each"
    finally:
        for writer in writers:
            writer.kill()
            writer.communicate()
    with ReplayStore.open(tmp_path / "store") as store:
        numbers = check_transitions(store)
        for stream, count in told.values():
            assert numbers.count(count - 1) >= 1, (stream, count)
    assert list(verify(tmp_path / "store")) == []


GROUP = """
import subprocess
code = sys.stdin.read()
children = [subprocess.Popen([sys.executable, "-c", code, *sys.argv[1:]], stdout=subprocess.PIPE) for _ in range(2)]
for child in children:
    child.stdout.readline()
say("both recorded")
time.sleep(60)
"""


def test_a_process_group_that_is_killed_leaves_every_flushed_row(tmp_path):
    ReplayStore.create(tmp_path / "store", schema()).close()
    command = [
        sys.executable,
        "-c",
        PRELUDE + "import time" + GROUP,
        tmp_path / "store",
        Path(__file__).parent,
    ]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, start_new_session=True, text=True, **pipes) as group:
        group.stdin.write(PRELUDE + RECORD_ON_A_STREAM)
        group.stdin.close()
        group.stdout.readline()
        os.killpg(group.pid, signal.SIGKILL)
    with ReplayStore.open(tmp_path / "store", "a") as store:
        assert sorted(set(check_transitions(store)))[:5] == [0, 1, 2, 3, 4]
        assert set(store.episodes["stream"].to_pylist()) == {0, 1}
        Recorder(store, start=7).step(7)
    assert list(verify(tmp_path / "store")) == []


STOPPED = """
import signal
sys.path.insert(0, sys.argv[2])
from recording import Recorder
def stop(*_):
    raise SystemExit(5)
signal.signal(signal.SIGTERM, stop)
replaystore.writer.COMMIT_SECONDS = 0.001
with ReplayStore.open(path, "a") as store:
    recorder = Recorder(store, start=len(store))
    say(recorder.count)
    while True:
        recorder.step()
"""


@pytest.mark.parametrize("seconds", [0.0, 0.013, 0.05, 0.1])
def test_sigterm_in_the_middle_of_commits_ends_the_program_and_keeps_its_rows(begun, tmp_path, seconds):
    path = shutil.copytree(begun, tmp_path / "store")
    child = started(STOPPED, path, Path(__file__).parent)
    assert int(child.stdout.readline()) == BEFORE
    time.sleep(seconds)
    child.terminate()
    _, errors = child.communicate(timeout=30)
    assert child.returncode == 5, errors
    assert not list(path.rglob("*.partial"))
    count = committed(path)
    assert count >= BEFORE
    assert_whole(path, count)


CUT = """
with ReplayStore.open(path) as store:
    store.sample(8)
    say("mapped")
    sys.stdin.readline()
    try:
        for _ in range(200):
            store.sample(8)
    except CorruptionError as error:
        say(str(error))
"""


@pytest.mark.parametrize("field", ["reward", "observation"])
def test_a_file_that_another_cuts_while_it_is_mapped_never_gives_data(begun, tmp_path, field):
    """The kernel ends the process with a bus error, as `docs/durability.md` says, or it is an error."""
    path = shutil.copytree(begun, tmp_path / "store")
    file = chunk_path(path / "streams/000000" / field, 0, 2 + 2 * (field == "observation"))
    child = started(CUT, path)
    assert child.stdout.readline() == '"mapped"\n'
    os.truncate(file, 0)
    output, _ = child.communicate("\n", timeout=30)
    assert child.returncode == -signal.SIGBUS or file.name in output
    with pytest.raises(CorruptionError, match=str(file)):
        ReplayStore.open(path).check()


def test_refreshing_a_store_that_was_deleted_says_that_it_is_gone(begun, tmp_path):
    path = shutil.copytree(begun, tmp_path / "store")
    with ReplayStore.open(path) as store:
        shutil.rmtree(path)
        with pytest.raises(StoreGone, match=str(path)):
            store.refresh()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # torch's, of its dead worker
@pytest.mark.parametrize("context", ["fork", "spawn", "forkserver"])
def test_a_loaders_worker_that_is_killed_is_an_error_and_the_next_pass_works(context, tmp_path):
    with ReplayStore.create(tmp_path / "store", schema()) as store:
        Recorder(store).bulk(5000)
    dataset = ReplayDataset(tmp_path / "store")
    dataset.store.sample(4)
    loader = dataset.loader(256, num_workers=1, multiprocessing_context=context, seed=0)
    batches = iter(loader)

    def kill_while_reading():
        for _ in batches:
            torch.multiprocessing.active_children()[-1].kill()

    with pytest.raises((RuntimeError, OSError, EOFError)):  # as torch has it, at whichever moment
        kill_while_reading()
    seen = torch.cat([batch["ids"] for batch in loader])
    assert seen.unique().numel() == len(dataset) == len(seen)


def test_threads_that_sample_while_others_fork_neither_hang_nor_read_wrong_rows(begun):
    with ReplayStore.open(begun) as store:
        wrong, stop = [], threading.Event()

        def sample():
            while not stop.is_set():
                batch = store.sample(16)
                wrong.extend(batch.action[batch.reward != batch.action / 2].tolist())

        threads = [threading.Thread(target=sample) for _ in range(2)]
        for thread in threads:
            thread.start()
        try:
            for _ in range(20):
                child = os.fork()
                if child == 0:
                    os._exit(0 if (store.sample(4).reward >= 0).all() else 1)
                assert os.waitpid(child, 0)[1] == 0
        finally:
            stop.set()
            for thread in threads:
                thread.join()
    assert wrong == []
