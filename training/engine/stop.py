"""All ranks stop after the same step, though only one of them may have heard the signal."""

import torch
import torch.distributed as dist

from training.engine.host import Host
from training.engine.world import World


class Stop:
    """Agreement on stopping, one step late, so that nobody waits for the answer."""

    def __init__(self, host: Host, world: World) -> None:
        self._host, self._world = host, world
        self._asked: tuple[torch.Tensor, dist.Work] | None = None
        self.reached = False
        """Was it agreed to stop? Equal on all ranks."""

    def agreed(self) -> bool:
        """Call once per step on every rank: True on all of them in the same step.

        With several ranks the answer is to the question asked one step earlier.
        """
        self.reached = self._answer()
        return self.reached

    def _answer(self) -> bool:
        heard = self._host.preempted()
        if self._world.size == 1:
            return heard
        answer = False
        if self._asked is not None:
            flag, work = self._asked
            work.wait()
            answer = bool(flag.item())
        flag = torch.tensor([float(heard)], device=self._world.device)
        self._asked = flag, dist.all_reduce(flag, async_op=True)
        return answer
