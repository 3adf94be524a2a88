"""Checkpoints: complete or absent, verified when read, and holding all that the future depends on.

    checkpoints/step_0000100/rank_00003.t7-5f2a9c01-2.safetensors   what rank 3 saved: stretches of flattened tensors
    checkpoints/step_0000100/checkpoint.json                        written last: its presence means complete

No tensor is ever put together to be saved: each rank writes what it holds, and its share of what all hold. The table in
checkpoint.json says which file has which numbers of which tensor, so that any world size, ZeRO stage and stepper finds
what it needs by range reads. Nothing is unpickled. `t7-5f2a9c01-2` is the term of the run's lease, the attempt and its
save: files of an attempt that crashed, or is not quite dead, never mix with those of the next.

metadata.py       what a checkpoint says of itself       lineage.py         which of them are the run's own
snapshot.py       one rank's file                        announcements.py   what ranks say of theirs to the leading one
async_save.py     the thread of a save                   manager.py         saving and restoring as the loop does it
reader.py         tensors, and whether they are whole    machine_blocks.py  read once for all ranks of a machine
retention.py      which checkpoints stay                 pruning.py         deletes the others beside all this
compare.py        how two of them differ
"""

from training.checkpoint.lineage import complete
from training.checkpoint.manager import Checkpoints, Saved, SaveStatus, refuse_other_data
from training.checkpoint.metadata import MARKER, Marker, name_of, read_marker, step_of, was_pruned
from training.checkpoint.reader import Reader, load_model, newest_good, verify

__all__ = [
    "MARKER",
    "Checkpoints",
    "Marker",
    "Reader",
    "SaveStatus",
    "Saved",
    "complete",
    "load_model",
    "name_of",
    "newest_good",
    "read_marker",
    "refuse_other_data",
    "step_of",
    "verify",
    "was_pruned",
]
