"""The peak speeds of devices, and the devices that `plan` knows, with the sources of their figures.

Imports nothing heavy.
"""

import difflib
from dataclasses import dataclass

from megatron_slm.errors import UserError

DENSE_BF16_PEAKS = {
    # Dense peaks in FLOP/s from the vendors' datasheets, of the SXM variant unless the name has another. The datasheets
    # also print figures for sparse matrices, which are twice as high.
    "MI300X": 1307.4e12,
    "B200": 2.25e15,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "A10": 125e12,
    "V100": 125e12,
}

CPU = "cpu"


@dataclass(frozen=True)
class Device:
    """A device and its links.

    Attributes:
        name: as `--device` takes it.
        flops: dense bf16 peak in FLOP/s; 0 for a CPU, which is measured.
        memory: bytes by the data sheet; 0 for a CPU. Drivers report a few per cent more or less.
        bandwidth: bandwidth of the memory in bytes per second; 0 for a CPU.
        link: bandwidth to the other devices of a node, in one direction, in bytes per second.
        network: gigabits per second of the network adapter of each device, in the vendor's own servers.
        source: where the figures come from.
    """

    name: str
    flops: float
    memory: float
    bandwidth: float
    link: float
    network: float
    source: str


def _table(*devices: Device) -> dict[str, Device]:
    return {device.name: device for device in devices}


_H100 = "NVIDIA H100 datasheet (SXM); network: DGX H100 datasheet (NDR)"
_A100 = "NVIDIA A100 datasheet (SXM); network: DGX A100 datasheet (HDR)"

DEVICES = _table(
    Device("h100-80gb", DENSE_BF16_PEAKS["H100"], 80e9, 3.35e12, 450e9, 400, _H100),
    Device(
        "h200-141gb",
        DENSE_BF16_PEAKS["H200"],
        141e9,
        4.8e12,
        450e9,
        400,
        "NVIDIA H200 datasheet (SXM); network: DGX H200 datasheet (NDR)",
    ),
    Device("a100-40gb", DENSE_BF16_PEAKS["A100"], 40e9, 1.555e12, 300e9, 200, _A100),
    Device("a100-80gb", DENSE_BF16_PEAKS["A100"], 80e9, 2.039e12, 300e9, 200, _A100),
    Device(
        "b200-180gb",
        DENSE_BF16_PEAKS["B200"],
        180e9,
        8e12,
        900e9,
        400,
        "NVIDIA DGX B200 datasheet: 1,440 GB and 64 TB/s over 8 GPUs; NVLink 5 has 1.8 TB/s in both directions",
    ),
    Device(
        "mi300x-192gb",
        DENSE_BF16_PEAKS["MI300X"],
        192e9,
        5.3e12,
        448e9,
        400,
        "AMD Instinct MI300X data sheet: 7 links of 128 GB/s in both directions; network: 400 Gb/s, assumed",
    ),
    Device(CPU, 0.0, 0.0, 0.0, 0.0, 0.0, "this machine, measured"),
)


def find_device(name: str) -> Device:
    """Return a device by its name, in any case; the memory may be left out if there is one such device.

    Raises:
        UserError: there is no such device; the remedy names the nearest.
    """
    wanted = name.lower()
    if wanted in DEVICES:
        return DEVICES[wanted]
    starting = [device for key, device in DEVICES.items() if key.startswith(f"{wanted}-")]
    if len(starting) == 1:
        return starting[0]
    near = [device.name for device in starting] or difflib.get_close_matches(wanted, DEVICES, n=1, cutoff=0.3)
    remedy = f"Did you mean {' or '.join(near)}?" if near else f"Use one of {', '.join(DEVICES)}"
    raise UserError("--device", name, "there is no such device in the table", remedy)
