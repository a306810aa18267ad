"""Times, memory, host time and launches of the contestants on one problem.

All contestants take turns inside each repetition, in random order, so that clocks, the power limit and neighbours hit them alike. On CUDA: events,
the L2 cache overwritten before each timing, a soak beforehand so that the power limit has settled, and a device-side wait so that launches run ahead
of the GPU. time_steady has a warm cache and waits once in many turns instead."""

import gc
import random
import statistics
import time

import torch

from ..errors import UserError

L2_FLUSH_BYTES = 256 << 20
SLEEP_CYCLES_PER_MS = 1.9e6
MAX_HOLD_MS = 100.0
HOST_SECONDS = 2.0
MIB = 2**20


class CudaClock:
    def __init__(self, device):
        self.flush_buffer = torch.empty(L2_FLUSH_BYTES, dtype=torch.uint8, device=device)

    def flush(self):
        self.flush_buffer.zero_()

    def hold(self, ms):
        torch.cuda._sleep(int(min(MAX_HOLD_MS, ms) * SLEEP_CYCLES_PER_MS))

    def mark(self):
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def wait(self):
        torch.cuda.synchronize()

    @staticmethod
    def ms(start, end):
        return start.elapsed_time(end)


class HostClock:
    def __init__(self, _device):
        pass

    def flush(self):
        pass

    def hold(self, ms):
        pass

    def wait(self):
        pass

    @staticmethod
    def mark():
        return time.perf_counter()

    @staticmethod
    def ms(start, end):
        return (end - start) * 1e3


def passes(contestant):
    """name -> (untimed preparation, timed work)."""
    out = {"forward": (lambda: None, lambda _: contestant.forward()), "backward": (contestant.forward, contestant.backward)}
    if contestant.layer is not None:
        out["layer"] = (lambda: None, lambda _: contestant.layer_backward(contestant.layer()))
    return out


def timed(clock, prepare, work, hold_ms):
    argument = prepare()
    clock.hold(hold_ms)
    clock.flush()
    start = clock.mark()
    result = work(argument)
    end = clock.mark()
    del argument, result
    return start, end


def summary(values):
    return {"min_ms": min(values), "median_ms": statistics.median(values), "reps": len(values)}


def time_all(contestants, device, budget_ms, soak_ms):
    """{contestant: {pass: {min_ms, median_ms, reps, late}}}; late: timings in which the GPU may have waited for the host."""
    clock = (CudaClock if device.type == "cuda" else HostClock)(device)
    jobs = [(name, kind, *pair) for name, contestant in contestants.items() for kind, pair in passes(contestant).items()]
    host_ms = {}
    for name, kind, prepare, work in jobs:  # first calls, then how long the host is busy with one
        for _ in range(2):
            timed(clock, prepare, work, 0)
        clock.wait()
        began = time.perf_counter()
        timed(clock, prepare, work, 0)
        host_ms[name, kind] = (time.perf_counter() - began) * 1e3 if device.type == "cuda" else 0.0
        clock.wait()

    def sample(name, kind, prepare, work):
        """Twice again, behind longer waits, where the host took so long that the GPU may have caught up with it."""
        hold_ms = 1.2 * host_ms[name, kind]
        for _ in range(3):
            began = time.perf_counter()
            start, end = timed(clock, prepare, work, hold_ms)
            spent_ms = (time.perf_counter() - began) * 1e3
            clock.wait()
            late = device.type == "cuda" and spent_ms > min(MAX_HOLD_MS, hold_ms)
            if not late:
                break
            hold_ms = 1.2 * spent_ms
        return clock.ms(start, end), late

    soak_until = time.perf_counter() + (soak_ms / 1e3 if device.type == "cuda" else 0.0)
    while time.perf_counter() < soak_until:
        for _, _, prepare, work in jobs:
            timed(clock, prepare, work, 0)
        clock.wait()
    samples, began = {job[:2]: [] for job in jobs}, time.perf_counter()
    shuffled, rounds = random.Random(0), 0
    while rounds < 5 or (rounds < 100 and (time.perf_counter() - began) * 1e3 < budget_ms * len(jobs)):
        for job in shuffled.sample(jobs, len(jobs)):
            samples[job[:2]].append(sample(*job))
        rounds += 1
    out = {name: {} for name in contestants}
    for (name, kind), values in samples.items():
        out[name][kind] = summary([ms for ms, _ in values]) | {"late": sum(late for _, late in values)}
    return out


