"""Every setting of the data side. `training` nests StorageConfig, StreamConfig and ViewConfig in its own tree."""

from typing import Literal

from pydantic import Field

from datapipe.core.settings import settings

Size = tuple[int, int]
"""(height, width) in pixels, always in this order."""
Range = tuple[float, float]
"""(lowest, highest)."""
Statistics = Literal["imagenet", "half"]
"""Names of channel means and deviations."""
Decode = Literal["none", "sample", "all"]
"""Which crops are decoded when a data set is verified: none, one in a hundred, or all."""


@settings
class StorageConfig:
    endpoint_url: str = ""
    """Address of an S3-compatible server, e.g. http://10.0.0.5:9000. Empty: AWS_ENDPOINT_URL or Amazon's own."""
    checksums: Literal["when_supported", "when_required"] = "when_supported"
    """Checksums boto3 adds to requests. "when_required" for older servers that answer 411 or store the framing."""
    attempts: int = Field(default=20, ge=1)
    """Most tries of one request. Waits between them grow from 0.2 to 10 s, with jitter; Retry-After is honoured."""
    give_up_s: float = Field(default=120.0, gt=0)
    """Seconds a request may keep failing (5xx, slow-down, resets, silence, cut bodies) before the error is final; a try
    that is under way then may add timeout_s. Refusals (403) are final at once."""
    timeout_s: float = Field(default=60.0, gt=0)
    """Seconds without an answer after which one try counts as failed."""


@settings
class ShardConfig:
    samples_per_shard: int = Field(default=10_000, ge=1)
    """Most crops in one tar."""
    shard_mb: float = Field(default=128.0, gt=0)
    """Most megabytes (10^6 bytes) in one tar, headers included; a single larger crop still gets a tar of its own."""
    min_size: Size = (32, 12)
    """Crops smaller than this (height, width), pixels, are quarantined as too small."""
    max_aspect: float = Field(default=8.0, gt=1)
    """Crops more than this many times as high as wide, or as wide as high, are quarantined."""
    max_pixels: int = Field(default=40_000_000, ge=1)
    """Images that claim more pixels are quarantined before they are decoded (decompression bombs)."""
    jpeg_quality: int = Field(default=95, ge=1, le=100)
    """Quality of the one re-encoding that images other than plain RGB JPEG get."""
    max_bad: float = Field(default=0.05, ge=0, le=1)
    """Share of quarantined crops above which the run fails; a look at quarantine.parquet tells why."""
    exclude: Literal["none", "exact", "near"] = "none"
    """Duplicates are marked in the index. "exact" leaves out all but one of the crops with the same bytes, "near" also
    those that look alike; quarantine.parquet then lists them. `stats` shows what that costs on labelled data."""
    near_within: Literal["source", "track", "none"] = "source"
    """Where near duplicates are looked for: in the whole source, among the crops of one track (crops without a track
    then have none), or nowhere."""
    sidecars: Literal["none", "json"] = "none"
    """"json" puts <key>.json with name and labels beside each <key>.jpg, for tools that do not read the index; about
    one kB more per crop."""
    seed: int = 0
    """Key of the hash that orders the crops: shards come out shuffled, the same way every time."""
    workers: int = Field(default=0, ge=0)
    """Processes that read, decode and write. 0: one per core. Each needs memory for two shards, 200 MB at least."""
    spool: str = ""
    """Folder or s3://bucket/prefix for the screened crops until their shards are written; needs about the room of the
    data set. Empty: inside a local output, in the temporary folder for a remote one. Emptied at the end; what a killed
    run left in it saves the next run the work."""


