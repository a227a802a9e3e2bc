"""The thread pool of the native kernels, compiled on its own: every chunk runs once, whoever calls, whenever."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from quantspec.errors import Unavailable
from quantspec.kernels.cpu import build, library

TASKS = Path("/proc/self/task")


def compile_pool(cache: Path) -> Path:
    sources = cache / "src"
    sources.mkdir()
    shutil.copy(build.SOURCES / "pool.h", sources)
    (sources / "quantspec_cpu.cpp").write_text('#include "pool.h"\n')
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "SOURCES", sources)
        return build.build("portable", cache=cache).path


@pytest.fixture(scope="module")
def pool_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    try:
        build.find_compiler()
    except Unavailable as error:
        pytest.skip(str(error))
    return compile_pool(tmp_path_factory.mktemp("pool"))


@pytest.fixture
def pool(pool_path: Path) -> ctypes.CDLL:
    return library.open_library(pool_path)


def run(pool: ctypes.CDLL, chunks: int, inner: int = 1, spins: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """How often each of ``[chunks, inner]`` nested chunks ran, and a number for the thread that ran each chunk."""
    counts, workers = np.zeros((chunks, inner), np.int32), np.zeros(chunks, np.int64)
    test = library.bind("qs_pool_test", None, [ctypes.c_int] * 3 + [ctypes.c_void_p] * 2, pool)
    test(chunks, inner, spins, counts.ctypes.data, workers.ctypes.data)
    return counts, workers


def in_threads(count: int, work: Callable[[int], None]) -> None:
    """Run ``work(index)`` in Python threads that start together, and raise what any of them raised."""
    gate, errors = threading.Barrier(count), []

    def body(index: int) -> None:
        try:
            gate.wait()
            work(index)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=body, args=(index,)) for index in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


@pytest.mark.parametrize("threads", [1, 2, 3, 7])
def test_every_chunk_runs_once(pool: ctypes.CDLL, threads: int) -> None:
    pool.qs_set_threads(threads)
    assert pool.qs_threads() == threads
    for chunks in (0, 1, 2, 3, 5, 17, 64, 1000):
        counts, workers = run(pool, chunks, spins=50)
        assert (counts == 1).all()
        assert len(set(workers)) <= threads


def test_without_a_wish_there_is_a_thread_per_core_that_we_may_use(pool: ctypes.CDLL) -> None:
    pool.qs_set_threads(0)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    assert pool.qs_threads() == cores


def test_workers_take_part(pool: ctypes.CDLL) -> None:
    pool.qs_set_threads(2)
    # About 1 ms of work in 100 chunks: in 200 runs even a crowded machine lets the second thread claim one.
    assert max(len(set(run(pool, 100, spins=500)[1])) for _ in range(200)) == 2


def test_few_chunks_after_the_workers_fell_asleep(pool: ctypes.CDLL) -> None:
    pool.qs_set_threads(3)
    run(pool, 8)
    for _ in range(50):
        threading.Event().wait(0.002)  # far over the time that they spin
        assert (run(pool, 2, spins=200)[0] == 1).all()


@pytest.mark.parametrize("threads", [1, 3])
def test_a_chunk_without_memory(pool: ctypes.CDLL, threads: int) -> None:
    """Whichever thread runs it, the call says so, and the pool is as good as before."""
    pool.qs_set_threads(threads)
    for failing in range(64):
        assert pool.qs_failure_test(64, failing) == 1
        assert pool.qs_failure_test(64, 64) == 0
        assert (run(pool, 8)[0] == 1).all()


def test_nested_calls_run(pool: ctypes.CDLL) -> None:
    pool.qs_set_threads(3)
    for _ in range(50):
        assert (run(pool, 20, inner=30, spins=5)[0] == 1).all()


def test_calls_from_four_python_threads_at_once(pool: ctypes.CDLL) -> None:
    """Three of them always find the pool busy. ctypes lets go of the GIL, so that the calls really overlap."""
    pool.qs_set_threads(2)

    def work(index: int) -> None:
        for round_ in range(300):
            assert (run(pool, 1 + (round_ * 7 + index) % 40, inner=2, spins=20)[0] == 1).all()

    in_threads(4, work)


def test_the_number_of_threads_may_change_while_jobs_run(pool: ctypes.CDLL) -> None:
    def work(index: int) -> None:
        for round_ in range(200):
            if index == 0:
                pool.qs_set_threads(1 + round_ % 5)
            assert (run(pool, 25, inner=2, spins=20)[0] == 1).all()

    in_threads(3, work)


@pytest.mark.skipif(not TASKS.exists(), reason="needs /proc")
def test_workers_of_a_replaced_pool_leave(pool: ctypes.CDLL) -> None:
    pool.qs_set_threads(2)
    run(pool, 10)
    before = len(list(TASKS.iterdir()))
    for threads in (9, 5, 2, 6, 2):
        pool.qs_set_threads(threads)
        run(pool, 10)
    for _ in range(500):  # they leave on their own time
        if (now := len(list(TASKS.iterdir()))) <= before:
            break
        threading.Event().wait(0.01)
    assert now <= before


FORK = """
import ctypes, os, sys, threading
import numpy as np
pool = ctypes.CDLL(sys.argv[1])
pool.qs_set_threads(3)
def run():
    counts, workers = np.zeros(50, np.int32), np.zeros(50, np.int64)
    pool.qs_pool_test(50, 1, 300, ctypes.c_void_p(counts.ctypes.data), ctypes.c_void_p(workers.ctypes.data))
    assert (counts == 1).all()
    return len(set(workers))
run()
stop = threading.Event()
def keep_busy():
    while not stop.is_set():
        run()
busy = threading.Thread(target=keep_busy)  # so that children are forked in the middle of a job
busy.start()
for _ in range(10):
    child = os.fork()
    if child == 0:
        os._exit(0 if any(run() > 1 for _ in range(500)) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
stop.set()
busy.join()
run()
print("done")
"""


def test_a_forked_child_makes_its_own_pool(pool_path: Path) -> None:
    """The child has none of the parent's workers. The script also ends while its own workers spin."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", FORK, str(pool_path)], capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="needs a processor affinity")
def test_one_core_means_one_thread(pool_path: Path) -> None:
    script = "import ctypes, os, sys; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})"
    script += "; print(ctypes.CDLL(sys.argv[1]).qs_threads())"
    done = subprocess.run([sys.executable, "-c", script, str(pool_path)], capture_output=True, text=True, timeout=60)
    assert done.stdout == "1\n", done.stderr
