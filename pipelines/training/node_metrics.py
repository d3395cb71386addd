"""How busy a node is: processor, memory, disk, network and GPUs, named as MLflow charts them."""

import re
import socket
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil

SAMPLE_SECONDS = 10.0


class NodeMeter:
    """Samples the node that this process is on; used by one process of each node.

    The first sample is taken at once, so that the shortest run has one.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._prefix = f"system/{re.sub(r'[^a-zA-Z0-9_.-]', '_', socket.gethostname())}"
        self._due = time.monotonic()
        self._network_before = psutil.net_io_counters()
        psutil.cpu_percent()  # the first call has nothing to compare with

    def sample(self) -> dict[str, float]:
        """Return `system/NODE/...` if it is time for them, else nothing; never waits.

        Use of the processor is that since the last sample, bytes of the network since the start.
        """
        now = time.monotonic()
        if now < self._due:
            return {}
        self._due = now + SAMPLE_SECONDS
        memory, disk = psutil.virtual_memory(), psutil.disk_usage(str(self._folder))
        values = {
            "cpu_utilization_percentage": psutil.cpu_percent(),
            "system_memory_usage_megabytes": memory.used / 1e6,
            "system_memory_usage_percentage": memory.percent,
            "disk_usage_percentage": disk.percent,
            "disk_available_megabytes": disk.free / 1e6,
            **self._network(),
            **dict(_gpus()),
        }
        return {f"{self._prefix}/{name}": value for name, value in values.items()}

    def _network(self) -> dict[str, float]:
        now, before = psutil.net_io_counters(), self._network_before
        if now is None or before is None:  # a container may have none
            return {}
        return {
            "network_receive_megabytes": (now.bytes_recv - before.bytes_recv) / 1e6,
            "network_transmit_megabytes": (now.bytes_sent - before.bytes_sent) / 1e6,
        }


def _gpus() -> Iterator[tuple[str, float]]:
    """Yield the metrics of every GPU of the node, where nvidia-ml-py and a driver are there."""
    try:
        import pynvml
    except ImportError:
        return
    count = 0
    with suppress(pynvml.NVMLError):  # no driver
        pynvml.nvmlInit()
        count = pynvml.nvmlDeviceGetCount()
    for number in range(count):
        with suppress(pynvml.NVMLError):  # a card that does not tell this
            gpu = pynvml.nvmlDeviceGetHandleByIndex(number)
            memory = pynvml.nvmlDeviceGetMemoryInfo(gpu)
            yield f"gpu_{number}_memory_usage_megabytes", memory.used / 1e6
            yield f"gpu_{number}_memory_usage_percentage", 100 * memory.used / memory.total
            yield (
                f"gpu_{number}_utilization_percentage",
                pynvml.nvmlDeviceGetUtilizationRates(gpu).gpu,
            )
            watts = pynvml.nvmlDeviceGetPowerUsage(gpu) / 1000
            yield f"gpu_{number}_power_usage_watts", watts