@settings
class SelectConfig:
    """Which crops a new version consists of: those that meet all criteria, applied in this order."""

    where: str = ""
    """A condition on columns of the index, e.g. 'height >= 128 and source == "lup" and duplicate_of == null'."""
    keys: str = ""
    """File with keys of crops: one a line, or a parquet file with a column `key`; local or s3://bucket/name."""
    names: str = ""
    """File with original names, the best first: one a line, a parquet file with a column `name`, or a pickled list such
    as the CFS ranking of LUPerson."""
    keep: float = Field(default=1.0, gt=0, le=1)
    """Share of the list of names that is kept, from its beginning."""
    exclude: Literal["none", "exact", "near"] = "none"
    """Keep one of several crops that are equal byte for byte ("exact"), or also of those that look nearly alike."""
    fraction: float = Field(default=1.0, gt=0, le=1)
    """Share of the crops, drawn by a hash of their keys: 0.03 is part of 0.1, whatever else is the same."""
    seed: int = 0
    """Key of that hash; others give other crops. With the seed of the data set the share is a few whole shards."""
    max_missing: float = Field(default=0.01, ge=0, le=1)
    """Share of a list that may be absent from the data set, as quarantined crops are; above it the command fails."""


@settings
class RemoveConfig:
    """Which crops go: those that meet all criteria."""

    source: str = ""
    """All crops of this source (its name as `stats` prints it), or the listed ones among them."""
    keys: str = ""
    """File with keys of crops: one a line, or a parquet file with a column `key`; local or s3://bucket/name."""
    names: str = ""
    """File with original names: one a line, a parquet file with a column `name`, or a pickled list."""
    max_missing: float = Field(default=0.0, ge=0, le=1)
    """Share of a list that may be absent from the data set; above it the command fails, and nothing is removed. What
    was removed before, and what was quarantined and so never was a part of it, is not absent."""
    runs: tuple[str, ...] = ()
    """Where copies of the crops may be: run folders (or folders of them), folders of features, local or
    s3://bucket/prefix, and folders of blocks on nodes (stream.cache_dir). Pictures, reports, dumps of batches and
    blocks are deleted, and rows of the crops in files of features, scores and pseudo labels; what else names a removed
    crop is listed."""
    duplicates: bool = False
    """Take out as well what is equal to such a crop byte for byte, whatever its name and source."""
    reason: str = ""
    """Why; noted in the record. Let it name nobody."""
    date: str = ""
    """When; noted in the record as it is given."""
    workers: int = Field(default=0, ge=0)
    """Processes. 0: one per core. Each needs memory for two tars."""


@settings
class ReshardConfig:
    """How the shards of a new data set are cut; as for `shard`."""

    samples_per_shard: int = Field(default=10_000, ge=1)
    """Most crops in one tar."""
    shard_mb: float = Field(default=128.0, gt=0)
    """Most megabytes (10^6 bytes) in one tar, headers included; a single larger crop still gets a tar of its own."""
    exclude: Literal["none", "exact", "near"] = "none"
    """Duplicates are marked anew. "exact" leaves out all but one of the crops with the same bytes, "near" also those
    that look alike."""
    near_within: Literal["source", "track", "none"] = "source"
    """Where near duplicates are looked for: in the whole source, among the crops of one track, or nowhere."""
    sidecars: Literal["none", "json"] = "none"
    """"json" puts <key>.json with name and labels beside each <key>.jpg."""
    seed: int = 0
    """Key of the hash that orders the crops."""
    workers: int = Field(default=0, ge=0)
    """Processes. 0: one per core. Each needs memory for two shards, 200 MB at least."""
    spool: str = ""
    """Folder or s3://bucket/prefix for the plan's rows, about 0.3 kB per crop. Empty: inside a local output, in the
    temporary folder for a remote one. Emptied at the end."""