def time_steady(contestants, device, budget_ms, soak_ms):
    """The same with a warm cache and a pause of milliseconds in 20 turns alone, as in training: a forward and a backward of one, then of the next, in
    random order. Who takes longer on the host than on the GPU shows the host's time."""
    on_cuda = device.type == "cuda"
    clock = (CudaClock if on_cuda else HostClock)(device)
    shuffled = random.Random(0)

    def rounds():
        marks = []
        clock.hold(2)
        for _ in range(20 if on_cuda else 1):
            for name in shuffled.sample(list(contestants), len(contestants)):
                start = clock.mark()
                o = contestants[name].forward()
                middle = clock.mark()
                gradients = contestants[name].backward(o)
                marks.append((name, start, middle, clock.mark()))
                del o, gradients
        clock.wait()
        return marks

    soak_until = time.perf_counter() + (soak_ms / 1e3 if on_cuda else 0.0)
    rounds()
    while time.perf_counter() < soak_until:
        rounds()
    samples = {name: {"forward": [], "backward": []} for name in contestants}
    until = time.perf_counter() + 2e-3 * budget_ms * len(contestants)
    while min(len(kinds["forward"]) for kinds in samples.values()) < 5 or time.perf_counter() < until:
        for name, start, middle, end in rounds():
            samples[name]["forward"].append(clock.ms(start, middle))
            samples[name]["backward"].append(clock.ms(middle, end))
    return {name: {kind: summary(values) for kind, values in kinds.items()} for name, kinds in samples.items()}


def memory(contestant, device):
    """Saved between the passes, and the peaks beyond the inputs (and beyond the weight gradients), in MiB, as requested from the allocator: what it
    hands out is up to 1 MiB more for a tensor, depending on what was free. The CPU has no such counters: there the tensors that autograd holds are
    added up, and the peaks are unknown."""

    def requested(which):
        return torch.cuda.memory_stats(device)[f"requested_bytes.all.{which}"]

    if device.type != "cuda":
        held = {}
        known = {leaf.untyped_storage().data_ptr() for leaf in contestant.leaves()}

        def pack(tensor):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in known:
                held[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            o = contestant.forward()
        held.pop(o.untyped_storage().data_ptr(), None)
        return {"saved_mib": sum(held.values()) / MIB, "peak_forward_mib": None, "peak_backward_mib": None}
    gc.collect()
    torch.cuda.synchronize()
    before = requested("current")
    torch.cuda.reset_peak_memory_stats()
    o = contestant.forward()
    out = {
        "saved_mib": (requested("current") - before - o.nbytes) / MIB,
        "peak_forward_mib": (requested("peak") - before) / MIB,
    }
    torch.cuda.reset_peak_memory_stats()
    gradients = contestant.backward(o)
    weights = contestant.w1.nbytes + contestant.w2.nbytes
    out["peak_backward_mib"] = (requested("peak") - before - weights) / MIB
    del gradients
    if not requested("peak"):
        raise UserError("the allocator does not count what is requested from it, expected torch's own: unset its backend in PYTORCH_CUDA_ALLOC_CONF")
    return out


def host_cost(contestant, device, calls):
    """Mean host time of an eager call on an idle GPU, over at most `calls` calls and HOST_SECONDS, and the kernels launched."""
    if device.type != "cuda" or calls < 1:
        return {}
    from torch.profiler import ProfilerActivity, profile

    spent, done, began = {"forward": 0.0, "backward": 0.0}, 0, time.perf_counter()
    while done < calls and time.perf_counter() - began < HOST_SECONDS:
        torch.cuda.synchronize()
        start = time.perf_counter()
        o = contestant.forward()
        spent["forward"] += time.perf_counter() - start
        torch.cuda.synchronize()
        start = time.perf_counter()
        gradients = contestant.backward(o)
        spent["backward"] += time.perf_counter() - start
        del o, gradients
        done += 1
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as trace:
        contestant.backward(contestant.forward())
        torch.cuda.synchronize()
    launches = sum(event.count for event in trace.key_averages() if event.self_device_time_total > 0)
    microseconds = {f"host_{kind}_us": seconds / done * 1e6 for kind, seconds in spent.items()}
    return microseconds | {"host_calls": done, "launches": launches}
