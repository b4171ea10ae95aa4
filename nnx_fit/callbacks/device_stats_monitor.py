"""`DeviceStatsMonitor`: memory of the devices that train, and of the host where it is the device."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from nnx_fit.callbacks.callback import Callback, pausing
from nnx_fit.callbacks.log_points import LogPoints
from nnx_fit.errors import ConfigurationError

if TYPE_CHECKING:
    from nnx_fit.module import FitModule
    from nnx_fit.trainer import Trainer


class DeviceStatsMonitor(Callback):
    """Logs what devices and the host use, with every record of step metrics. Nothing waits for a device.

    - `device/<stat>`: each number that `jax.Device.memory_stats()` has of the device that holds the module, among them
      `bytes_in_use`, `peak_bytes_in_use` and `bytes_limit`. With several devices, `device_<id>/<stat>` of each.
    - `host/peak_bytes`: the most memory that this process has had so far; `host/bytes`: what it has now, where the
      system tells (Linux).
    - `host/cpu_use`: CPU seconds of this process in a second since the record before: 1.5 are one core and a half.

    JAX tells nothing of a CPU's memory, so that there the statistics of the host stand in.

    Args:
        cpu_stats: Log the statistics of the host: always (`True`), never (`False`), or where a device has none of its
            own (`None`).
        clock: Seconds, monotonic.

    Raises:
        ConfigurationError: `cpu_stats` is something else, or is `True` where the system has no `resource` module.

    Example:
        >>> from nnx_fit.callbacks.device_stats_monitor import DeviceStatsMonitor
        >>> DeviceStatsMonitor(cpu_stats=True).cpu_stats
        True
    """

    reads_module = False

    def __init__(self, cpu_stats: bool | None = None, *, clock: Callable[[], float] = time.monotonic):
        if cpu_stats is not None and not isinstance(cpu_stats, bool):
            raise ConfigurationError(
                f"DeviceStatsMonitor(cpu_stats={cpu_stats!r}): expected True, False or None.\n"
                "Fix: pass one of them; with None the host's are logged where a device has none."
            )
        if cpu_stats and _usage() is None:
            raise ConfigurationError(
                "DeviceStatsMonitor(cpu_stats=True): this system has no `resource` module to ask.\n"
                "Fix: leave it at None."
            )
        self.cpu_stats = cpu_stats
        self._clock = clock
        self._points = LogPoints()
        self._devices: list[Any] = []
        self._before: tuple[float, float] | None = None  # the clock, and CPU seconds

    def on_train_start(self, trainer: Trainer, module: FitModule) -> None:
        """Finds the devices."""
        arrays = trainer.peek(...).values()
        self._devices = sorted({device for array in arrays for device in array.devices()}, key=lambda device: device.id)
        self._points.start(trainer)
        self.paused_until = self._points.next
        usage = _usage()
        self._before = None if usage is None else (self._clock(), usage[0])

    @pausing
    def on_train_batch_end(self, trainer: Trainer, module: FitModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Logs where a record is due."""
        if self._points.reached(trainer):
            for name, value in self._stats():
                module.log(name, value)
            self.paused_until = self._points.next

    def _stats(self) -> Iterator[tuple[str, float]]:
        of_devices = {device.id: _memory(device) for device in self._devices}
        for number, stats in of_devices.items():
            group = "device" if len(of_devices) == 1 else f"device_{number}"
            for name, value in stats.items():
                yield f"{group}/{name}", float(value)
        if self.cpu_stats or (self.cpu_stats is None and not all(of_devices.values())):
            yield from self._host_stats()

    def _host_stats(self) -> Iterator[tuple[str, float]]:
        usage = _usage()
        if usage is None or self._before is None:
            return
        cpu_seconds, peak = usage
        yield "host/peak_bytes", peak
        resident = _resident_bytes()
        if resident is not None:
            yield "host/bytes", resident
        now = self._clock()
        before, cpu_before = self._before
        self._before = now, cpu_seconds
        if now > before:
            yield "host/cpu_use", (cpu_seconds - cpu_before) / (now - before)


def _memory(device: Any) -> Mapping[str, int]:
    """The numbers of a `jax.Device` by name; empty where it has none."""
    return device.memory_stats() or {}


def _usage() -> tuple[float, float] | None:
    """CPU seconds and peak memory in bytes of this process; `None` where the system does not tell."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    usage = resource.getrusage(resource.RUSAGE_SELF)
    unit = 1 if sys.platform == "darwin" else 1024
    return usage.ru_utime + usage.ru_stime, float(usage.ru_maxrss * unit)


def _resident_bytes() -> float | None:
    """Memory of this process in bytes; `None` where the system has no `/proc`."""
    try:
        with open("/proc/self/statm") as file:
            pages = int(file.read().split()[1])
    except (OSError, ValueError, IndexError):
        return None
    return float(pages * os.sysconf("SC_PAGE_SIZE"))
