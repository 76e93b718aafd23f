"""Time and peak memory of a call, measured so that two implementations can be compared on one machine.

    time_interleaved({"eager": eager_step, "fused": fused_step})   # {"eager": seconds, "fused": seconds}
    peak_memory(step)                                              # bytes on top of what was in use before
    isolated(function, *args)                                      # function(*args) in a fresh process

On a CPU the operating system records the peak of a process, not of a call, and the allocator keeps freed memory. So
measure memory there as the first large call of a fresh process, which `isolated` starts.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import math
import multiprocessing
import signal
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch


def time_interleaved(
    calls: Mapping[str, Callable[[], Any]], rounds: int = 5, warmup: int = 1, **options: Any
) -> dict[str, float]:
    """Returns the median seconds of each call; options are those of `samples_interleaved`.

    Every round runs every call once, and each round starts with another call. A machine that slows down or heats up
    therefore does so for all calls.
    """
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for name, taken in samples_interleaved(calls, rounds, warmup, **options):
        samples[name].append(taken)
    return {name: statistics.median(taken) for name, taken in samples.items()}


def samples_interleaved(
    calls: Mapping[str, Callable[[], Any]],
    rounds: int = 5,
    warmup: int = 1,
    *,
    repeats: Mapping[str, int] | None = None,
    limit: float = math.inf,
    starting: Callable[[str], None] | None = None,
    failed: Callable[[str, Exception], None] | None = None,
) -> Iterator[tuple[str, float]]:
    """Yields (name, seconds) after each call, so that an interrupted race keeps its samples.

    Args:
        repeats: the number of calls in a row whose mean is one sample (default 1), for calls too short for a clock.
        limit: seconds after which a call gets no more samples; it gets at least one. Slow calls run fewer rounds.
        starting: called with the name before each call.
        failed: called with the name and the exception of a call that raises; that call gets no more rounds. Without
            `failed` the exception ends the race.
    """
    names, spent, gone = list(calls), dict.fromkeys(calls, 0.0), set()
    repeats = repeats or {}
    for number in range(-warmup, rounds):
        for i in range(len(names)):
            name = names[(max(number, 0) + i) % len(names)]
            if name in gone or spent[name] > limit:
                continue
            if starting is not None:
                starting(name)
            try:
                _make_room(calls[name])
                taken = seconds(calls[name], repeats.get(name, 1))
            except Exception as error:
                if failed is None:
                    raise
                gone.add(name)
                failed(name, error)
                continue
            if number >= 0:
                spent[name] += taken * repeats.get(name, 1)
                yield name, taken


def peak_memory(call: Callable[[], Any], device: str | torch.device = "cpu") -> int:
    """Returns the bytes by which `call()` raises the peak of the memory in use on `device`.

    On CUDA this is the memory of torch's allocator, on a CPU the process's resident memory. It is exact on Linux if the
    peak can be reset (/proc/self/clear_refs). Elsewhere it is the growth of the peak, which is 0 for a call that stays
    below an earlier peak.
    """
    device = torch.device(device)
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    _trim()
    _reset_peak()
    before = _peak()
    call()
    return _peak() - before


def isolated(function: Callable[..., Any], *args: Any, timeout: float | None = None) -> Any:
    """Returns `function(*args)`, run in a fresh process for at most `timeout` seconds.

    Function and arguments must be picklable: pickle finds a function by its name in a module.
    """
    context = multiprocessing.get_context("spawn")
    receive, send = context.Pipe(duplex=False)
    process = context.Process(target=_answer, args=(send, function, args), daemon=True)
    # Ctrl-C reaches the whole process group. The child ignores it from its start, and this process ends the child.
    in_main = threading.current_thread() is threading.main_thread()
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN) if in_main else None
    try:
        process.start()
    finally:
        if in_main:
            signal.signal(signal.SIGINT, handler)
    send.close()
    try:
        if not receive.poll(timeout):
            raise TimeoutError(f"{function.__name__}{args} did not return within {timeout:.0f} s")
        answer, error = receive.recv()
    except EOFError:
        process.join()
        raise RuntimeError(f"{function.__name__}{args} ended its process with exit code {process.exitcode}") from None
    finally:
        process.terminate()
        process.join()
    if error is not None:
        raise error
    return answer


def _answer(send: Any, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    with contextlib.suppress(BrokenPipeError):  # the parent is gone
        try:
            send.send((function(*args), None))
        except BrokenPipeError:
            raise
        except Exception as error:
            try:
                send.send((None, error))
            except Exception:  # some errors cannot be pickled
                send.send((None, RuntimeError(f"{type(error).__name__}: {error}")))


def seconds(call: Callable[[], Any], repeats: int = 1) -> float:
    """Returns the seconds of one call, the mean of `repeats` in a row."""
    synchronize()
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    synchronize()
    return (time.perf_counter() - start) / repeats


def _make_room(call: Callable[[], Any]) -> None:
    """Empties CUDA's allocator if it holds more than half of the device's memory, and then runs `call` once untimed.

    Otherwise the time of a call could include freeing the blocks of earlier calls, or allocating its own.
    """
    if torch.cuda.is_initialized() and 2 * torch.cuda.memory_reserved() > torch.cuda.mem_get_info()[1]:
        free_memory()
        call()


class DeviceLost(RuntimeError):
    """Raised when nothing runs on the device until the process ends, for example after an illegal memory access."""


def free_memory() -> None:
    """Returns unused memory to the device, after a call that failed or before one that needs room."""
    gc.collect()
    if torch.cuda.is_initialized():
        try:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
        except RuntimeError as error:
            raise DeviceLost(str(error).splitlines()[0]) from error


def synchronize() -> None:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def _trim() -> None:
    """Makes glibc return freed memory: a call that reuses it would not raise the peak."""
    with contextlib.suppress(AttributeError, OSError, TypeError):  # another libc, macOS, Windows
        ctypes.CDLL(None).malloc_trim(0)


def _reset_peak() -> None:
    try:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")  # 5: set the peak to the present value
    except OSError:
        pass


def _peak() -> int:
    try:
        with open("/proc/self/status") as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        pass
    if sys.platform == "win32":
        raise NotImplementedError("peak_memory on a CPU needs Linux or macOS")
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # in bytes on macOS, in KiB elsewhere
