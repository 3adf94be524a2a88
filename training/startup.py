"""What the time between a worker's start and its first step goes into, written down for whoever counts recoveries."""

import time

import psutil


class Startup:
    """Unix times at which the stages of this rank's start were over. Made when `pretrain` begins."""

    def __init__(self) -> None:
        self.times = {"process": psutil.Process().create_time(), "imported": time.time()}
        """"process": when the operating system started it; "imported": code is loaded, the ranks have met."""

    def reached(self, stage: str) -> None:
        """The stage is over."""
        self.times[stage] = time.time()
