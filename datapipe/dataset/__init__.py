"""What a data set is (tars, indexes, manifest, selection, quarantine, duplicates), and whether it still is."""
