"""A package of others with a method, as it lies in a folder that Python imports from."""

import os
from pathlib import Path

from tests.support.golden import ROOT
from training.methods import GROUP

METHOD = '''
"""Mean colours: the student tells the mean colour of an image from its CLS."""

from typing import Literal

from pydantic import Field
from torch import nn

from datapipe.core.settings import settings
from datapipe.views.spec import padded
from training.core.precision import at_least_float32, lowered
from training.methods.base import Method, MethodSettings, Outcome, Role
from training.nn.vision_transformer import VisionTransformer


@settings
class ColoursConfig(MethodSettings):
    """Mean colours."""

    name: Literal["colours"] = "colours"
    """The method."""
    pad: int = Field(default=2, ge=0)
    """Black pixels around the image."""


class Student(nn.Module):
    def __init__(self, backbone):
        super().__init__()
        self.backbone = VisionTransformer(backbone)
        self.told = nn.Linear(self.backbone.width, 3)


class Colours(Method[ColoursConfig]):
    def __init__(self, config, backbone):
        super().__init__(config, backbone)
        self.student = Student(backbone)

    @staticmethod
    def views(config, views, backbone):
        return padded(views, size=backbone.size, pad=config.pad)

    def forward(self, views, progress):
        images, weight = views["image"][0], views["weight"]
        with lowered(self.precision, images.device):
            cls = self.student.backbone(images).cls
        told = self.student.told(at_least_float32(cls))
        loss = (told - images.mean(dim=(2, 3))).square().mean(dim=1)
        return Outcome((weight * loss).sum(), {}, {"loss_colour": loss.detach()})

    def roles(self):
        return {name: Role(decay=value.ndim > 1, depth=0) for name, value in self.named_parameters()}

    def backbone(self):
        return self.student.backbone
'''


def package(folder: Path, content: str = METHOD, *, target: str = "colours:Colours", name: str = "colours") -> Path:
    """An installed package, as Python sees it: a module, and a folder with metadata and its entry point."""
    (folder / f"{name}.py").write_text(content)
    metadata = folder / f"{name}-0.1.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 0.1\n")
    (metadata / "entry_points.txt").write_text(f"[{GROUP}]\n{name} = {target}\n")
    return folder


def environment(folder: Path) -> dict[str, str]:
    """For commands that are to find the packages in a folder."""
    return {"PYTHONPATH": os.pathsep.join((str(ROOT), str(folder)))}
