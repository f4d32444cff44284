"""What this machine offers the engine, check by check, with what to do about each that fails; and
whether the processes of a launcher come together."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from longspan import cache
from longspan._core import Rendezvous, backends, check_rendezvous
from longspan.cuda_libraries import VARIABLE

#: Of a check, from good to bad: as it should be; not there, and not needed here; works, but slower
#: or for less than it could; broken.
OK, ABSENT, WARNING, BROKEN = "ok", "absent", "warning", "broken"

_NVIDIA = "0x10de"
_DISPLAY = "0x03"  # PCI class of display controllers
_GIB = 1 << 30
#: NCCL's ranks on one machine talk through shared memory, some tens of MB for each pair.
_LEAST_SHARED = _GIB


@dataclass(frozen=True)
class Check:
    name: str
    state: str
    found: str
    #: What to do; empty where there is nothing to do.
    remedy: str = ""


def examine() -> Iterator[Check]:
    """Every check in turn. None of them throws or takes memory on a GPU."""
    cpu, cuda = backends()
    yield Check("CPU", OK, cpu.detail)
    yield _memory()
    yield _cache_directory()
    cards = nvidia_gpus()
    if cards == 0 and not cuda.available:
        yield Check("GPU", ABSENT, 'no NVIDIA GPU on the PCI bus; device="cpu" works')
        return
    cards = max(cards, 1)  # where there is one and no PCI bus, as in WSL
    yield Check("GPU", OK, f"{cards} of NVIDIA's")
    driver = _driver()
    yield driver
    yield _nvidia_smi()
    if cuda.available:
        yield Check("CUDA library", OK, cuda.detail)
    else:
        yield Check("CUDA library", BROKEN, "cannot run", cuda.detail)
    yield _library(
        "cuBLASLt",
        ("libcublasLt.so.13", "libcublasLt.so.12"),
        "cublasLtGetVersion",
        BROKEN,
        "pip install nvidia-cublas (CUDA 13) or nvidia-cublas-cu12, or set " + VARIABLE,
    )
    yield _library(
        "NCCL",
        ("libnccl.so.2",),
        "ncclGetVersion",
        WARNING if cards > 1 else ABSENT,
        "several GPUs together need it: pip install nvidia-nccl-cu13 (or -cu12)",
    )
    yield _shared_memory(cards)
    if cards > 1 and driver.state == OK:
        yield _peer_access()


def _memory() -> Check:
    words = dict(line.split()[:2] for line in Path("/proc/meminfo").read_text().splitlines())
    free, total = (int(words[name]) << 10 for name in ("MemAvailable:", "MemTotal:"))
    found = f"{free / _GIB:.1f} of {total / _GIB:.1f} GiB free"
    if free < _GIB:
        return Check("memory", WARNING, found, "end other programs: even a small model wants 1 GiB")
    return Check("memory", OK, found)


def _cache_directory() -> Check:
    folder = cache.root()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            free = shutil.disk_usage(folder).free
    except OSError as error:
        remedy = "make it writable, or point XDG_CACHE_HOME elsewhere"
        return Check("cache directory", BROKEN, f"{folder}: {error.strerror}", remedy)
    return Check("cache directory", OK, f"{folder}, {free / _GIB:.1f} GiB free")


def nvidia_gpus() -> int:
    """NVIDIA's GPUs in this machine, whether or not a driver knows them."""

    def read(path: Path) -> str:
        try:
            return path.read_text().strip()
        except OSError:
            return ""

    devices = Path("/sys/bus/pci/devices").glob("*")
    found = [d for d in devices if read(d / "vendor") == _NVIDIA]
    on_bus = sum(read(d / "class").startswith(_DISPLAY) for d in found)
    # A container may see the devices and not the bus.
    return on_bus or sum(1 for _ in Path("/dev").glob("nvidia[0-9]*"))


def _driver() -> Check:
    remedy = "install NVIDIA's driver; in a container, start it with GPU access (--gpus all)"
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        return Check("driver", BROKEN, str(error), remedy)
    version = ctypes.c_int()
    cuda.cuDriverGetVersion(ctypes.byref(version))
    known = f"knows CUDA {version.value // 1000}.{version.value % 1000 // 10}"
    if status := cuda.cuInit(0):
        return Check("driver", BROKEN, f"{known}, but cuInit fails with error {status}", remedy)
    return Check("driver", OK, known)


