"""What the fork server of the tests imports once, so that the processes which it forks need not: see `forked.py`."""

import gc

import boto3  # noqa: F401
import pandas  # noqa: F401  (pyarrow imports it, and the next one, at the first read of a table)
import pyarrow.dataset  # noqa: F401
import pytest  # noqa: F401

import datapipe.maintain.remove
import datapipe.maintain.reshard
import datapipe.sources.archive
import datapipe.sources.lmdb
import datapipe.sources.video  # noqa: F401
import training.trainer.pretrain  # noqa: F401
from training.engine.deepspeed import _import

_import()
gc.freeze()  # what is there stays: collections in forked processes need not copy its pages
