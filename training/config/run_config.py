"""One frozen tree of settings configures a run."""

from typing import TYPE_CHECKING

from pydantic import Field

from datapipe.core.config import StorageConfig, StreamConfig, ViewConfig
from datapipe.core.settings import settings
from training.checkpoint.settings import CheckpointConfig
from training.config.cluster import ClusterConfig
from training.engine.settings import EngineConfig, OptimisationConfig
from training.methods import default_settings, settings_union
from training.nn.vision_transformer import BackboneConfig
from training.reid.settings import EvaluationConfig
from training.weights.initialise import InitConfig

if TYPE_CHECKING:
    from training.methods.base import MethodSettings as MethodConfig
else:
    MethodConfig = settings_union()


@settings
class RunConfig:
    out: str = "runs/pretraining"
    """Run folder, local or s3://bucket/prefix. Started again with the same folder, a run goes on."""
    seed: int = Field(default=0, ge=0)
    """Fixes initial weights, sample order, crops, colours and dropped paths."""
    samples_per_epoch: int = Field(default=0, ge=0)
    """Length of an epoch in samples; schedules hang on it. 0: the rows of the data set."""
    stream: StreamConfig = StreamConfig()
    """Where samples come from."""
    storage: StorageConfig = StorageConfig()
    """How object stores are reached."""
    views: ViewConfig = ViewConfig()
    """How views are cut and coloured."""
    backbone: BackboneConfig = BackboneConfig()
    """The vision transformer."""
    init: InitConfig = InitConfig()
    """Pretrained weights to start from."""
    method: MethodConfig = Field(default=default_settings(), discriminator="name")
    """The objective and its own settings; `name` chooses it."""
    optimisation: OptimisationConfig = OptimisationConfig()
    """Optimizer, schedules, precision."""
    engine: EngineConfig = EngineConfig()
    """How a step is carried out."""
    checkpoints: CheckpointConfig = CheckpointConfig()
    """What is saved, when, and how long it stays."""
    evaluation: EvaluationConfig = EvaluationConfig()
    """What is scored while the run goes on."""
    cluster: ClusterConfig = ClusterConfig()
    """Workers and restarts under Ray."""
