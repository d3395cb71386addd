"""How busy a node is: sampled now and then, under names that MLflow takes."""

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pipelines.training.node_metrics import NodeMeter
from pipelines.training.spool import METRIC_NAME


def of_node(sample: dict[str, float]) -> dict[str, float]:
    """Return a sample without the name of this machine."""
    assert all(METRIC_NAME.fullmatch(name) for name in sample)
    return {name.split("/")[2]: value for name, value in sample.items()}


def test_a_node_is_sampled_at_once_and_then_every_ten_seconds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("socket.gethostname", lambda: "node (1)/a")
    meter = NodeMeter(tmp_path)
    sample = meter.sample()
    assert {name.rpartition("/")[0] for name in sample} == {"system/node__1__a"}
    values = of_node(sample)
    assert 0 <= values["cpu_utilization_percentage"] <= 100
    assert 0 < values["system_memory_usage_percentage"] < 100
    assert values["disk_available_megabytes"] > 0
    assert meter.sample() == {}
    monkeypatch.setattr("time.monotonic", lambda: meter._due)
    assert of_node(meter.sample()).keys() == values.keys()


def test_a_container_without_network_counters_is_sampled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("psutil.net_io_counters", lambda: None)
    assert not [name for name in NodeMeter(tmp_path).sample() if "network" in name]


class NVMLError(Exception):
    """As nvidia-ml-py raises it."""


def two_cards(power: Any) -> SimpleNamespace:
    """Return what nvidia-ml-py looks like to its caller."""
    return SimpleNamespace(
        NVMLError=NVMLError,
        nvmlInit=lambda: None,
        nvmlDeviceGetCount=lambda: 2,
        nvmlDeviceGetHandleByIndex=lambda number: number,
        nvmlDeviceGetMemoryInfo=lambda card: SimpleNamespace(used=(card + 1) * 1e9, total=8e9),
        nvmlDeviceGetUtilizationRates=lambda card: SimpleNamespace(gpu=40 + card),
        nvmlDeviceGetPowerUsage=power,
    )


def test_every_gpu_of_a_node_is_sampled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", two_cards(lambda card: 300_000 + card))
    values = of_node(NodeMeter(tmp_path).sample())
    assert values["gpu_1_memory_usage_percentage"] == 25
    assert values["gpu_0_memory_usage_megabytes"] == 1000
    assert values["gpu_1_utilization_percentage"] == 41
    assert values["gpu_0_power_usage_watts"] == 300


def test_what_a_gpu_does_not_tell_harms_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(card: int) -> int:
        raise NVMLError(card)

    monkeypatch.setitem(sys.modules, "pynvml", two_cards(refuse))
    values = of_node(NodeMeter(tmp_path).sample())
    assert values["gpu_1_utilization_percentage"] == 41
    assert not [name for name in values if "power" in name]
