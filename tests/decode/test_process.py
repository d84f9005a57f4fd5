"""What native passes do to the process: its threads, its memory, its children, its idle time."""

from __future__ import annotations

import gc
import multiprocessing
import os
import threading
import time
from pathlib import Path

import psutil
import pytest
import torch
from tiny import random_ids, tiny_model
from transformers import DynamicCache

from lissom.decode import NativeDecode, generate_tokens
from lissom.kernels import native

pytestmark = pytest.mark.skipif(native.library() is None, reason="no native kernels")
MEGABYTE = 1 << 20


@pytest.fixture(autouse=True)
def without_gradients():
    with torch.no_grad():
        yield


@pytest.fixture
def threads():
    """Sets the number of threads for one test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def spoken(model, ids, tokens=6):
    return [int(token) for token in generate_tokens(model, ids, max_new_tokens=tokens, stop=[])]


def runtimes() -> dict[int, int]:
    """Nanoseconds that each thread of this process has run."""
    files = Path("/proc/self/task").glob("*/schedstat")
    return {int(file.parent.name): int(file.read_text().split()[0]) for file in files}


@pytest.mark.skipif(not Path("/proc/self/schedstat").exists(), reason="needs Linux")
@pytest.mark.parametrize("number", [1, 2, 4])
def test_as_many_threads_work_as_pytorch_has(number, threads):
    """Others, of earlier tests with more threads, only look up for a moment when they are woken."""
    model, ids = tiny_model("llama"), random_ids(400)
    with NativeDecode()(model):
        threads(5)  # the pool is as large as it will be
        model(ids)
        threads(number)
        # What PyTorch itself computes is of one thread here: the rows are few.
        time.sleep(0.05)
        before = runtimes()
        for _ in range(40):
            model(ids, logits_to_keep=1)
        after = runtimes()
    ran = sorted((after[thread] - before.get(thread, 0) for thread in after), reverse=True)
    busy = [nanoseconds for nanoseconds in ran if nanoseconds > 0.2 * ran[0]]
    # On a machine with fewer cores not all of them get to work.
    assert min(number, 2, os.cpu_count() or 1) <= len(busy) <= number


def test_an_idle_process_uses_no_cpu(threads):
    threads(4)
    model = tiny_model("llama")
    with NativeDecode()(model):
        spoken(model, random_ids(40), 20)
        time.sleep(0.2)
        before = time.process_time()
        time.sleep(1)
        used = time.process_time() - before
    assert used < 0.05


def test_a_thousand_answers_leave_nothing_behind():
    """Also when every tenth has a block of its own, and every third is broken off."""
    model, ids = tiny_model("llama"), [random_ids(8 + number, seed=number) for number in range(10)]

    def answers(count):
        for number in range(count):
            prompt = ids[number % 10]
            if number % 10 == 0:
                with NativeDecode(weights="int4" if number % 20 else "native")(model):
                    spoken(model, prompt, 3)
                continue
            stream = generate_tokens(model, prompt, max_new_tokens=4, stop=[])
            next(stream)
            if number % 3:
                list(stream)

    with NativeDecode(kv="int8")(model):
        answers(300)
        gc.collect()
        alive, memory = len(gc.get_objects()), psutil.Process().memory_info().rss
        answers(1000)
        gc.collect()
        assert psutil.Process().memory_info().rss - memory < 6 * MEGABYTE
        assert len(gc.get_objects()) - alive < 200


def test_the_storage_of_a_cache_goes_with_it():
    model, ids = tiny_model("llama"), random_ids(500)
    with NativeDecode(kv="fp32")(model):
        model(ids)
        before = psutil.Process().memory_info().rss
        for _ in range(60):
            model(ids.repeat(8, 1), past_key_values=DynamicCache(config=model.config), logits_to_keep=1)
        gc.collect()
        one = 8 * 500 * 2 * 3 * 2 * 16 * 4  # rows, tokens, KV heads, layers, keys and values, head_dim, bytes
        assert psutil.Process().memory_info().rss - before < 10 * one


def child(model, ids, wanted, connection):
    try:
        connection.send(all(spoken(model, ids) == wanted for _ in range(5)))
    except BaseException as error:
        connection.send(repr(error))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize("busy", [False, True])
def test_forked_children_generate(busy, threads):
    """Also where a thread of the parent is in a pass at the moment of the fork."""
    threads(2)
    model, ids, over = tiny_model("llama"), random_ids(20), threading.Event()

    def work():
        with torch.no_grad():
            while not over.is_set():
                model(random_ids(300), logits_to_keep=1)

    with NativeDecode()(model):
        wanted = spoken(model, ids)
        worker = threading.Thread(target=work)
        if busy:
            worker.start()
        try:
            context = multiprocessing.get_context("fork")
            for _ in range(3):
                ours, theirs = context.Pipe()
                process = context.Process(target=child, args=(model, ids, wanted, theirs))
                process.start()
                said = ours.recv() if ours.poll(60) else "nothing"
                process.kill() if said == "nothing" else process.join()
                assert said is True
                assert spoken(model, ids) == wanted
        finally:
            over.set()
            if busy:
                worker.join()
