"""The pre-training methods, one file each, and the only place where their names are listed."""

from training.backbone import BackboneConfig
from training.methods.base import Method
from training.methods.pass_reid import Pass, PassConfig
from training.methods.personmae import PersonMae, PersonMaeConfig

MethodConfig = PassConfig | PersonMaeConfig
"""The settings of any method; a union told apart by `name`."""

METHODS: dict[str, type[Method]] = {"pass": Pass, "personmae": PersonMae}
"""Name in a recipe -> class."""


def build(config: MethodConfig, backbone: BackboneConfig) -> Method:
    """The method a recipe asks for, freshly initialised (from PyTorch's global generator: seed it first)."""
    return METHODS[config.name](config, backbone)
