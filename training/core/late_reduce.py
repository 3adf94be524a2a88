"""What ranks tell each other without waiting: asked in one step, heard in a later one."""

import torch
import torch.distributed as dist

from training.core.world import World


class LateReduce:
    """A sum over ranks that travels while they compute. All ranks call `ask` and `answer` in the same steps."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._asked: tuple[torch.Tensor, dist.Work | None] | None = None

    def ask(self, values: torch.Tensor) -> None:
        """Begin to add up `values` of all ranks."""
        values = values.to(self._world.device)
        self._asked = values, dist.all_reduce(values, async_op=True) if self._world.size > 1 else None

    def ask_rows(self, row: torch.Tensor) -> None:
        """Begin to bring together the rows of all ranks: the answer is [ranks, values]."""
        table = torch.zeros(self._world.size, len(row), dtype=row.dtype, device=self._world.device)
        table[self._world.rank] = row
        self.ask(table)

    def answer(self) -> torch.Tensor | None:
        """What was asked for last, once; None where nothing was. Returns at once where a step has passed since."""
        if self._asked is None:
            return None
        (values, work), self._asked = self._asked, None
        if work is not None:
            work.wait()
        return values
