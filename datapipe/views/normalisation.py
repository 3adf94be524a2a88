"""What images are normalised with: mean and deviation of each channel."""

from datapipe.core.config import Statistics

Triple = tuple[float, float, float]
IMAGENET_MEAN: Triple = (0.485, 0.456, 0.406)
IMAGENET_STD: Triple = (0.229, 0.224, 0.225)
"""Channel statistics (RGB, of values in 0..1) that all published pre-training recipes normalise with."""
MEAN_STD: dict[Statistics, tuple[Triple, Triple]] = {
    "imagenet": (IMAGENET_MEAN, IMAGENET_STD),
    "half": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
}
"""What images are normalised with. Fine-tuning in the references uses halves, their pre-training ImageNet's."""
