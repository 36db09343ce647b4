"""The built-in recipes: each function returns a complete Recipe."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from typing import Any, Literal

from snscc_ray.config.errors import UserError
from snscc_ray.config.settings import (
    BoostSettings,
    DataSettings,
    EncoderSettings,
    PretrainSettings,
    Recipe,
    SimclrView,
    StrongView,
    TrainSettings,
)

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_LIKE_IMAGENET: dict[str, Any] = {"mean": IMAGENET_MEAN, "std": IMAGENET_STD}
_RESNET18 = EncoderSettings(name="resnet18")
_RESNET18_96 = EncoderSettings(name="resnet18", stem="standard")

IMAGENET_10 = (
    "n02056570", "n02085936", "n02128757", "n02690373", "n02692877",
    "n03095699", "n04254680", "n04285008", "n04467665", "n07747607",
)  # fmt: skip
IMAGENET_DOGS = (
    "n02085936", "n02086646", "n02088238", "n02091467", "n02097130",
    "n02099601", "n02101388", "n02101556", "n02102177", "n02105056",
    "n02105412", "n02105855", "n02107142", "n02110958", "n02112137",
)  # fmt: skip


def digits() -> Recipe:
    """scikit-learn's 1,797 handwritten digits, 8×8: the whole method in two minutes on a laptop."""
    # A flip would turn one digit into another. Crops matter most: k-means on the pretext features
    # stays below .75 without them and passes .95 with them (docs/log.md).
    view = SimclrView(
        crop_scale=(0.4, 1.0), flip=0, saturation=0, hue=0, grayscale=0, rotate_degrees=18
    )
    return Recipe(
        name="digits",
        data=DataSettings(
            source="digits", num_clusters=10, image_size=8, channels=1, mean=(0.305,), std=(0.376,)
        ),
        encoder=EncoderSettings(name="convnet", width=24),
        pretrain=PretrainSettings(
            epochs=100,
            batch_size=256,
            optimizer="adam",
            learning_rate=1e-3,
            schedule="cosine",
            warmup_epochs=5,
            temperature=0.5,
            projection_dim=64,
            projection_hidden=128,
            view=view,
        ),
        train=TrainSettings(
            epochs=30,
            batch_size=256,
            learning_rate=1e-3,
            schedule="cosine",
            entropy_weight=10,
            mined_from="predictions",
            view=view,
        ),
        boost=BoostSettings(epochs=20, batch_size=256, schedule="cosine", view=view),
    )


def _paper(
    name: str,
    data: DataSettings,
    encoder: EncoderSettings,
    *,
    cutout: int,
    batches: tuple[int, int],
    entropy_weight: float = 5.0,
    confidence_threshold: float = 0.99,
    pretrain: PretrainSettings | None = None,
    mined_from: Literal["images", "predictions"] = "images",
) -> Recipe:
    """The paper's settings (Section IV-A-4), with batch sizes and pretext of the released code.

    batches: batch sizes of Train and Boost.
    """
    view = StrongView(cutout=cutout)
    return Recipe(
        name=name,
        data=data,
        encoder=encoder,
        pretrain=pretrain or _simclr(epochs=500),
        train=TrainSettings(
            epochs=500,
            batch_size=batches[0],
            entropy_weight=entropy_weight,
            mined_from=mined_from,
            view=view,
        ),
        boost=BoostSettings(
            epochs=200,
            batch_size=batches[1],
            confidence_threshold=confidence_threshold,
            view=view,
        ),
    )


def _simclr(epochs: int) -> PretrainSettings:
    """The paper's pretext settings for small images."""
    return PretrainSettings(
        epochs=epochs,
        batch_size=512,
        optimizer="sgd",
        learning_rate=0.4,
        schedule="cosine",
        # Not in the paper. At this rate from the first step, all projections collapse to one point
        # within an epoch and stay there for long (docs/log.md).
        warmup_epochs=10,
        temperature=0.1,
    )


_CIFAR10 = DataSettings(
    source="cifar10",
    num_clusters=10,
    image_size=32,
    mean=(0.491, 0.482, 0.447),
    std=(0.202, 0.199, 0.201),
)
_CIFAR20 = DataSettings(
    source="cifar20",
    num_clusters=20,
    image_size=32,
    mean=(0.507, 0.487, 0.441),
    std=(0.268, 0.257, 0.276),
)


def cifar10() -> Recipe:
    """CIFAR-10, train and test, with the paper's settings."""
    return _paper("cifar10", _CIFAR10, _RESNET18, cutout=16, batches=(256, 1000))


def cifar20() -> Recipe:
    """CIFAR-100 with its 20 superclasses, train and test, with the paper's settings."""
    return _paper("cifar20", _CIFAR20, _RESNET18, cutout=16, batches=(512, 1000))


def stl10() -> Recipe:
    """STL-10, train and test at 96 pixels, with the paper's settings."""
    return _paper(
        "stl10",
        DataSettings(source="stl10", num_clusters=10, image_size=96, **_LIKE_IMAGENET),
        _RESNET18_96,
        cutout=32,
        batches=(200, 512),
        entropy_weight=2.0,
    )


