"""All readers that are fuzzed, by name."""

from tests.fuzz.data_sets import DATA_SETS
from tests.fuzz.run_files import RUN_FILES
from tests.fuzz.sources import SOURCES

READERS = {reader.name: reader for reader in (*SOURCES, *DATA_SETS, *RUN_FILES)}
