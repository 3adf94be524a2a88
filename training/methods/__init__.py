"""The methods, one file each, and the only place where their names are listed."""

from typing import Annotated

from pydantic import Field

from training.methods.base import Method
from training.methods.dino import Dino, DinoConfig
from training.methods.pass_reid import Pass, PassConfig
from training.methods.personmae import PersonMae, PersonMaeConfig
from training.methods.personvit import PersonVit, PersonVitConfig
from training.methods.supervised import Supervised, SupervisedConfig
from training.nn.vision_transformer import BackboneConfig

MethodConfig = Annotated[
    DinoConfig | PassConfig | PersonVitConfig | PersonMaeConfig | SupervisedConfig, Field(discriminator="name")
]
"""The settings of any method; a union told apart by `name`."""

METHODS: dict[str, type[Method]] = {
    "dino": Dino, "pass": Pass, "personvit": PersonVit, "personmae": PersonMae, "supervised": Supervised,
}  # fmt: skip
"""Name in a recipe -> class."""


def build(config: MethodConfig, backbone: BackboneConfig) -> Method:
    """The method a recipe asks for, freshly initialised (from PyTorch's global generator: seed it first)."""
    return METHODS[config.name](config, backbone)