@settings
class StreamConfig:
    manifest: str = ""
    """The data set: a folder or s3://bucket/prefix with a manifest (its newest version), or one manifest file."""
    mix: tuple[str, ...] = ()
    """Several data sets in place of `manifest`, each given like that. Sample ids count on from one to the next."""
    weights: tuple[float, ...] = ()
    """How often samples of each data set of `mix` come, in proportion: [3, 1], or [.7, .3]. Empty: as often as each has
    crops, so that an epoch is every crop once. Otherwise an epoch has that many samples too, but of a small data set
    with a large weight crops come several times, of the others not all."""
    assignment: Literal["node", "slice"] = "node"
    """Which rank gets which samples of a global batch. "slice": one after the other the next ones. "node": each block
    goes to the ranks of one machine as far as these have room; on a single machine this is slicing. Changes no result
    beyond rounding, unless the method couples the images of one rank."""
    assignment_version: Literal[1, 2] = 2
    """Rule by which "node" finds a machine for crops that have no room at their block's. 2: always the same few for a
    block, so that with 64 machines and batches of 1,024 a block is read by 2.9 of them. 1: the first one with room; by
    8.2 of them. A run goes on by the rule that it began with, whatever is set."""
    block: int = Field(default=256, ge=1)
    """Consecutive crops read together, at a few kB each. Larger blocks suit object storage, smaller ones mix better."""
    window: int = Field(default=2_048, ge=1)
    """Blocks whose crops are shuffled among one another."""
    threads: int = Field(default=0, ge=0)
    """Threads that decode and make views, per rank. 0: the cores divided by the ranks on this machine."""
    processes: int = Field(default=0, ge=0)
    """Processes per rank that decode and make views in place of threads, which then only fetch: threads of the process
    that trains delay the launching of a GPU's work. Same samples, same pixels. 0: threads do it."""
    prefetch: int = Field(default=3, ge=1)
    """Batches made ahead of the one being trained on."""
    cache_mb: float = Field(default=512.0, ge=0)
    """Memory per rank for blocks that are still to be used, in megabytes (10^6 bytes). 0: none."""
    cache_gb: float = Field(default=12.0, ge=0)
    """Disk per machine for blocks from object storage, in gigabytes (10^9 bytes), where a window does not fit into
    cache_mb. Twice a machine's share of a window (window x block crops) lets all of the next one be fetched ahead, less
    a part of it; with less than one share the crops of the blocks that do not fit are read one by one. The log and
    --dry-run say so, and how much would do. 0: none."""
    cache_dir: str = ""
    """Folder for them on a fast local disk, shared by the ranks of a machine and by runs. Packed indexes are there as
    well, 22 bytes a crop, and do not count. Empty: one of this user's among the temporary files."""
    reads: int = Field(default=8, ge=1)
    """Requests in flight per rank to object storage; raise it where a single request is slow. Local disks: unused."""
    requests_per_s: float = Field(default=0.0, ge=0)
    """Requests a second to object storage at which all ranks of a run together read crops, at most; tries that are
    repeated are not counted. Each rank gets an equal part. For stores that answer "slow down": S3 takes 5,500 a second
    of each prefix. 0: as many as `reads` allows."""
    max_bad: float = Field(default=0.001, ge=0, le=1)
    """Share of crops found broken while training above which the run fails (each is replaced, counted, logged)."""


@settings
class JitterConfig:
    probability: float = Field(default=0.8, ge=0, le=1)
    """Share of views whose colours are jittered."""
    brightness: float = Field(default=0.4, ge=0)
    """Factor drawn from U(max(0, 1 - b), 1 + b), as torchvision's ColorJitter does."""
    contrast: float = Field(default=0.4, ge=0)
    """Factor about the mean grey of the view, drawn as that of `brightness`."""
    saturation: float = Field(default=0.2, ge=0)
    """Factor between the grey image and the view, drawn as that of `brightness`."""
    hue: float = Field(default=0.1, ge=0, le=0.5)
    """Shift of the hue drawn from U(-h, h), in turns of the colour circle."""
    white_balance: float = Field(default=0.0, ge=0)
    """Each channel is scaled by exp(N(0, w)). Not in the published recipes; mimics cameras (see the demo recipe)."""


