"""Several data sets as one stream: ids, labels, substitutes and addresses."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from datapipe.core.config import SelectConfig, ShardConfig, StorageConfig, StreamConfig, ViewConfig
from datapipe.core.errors import ConfigError, DataError
from datapipe.dataset.manifest import Manifest
from datapipe.ingest.pipeline import ingest
from datapipe.maintain.select import select
from datapipe.sampling.epoch_order import Order
from datapipe.sampling.identity_sampler import IdentityOrder
from datapipe.storage import open_store
from datapipe.stream.loader import Loader
from datapipe.stream.mixed_stream import LABELS_APART, MixedStream
from datapipe.stream.training_data import Data, load_data
from datapipe.views.spec import multi_crop
from tests.datapipe import crop_set
from tests.datapipe.crop_set import CropSet

CONFIG = StreamConfig(block=5, window=3, threads=1, max_bad=1.0)
STORAGE = StorageConfig()
SPEC = multi_crop(ViewConfig(interpolation="linear"), size=(32, 16), local_size=(16, 8), local_bands=((0.0, 0.5),))


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> list[CropSet]:
    """33 and 20 crops; row 7 of the second does not decode."""
    folder = tmp_path_factory.mktemp("sets")
    return [crop_set.write(folder / "a", 33, seed=1), crop_set.write(folder / "b", 20, seed=2, no_images=(7,))]


def mixed(sets: list[CropSet], *weights: float) -> StreamConfig:
    return replace(CONFIG, mix=tuple(str(part.folder) for part in sets), weights=weights)


def test_stream__of_a_mix_counts_on_and_keeps_labels_apart(sets: list[CropSet]) -> None:
    data = load_data(mixed(sets), STORAGE)
    stream = data.stream(STORAGE, CONFIG)
    samples = np.array([52, 0, 33, 32, 40, 0])
    rows, jpegs = stream.fetch(samples)
    assert rows.tolist() == samples.tolist() and data.rows == stream.rows == 53
    both = [*sets[0].jpegs, *sets[1].jpegs]
    assert jpegs == [both[sample] for sample in samples.tolist()]
    expected = [*np.arange(33) // 2, *(LABELS_APART + np.arange(20) // 2)]
    assert stream.pid.tolist() == expected
    assert stream.camera[[0, 32, 33]].tolist() == [1, 3, LABELS_APART + 1]
    assert stream.bytes_read == sum(part.bytes_read for part in stream.streams)  # type: ignore[union-attr]
    rows, jpegs = stream.replace(40, 40, "does not decode")
    assert rows.tolist() == [41] and jpegs == [sets[1].jpegs[8]] and stream.replaced == 1
    stream.close()


def test_labels__that_are_unknown_stay_unknown(sets: list[CropSet], tmp_path: Path) -> None:
    (tmp_path / "crops").mkdir()
    (tmp_path / "crops" / "nobody.jpg").write_bytes(sets[0].jpegs[0])
    (tmp_path / "crops" / "0005_c2s1_000001_00.jpg").write_bytes(sets[0].jpegs[1])
    found = ingest([str(tmp_path / "crops")], str(tmp_path / "set"), ShardConfig(workers=1), STORAGE).manifest
    stream = Data((sets[0].manifest, found), (1, 1)).stream(STORAGE, CONFIG)
    assert isinstance(stream, MixedStream) and stream.pid is stream.pid
    assert sorted(stream.pid[33:].tolist()) == [-1, LABELS_APART + 5]
    assert sorted(stream.camera[33:].tolist()) == [-1, LABELS_APART + 2]
    stream.close()


@pytest.mark.parametrize("weights", [(), (1.0, 3.0)])
def test_loader__a_mix_goes_through_the_order(sets: list[CropSet], weights: tuple[float, ...]) -> None:
    """Over more than an epoch, in a world of two; the crop that does not decode has its substitute's label."""
    data = load_data(mixed(sets, *weights), STORAGE)
    assert data.weights == ((1, 3) if weights else (33, 20))
    order = data.order(9, CONFIG)
    found = {}
    for rank in range(2):
        with Loader(data.stream(STORAGE, CONFIG), order, SPEC, seed=4, global_batch=12, rank=rank, world=2,
                    micro_batch=4, config=CONFIG) as loader:  # fmt: skip
            for batch in loader.after(0, 60):
                real = batch.position >= 0
                seen = zip(batch.sample[real].tolist(), batch.label[real].tolist(), strict=True)
                found.update(zip(batch.position[real].tolist(), seen, strict=True))
    samples = order.samples(np.arange(60))
    labels = [*np.arange(33) // 2, *(LABELS_APART + np.arange(20) // 2)]
    labels[40] = labels[41]
    assert found == {place: (sample, labels[sample]) for place, sample in enumerate(samples.tolist())}
    assert 40 in samples
    if not weights:
        assert sorted(samples[:53].tolist()) == list(range(53))


def test_loader__batches_of_identities_in_place_of_the_plain_order(sets: list[CropSet]) -> None:
    stream = load_data(replace(CONFIG, manifest=str(sets[0].folder)), STORAGE).stream(STORAGE, CONFIG)
    order = IdentityOrder(stream.pid, seed=3, identities=4, instances=2)
    labels = {}
    for rank in range(2):
        with Loader(stream, order, SPEC, seed=4, global_batch=order.batch, rank=rank, world=2, micro_batch=4,
                    config=CONFIG) as loader:  # fmt: skip
            for batch in loader.after(16, 40):
                np.testing.assert_array_equal(batch.sample, order.samples(batch.position))
                labels[batch.start, rank] = batch.label.reshape(2, 2)
    assert len(labels) == 6
    for start in (16, 24, 32):
        people = np.concatenate([labels[start, 0], labels[start, 1]])
        assert (people[:, 0] == people[:, 1]).all() and len(set(people[:, 0].tolist())) == 4


def test_data__of_one_set_is_not_mixed(sets: list[CropSet]) -> None:
    alone = load_data(mixed(sets[:1]), STORAGE)
    assert alone == load_data(replace(CONFIG, manifest=str(sets[0].folder)), STORAGE)
    assert alone.order(3, CONFIG) == Order(33, 3, 5, 3)
    assert (alone.id, alone.replaces) == (sets[0].manifest.id, ())


def test_data__equal_sets_do_not_go_in_step(sets: list[CropSet]) -> None:
    samples = load_data(mixed([sets[0], sets[0]]), STORAGE).order(0, CONFIG).samples(np.arange(66))
    assert (samples[::2] % 33 == samples[1::2] % 33).mean() < 0.3


def test_data__names_every_set_and_what_each_replaces(sets: list[CropSet]) -> None:
    one, other = (part.manifest for part in sets)
    heirs = replace(one, replaces=("a", "b")), replace(other, replaces=("c",))
    data = Data(heirs, (1, 1))
    assert data.id == f"{heirs[0].id}+{heirs[1].id}"
    assert set(data.replaces) == {f"{first}+{second}" for first in (heirs[0].id, "a", "b")
                                  for second in (heirs[1].id, "c")} - {data.id}  # fmt: skip


def test_data__a_selection_is_mixed_like_any_other(sets: list[CropSet]) -> None:
    part = select(str(sets[0].folder), SelectConfig(fraction=0.5), STORAGE).manifest
    chosen = part.selected(STORAGE).tolist()
    assert 0 < len(chosen) < 33
    data = Data((part, sets[1].manifest), (part.rows, 20))
    samples = data.order(1, CONFIG).samples(np.arange(data.rows))
    assert sorted(samples.tolist()) == list(range(data.rows))
    stream = data.stream(STORAGE, CONFIG)
    jpegs = [sets[0].jpegs[row] for row in chosen] + sets[1].jpegs
    assert stream.fetch(samples).data == [jpegs[sample] for sample in samples.tolist()]
    stream.close()


def test_load_data__refuses_what_contradicts_itself(sets: list[CropSet], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no data set is given"):
        load_data(CONFIG, STORAGE)
    with pytest.raises(ConfigError, match="one data set is given, and several"):
        load_data(replace(mixed(sets), manifest=str(sets[0].folder)), STORAGE)
    with pytest.raises(ConfigError, match="1 weights are given for 2 data sets"):
        load_data(mixed(sets, 1.0), STORAGE)
    with pytest.raises(ConfigError, match="must be positive"):
        load_data(mixed(sets, 1.0, 0.0), STORAGE)
    with pytest.raises(ConfigError, match="too fine"):
        load_data(mixed(sets, 1.0, 1e-12), STORAGE)
    empty = Manifest(()).save(open_store(str(tmp_path)))
    with pytest.raises(DataError, match="lists no crops"):
        load_data(replace(CONFIG, mix=(str(sets[0].folder), empty.url)), STORAGE)