def _nvidia_smi() -> Check:
    fields = "name,driver_version,memory.free,memory.total"
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader,nounits"]
    try:
        lines = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
        rows = [line.split(", ") for line in lines.stdout.splitlines()]
        found = "; ".join(
            f"{name}, driver {driver}, {int(free):,} of {int(total):,} MiB free"
            for name, driver, free, total in rows
        )
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        return Check("GPU memory", WARNING, f"nvidia-smi does not tell: {error}")
    if any(int(free) < int(total) // 2 for _, _, free, total in rows):
        return Check("GPU memory", WARNING, found, "nvidia-smi lists the programs that hold it")
    return Check("GPU memory", OK, found)


def _library(name: str, files: tuple[str, ...], function: str, missing: str, remedy: str) -> Check:
    """A library where the engine looks for it, and its version."""
    folders = [f"{folder}/" for folder in os.environ.get(VARIABLE, "").split(":") if folder]
    for file in (
        folder + file for folder in (*folders, "", "/usr/local/cuda/lib64/") for file in files
    ):
        try:
            version = _version(getattr(ctypes.CDLL(file), function))
        except (OSError, AttributeError):
            continue
        return Check(name, OK, f"{version}, {file}")
    return Check(name, missing, f"found no {' or '.join(files)}", remedy)


def _version(function: Callable[..., int]) -> str:
    if function.__name__ == "ncclGetVersion":
        code = ctypes.c_int()
        function(ctypes.byref(code))
        return f"{code.value // 10000}.{code.value % 10000 // 100}.{code.value % 100}"
    function.restype = ctypes.c_size_t  # type: ignore[attr-defined]
    code = function()  # 130100 is 13.1.0
    return f"{code // 10000}.{code % 10000 // 100}"


def _shared_memory(cards: int) -> Check:
    try:
        total = shutil.disk_usage("/dev/shm").total
    except OSError as error:
        total, found = 0, f"/dev/shm: {error.strerror}"
    else:
        found = f"/dev/shm, {total / _GIB:.1f} GiB"
    if total >= _LEAST_SHARED or cards == 1:
        return Check("shared memory", OK, found)
    remedy = "several GPUs want 1 GiB: mount a larger /dev/shm (docker run --shm-size=1g)"
    return Check("shared memory", BROKEN if total == 0 else WARNING, found, remedy)


def _peer_access() -> Check:
    cuda = ctypes.CDLL("libcuda.so.1")
    count, can = ctypes.c_int(), ctypes.c_int()
    cuda.cuDeviceGetCount(ctypes.byref(count))
    without = []
    for a in range(count.value):
        for b in range(a + 1, count.value):
            cuda.cuDeviceCanAccessPeer(ctypes.byref(can), a, b)
            if not can.value:
                without.append(f"{a}-{b}")
    if not without:
        return Check("peer access", OK, f"between all {count.value} GPUs")
    remedy = "these exchange data through the host, slower; in a VM, pass NVLink or ACS through"
    return Check("peer access", WARNING, f"not between {', '.join(without)}", remedy)


_MEETING_REMEDIES = {
    "meeting": "start all ranks, and let them reach MASTER_ADDR at the port after MASTER_PORT, or "
    "LONGSPAN_PORT",
    "device": "longspan doctor on that machine says what it lacks",
    "connecting devices": "NCCL_DEBUG=INFO tells more; NCCL_SOCKET_IFNAME names the network to use",
    "sum on devices": "NCCL_DEBUG=INFO tells more; NCCL_P2P_DISABLE=1 does without peer access",
}
#: Beyond the time for ranks to come: rank 0 then knows who did not, and has told the others.
_GRACE_S = 3.0


@dataclass
class Meeting:
    """How the ranks of a launcher came together, as this one saw it."""

    rank: int = 0
    size: int = 1
    checks: list[Check] = field(default_factory=list)
    #: A step did not end; whoever waits in it cannot be called back.
    hangs: bool = False


def meet(device: str = "auto", timeout_s: int = 60) -> Meeting:
    """Where a launcher started this process beside others: all meet, take their devices and add up
    numbers, first through host memory, then through NCCL. A step that takes longer than the
    timeout, twice where rank 0 is waited for, has failed. Every rank calls it. Throws
    InvalidArgument for what a launcher's variables or the arguments say."""
    meeting = Meeting()
    step, began = "", time.monotonic()
    outcome: list[Rendezvous | Exception] = []

    def begins(rank: int, name: str) -> None:
        nonlocal step, began
        meeting.rank, step, began = rank, name, time.monotonic()

    def run() -> None:
        try:
            outcome.append(check_rendezvous(device, timeout_s, begins))
        except Exception as error:
            outcome.append(error)

    # Not joined where it hangs.
    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    while thread.is_alive() and time.monotonic() - began < 2 * timeout_s + _GRACE_S:
        thread.join(0.05)
    if not outcome:
        found = f"rank {meeting.rank}: expected an end within {time.monotonic() - began:.0f} s"
        meeting.checks = [_meeting_check(step, BROKEN, found)]
        meeting.hangs = True
        return meeting
    met = outcome[0]
    if isinstance(met, Exception):
        raise met
    meeting.rank, meeting.size = met.rank, met.size
    for done in met.steps:
        found = f"{done.found}, {done.seconds:.2f} s" if done.ok else done.found
        meeting.checks.append(_meeting_check(done.name, OK if done.ok else BROKEN, found))
    return meeting


def _meeting_check(step: str, state: str, found: str) -> Check:
    remedy = "" if state == OK else _MEETING_REMEDIES.get(step, "")
    return Check(f"ranks: {step}", state, found, remedy)
