"""What Ray Train's watch over NCCL found of ranks that stood still: kept in the run folder, as its own goes."""

from pathlib import Path

from cluster.core.ray_internals import NCCL_EVIDENCE
from training.core.run_folder.run_folder import RunFolder

FOLDER = "ranks/stood_still"
"""In the run folder: `stack_traces` of all ranks and `nccl_ras`, NCCL's own reports."""


def keep_evidence(scratch: str, folder: RunFolder) -> list[str]:
    """Move what lies below the folder of Ray Train's runs into the run folder; the names there. What a later restart
    finds takes the place of what an earlier one found."""
    kept = []
    for path in sorted(Path(scratch).glob(f"run-*/{NCCL_EVIDENCE}/*/*")):
        kept.append(f"{FOLDER}/{path.parent.name}/{path.name}")
        folder.write(kept[-1], path.read_bytes())
        path.unlink()
    return kept