_MOCO = PretrainSettings(
    method="moco",
    epochs=500,
    batch_size=128,
    optimizer="sgd",
    learning_rate=0.03,
    schedule="cosine",
    temperature=0.2,
    projection_hidden=2048,
    queue_size=4096,
)


def _imagenet(name: str, classes: tuple[str, ...], **changed: Any) -> Recipe:
    """Some classes of an ImageNet folder, with a MoCo-v2 pretext and the paper's settings."""
    data = DataSettings(
        source="imagenet",
        classes=classes,
        num_clusters=len(classes),
        image_size=224,
        **_LIKE_IMAGENET,
    )
    encoder = EncoderSettings(name="resnet50", stem="standard")
    return _paper(name, data, encoder, cutout=75, batches=(128, 256), pretrain=_MOCO, **changed)


def imagenet10() -> Recipe:
    """ImageNet-10 from an ImageNet folder, MoCo-v2 pretext, with the paper's settings."""
    return _imagenet("imagenet10", IMAGENET_10)


def imagenet_dogs() -> Recipe:
    """ImageNet-Dogs from an ImageNet folder, MoCo-v2 pretext, with the paper's settings."""
    return _imagenet("imagenet_dogs", IMAGENET_DOGS, entropy_weight=10.0, confidence_threshold=0.95)


def images() -> Recipe:
    """Any folder of images or Parquet shards; data.num_clusters sets the number of clusters."""
    return _paper(
        "images",
        DataSettings(source="auto", num_clusters=10, image_size=64),
        _RESNET18,
        cutout=24,
        batches=(256, 256),
        mined_from="predictions",  # the dataset may be too large for random access
    )


def _best(
    name: str,
    data: DataSettings,
    encoder: EncoderSettings,
    *,
    cutout: int,
    epochs: tuple[int, int, int],
    confidence_threshold: float = 0.99,
) -> Recipe:
    """Our settings for ResNet-18 on a large GPU, combined from others' results.

    No GPU run has tested them at full length yet.
    Pretrain is the paper's SimCLR. It beat BYOL with three seeds on CIFAR-10, but only in what a
    CPU can afford: seconds of a small ConvNet (docs/log.md). Settings for BYOL close to ProPos
    (Huang et al., "Learning representation for clustering via prototype scattering and positive
    sampling", TPAMI 2022): pretrain.method=byol, learning_rate=.1, weight_decay=5e-4,
    projection_dim=256, projection_hidden=4096, key_momentum=.99.
    Train uses the 20 nearest neighbours in the dataset, as SCAN does (Van Gansbeke et al., ECCV
    2020), and ten heads; the label-free score keeps one. Boost uses SCAN's self-labelling rate.
    """
    view = StrongView(cutout=cutout)
    return Recipe(
        name=name,
        data=data,
        encoder=encoder,
        pretrain=_simclr(epochs[0]),
        train=TrainSettings(
            epochs=epochs[1],
            batch_size=512,
            schedule="cosine",
            num_neighbors=20,
            mined_from="predictions",
            num_heads=10,
            view=view,
        ),
        boost=BoostSettings(
            epochs=epochs[2],
            batch_size=1000,
            schedule="cosine",
            confidence_threshold=confidence_threshold,
            # A tolerance of .001 undid a Boost that had raised ACC (docs/log.md).
            score_tolerance=0.01,
            view=view,
        ),
    )


def cifar10_best() -> Recipe:
    """CIFAR-10 for accuracy, our settings; untested at full length (or encoder.name=resnet34)."""
    return _best("cifar10_best", _CIFAR10, _RESNET18, cutout=16, epochs=(500, 50, 50))


def cifar20_best() -> Recipe:
    """CIFAR-100's 20 superclasses for accuracy; untested at full length."""
    return _best(
        "cifar20_best",
        _CIFAR20,
        _RESNET18,
        cutout=16,
        epochs=(500, 50, 50),
        confidence_threshold=0.95,
    )


def imagenette() -> Recipe:
    """Imagenette (a folder or shards) at 96 pixels, for accuracy; untested at full length."""
    return _best(
        "imagenette",
        DataSettings(
            source="auto",
            num_clusters=10,
            image_size=96,
            **_LIKE_IMAGENET,
            folders_are_labels=True,
        ),
        _RESNET18_96,
        cutout=32,
        epochs=(1000, 100, 100),
    )


# fmt: off
RECIPES: dict[str, Callable[[], Recipe]] = {
    build.__name__: build
    for build in (
        digits, cifar10, cifar10_best, cifar20, cifar20_best, stl10, imagenet10, imagenet_dogs,
        imagenette, images,
    )
}
# fmt: on


def get(name: str) -> Recipe:
    """Return the recipe of that name. Raises UserError naming the nearest one."""
    if name not in RECIPES:
        near = difflib.get_close_matches(name, RECIPES, 1)
        hint = f"did you mean {near[0]}?" if near else "there are " + ", ".join(RECIPES)
        raise UserError(f"unknown recipe {name!r}: {hint}")
    return RECIPES[name]()
