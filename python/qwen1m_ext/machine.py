"""What this machine is called: measurements are kept with its name."""

from __future__ import annotations

import platform


def cpu_name() -> str:
    """The processor's own name where the system tells it, else the architecture."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
