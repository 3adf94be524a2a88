"""What a grid would do, without doing it: its cells, and what each of those that train takes."""

from collections.abc import Sequence

from datapipe.core.progress import counted
from training.grid.carry_out import result_of
from training.grid.cells import Cell
from training.grid.planning import LeftOut
from training.preflight import dry_run_text
from training.preflight.dry_run import dry_run


def page(cells: Sequence[Cell], left_out: Sequence[LeftOut]) -> str:
    """Every cell in the order in which they may begin; then, of each kind of training, sizes, steps, memory, and how it
    differs from its publication."""
    lines = [counted(len(cells), "cell"), *(f"  {_line(cell)}" for cell in cells)]
    lines += [f"  left out: {one.what}: {one.why}" for one in left_out]
    shown: set[str] = set()
    for cell in cells:
        kind = f"{cell.task} on {cell.data.name}{f', {cell.remark}' if cell.remark else ''}"
        if cell.config is not None and kind not in shown:
            shown.add(kind)
            lines += ["", f"== {kind} ({cell.weights.name})", dry_run_text.page(dry_run(cell.config))]
    return "\n".join(lines)


def _line(cell: Cell) -> str:
    state = "complete" if result_of(cell) is not None else f"after {cell.source}" if cell.source else "may begin"
    how = f"trains by {cell.config.method.name}" if cell.config else "scored as it is"
    return f"{cell.folder}: {how}; {state}"