@settings
class ViewConfig:
    """How views are cut and coloured. Which views there are is the method's business."""

    version: Literal[1, 2, 3] = 3
    """Rules by which views become pixels. 3: bicubic views are resized in whole numbers of 16 bits, as torch does it
    (mean difference from Pillow .1 of 255, 3 times as fast). 2: bicubic views are Pillow's own. 1: as 2, but the first
    and the last row of a band of the body (PASS) are truncated shares of the height, which gives some bands one row
    more at some heights; from 2 on each band has the same number of rows, its share of the height truncated, as in the
    reference. A run goes on by the rules that it began with, whatever is set."""
    global_scale: Range = (0.4, 1.0)
    """Area of a global crop as a share of the image."""
    global_ratio: Range = (0.75, 4 / 3)
    """Width over height of a global crop. The published DINO and PASS recipes leave torchvision's square-ish default,
    which on slim person crops often falls back to the centre; (.375, .667) suits persons (PersonViT, HAP)."""
    local_scale: Range = (0.05, 0.4)
    """Area of a local crop as a share of the image, or of its band in PASS."""
    local_ratio: Range = (0.75, 4 / 3)
    """Width over height of a local crop."""
    flip: float = Field(default=0.5, ge=0, le=1)
    """Probability of a horizontal flip, drawn for each view."""
    jitter: JitterConfig = JitterConfig()
    """Colour jitter."""
    grey: float = Field(default=0.2, ge=0, le=1)
    """Probability that a view is made grey."""
    blur: tuple[float, float, float] = (1.0, 0.1, 0.5)
    """Probability of Gaussian blur on the first global, the second global and the local views."""
    blur_sigma: Range = (0.1, 2.0)
    """Standard deviation of the blur, pixels of the view."""
    solarise: tuple[float, float, float] = (0.0, 0.2, 0.0)
    """Probability of solarising (threshold 128) on the first global, the second global and the local views."""
    erase: tuple[float, float, float] = (0.0, 0.0, 0.0)
    """Probability of random erasing on the first global, the second global and the local views."""
    erase_area: Range = (0.02, 0.3)
    """Erased area as a share of the view."""
    interpolation: Literal["bicubic", "linear"] = "linear"
    """"linear": area when shrinking, linear when enlarging. "bicubic": antialiased, as all recipes named after a
    publication say; slower (`version` says how it rounds)."""
    statistics: Statistics = "imagenet"
    """What the device normalises with: ImageNet's channel means and deviations, as published pre-training does, or
    "half" (.5 and .5), as TransReID's fine-tuning does."""


@settings
class SynthConfig:
    """Rendered pedestrians: how many, how varied, how hard."""

    train_identities: int = Field(default=180, ge=0, le=9_000)
    """People in bounding_box_train."""
    test_identities: int = Field(default=60, ge=0, le=900)
    """People in query and bounding_box_test; none of them is in bounding_box_train."""
    cameras: int = Field(default=4, ge=2, le=9)
    """Cameras; everybody is seen by all of them."""
    images: int = Field(default=5, ge=2, le=999)
    """Images of each person by each camera. The first one of a test identity is a query, the others are the gallery."""
    seed: int = Field(default=0, ge=0)
    """Every image is a function of (seed, person, camera, number of the image)."""
    height: tuple[int, int] = (150, 320)
    """Lowest and highest image, pixels."""
    width: tuple[int, int] = (60, 130)
    """Narrowest and widest image, pixels."""
    quality: tuple[int, int] = (75, 95)
    """Lowest and highest JPEG quality."""
    camera_strength: float = Field(default=0.3, ge=0)
    """How much cameras differ in white balance, brightness, gamma, saturation and haze. 0: not at all; 1: so much that
    colour is no help."""
    light: float = Field(default=0.1, ge=0)
    """Spread of the brightness from image to image of one camera, as the sigma of its logarithm."""
    backgrounds: int = Field(default=16, ge=1)
    """Places, shared by all cameras. (Places of one camera each would give the camera away: a colour histogram then
    falls below chance.)"""
    occluder: float = Field(default=0.15, ge=0, le=1)
    """Share of images in which something stands in front of the person."""
    second_person: float = Field(default=0.09, ge=0, le=1)
    """Share of images in which somebody else stands behind."""
    box_jitter: float = Field(default=0.08, ge=0, le=0.5)
    """How far the box misses the person, as a share of its height and width."""
    workers: int = Field(default=0, ge=0)
    """Processes that render; the images do not depend on it. 0: one per core."""
