"""The typed settings of a Recipe; each field declares its own bounds.

A Recipe is immutable, rejects unknown fields, and converts to JSON and back without loss.
Names of the paper's symbols: ε is `train.entropy_weight`, γ is `boost.confidence_threshold`,
σ is `boost.top_fraction`, K is `num_neighbors`.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from snscc_ray.config.paths import expanded

Fraction = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]
Bits = Annotated[int, Field(ge=1, le=8)]


def _ascending(value: tuple[float, float]) -> tuple[float, float]:
    if value[0] > value[1]:
        raise ValueError("give the smaller number first")
    return value


Range = Annotated[tuple[NonNegative, NonNegative], AfterValidator(_ascending)]
StageName = Literal["pretrain", "train", "boost"]
STAGES: tuple[StageName, ...] = ("pretrain", "train", "boost")

Operation = Literal[
    "identity", "autocontrast", "equalize", "brightness", "color", "contrast", "sharpness",
    "posterize", "solarize", "rotate", "shear_x", "shear_y", "translate_x", "translate_y",
]  # fmt: skip
OPERATIONS: tuple[Operation, ...] = (
    "identity", "autocontrast", "equalize", "brightness", "color", "contrast", "sharpness",
    "posterize", "solarize", "rotate", "shear_x", "shear_y", "translate_x", "translate_y",
)  # fmt: skip


class Settings(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)


class DataSettings(Settings):
    """Source and format of the images, and how they are loaded."""

    source: Literal[
        "auto", "digits", "cifar10", "cifar20", "stl10", "imagenet", "folder", "shards",
        "embeddings",
    ]  # fmt: skip
    path: str | None = Field(None, description="folder or file; `auto` looks at what it holds")
    download: bool = Field(False, description="let torchvision fetch CIFAR or STL-10 into path")
    column: str | None = Field(
        None, description="of embeddings in Parquet files; None: the one so named, or the only one"
    )
    classes: tuple[str, ...] = Field((), description="ImageNet folder names to keep, in order")
    num_clusters: Annotated[int, Field(ge=2)]
    image_size: Annotated[int, Field(ge=4, le=1024)] = Field(description="side, in pixels")
    channels: Literal[1, 3] = 3
    mean: tuple[float, ...] | None = Field(None, description="per channel, of [0, 1] values")
    std: tuple[float, ...] | None = Field(None, description="None: measured on the images")
    folders_are_labels: bool | Literal["deepest"] = Field(
        False,
        description="sub-folder names become labels: the first (below train, val and so on), or "
        "the deepest",
    )
    value_range: tuple[float, float] | None = Field(
        None, description="black and white values of 16- and 32-bit images; None: measured"
    )
    background: Annotated[int, Field(ge=0, le=255)] | None = Field(
        None,
        description="grey level behind transparent pixels; None: white if the content shows on it",
    )
    max_pixels: Count = Field(
        500_000_000, description="of an image; larger images count as unreadable"
    )
    skip_corrupt: bool = Field(False, description="count and leave out unreadable images")
    limit: Count | None = Field(None, description="keep only the first rows (a quick try)")
    mode: Literal["auto", "resident", "stream"] = Field(
        "auto", description="all in memory, or read again each epoch; auto: by size and memory"
    )
    memory_mb: Count = Field(
        1024, description="memory limit of a streamed dataset, in MB per worker"
    )
    augment_in: Literal["device", "data"] = Field(
        "device", description="where a streamed set's views are made: data: where it is decoded"
    )

    @model_validator(mode="after")
    def _channels_agree(self) -> DataSettings:
        for name in ("mean", "std"):
            value = getattr(self, name)
            if value is not None and len(value) != self.channels:
                raise ValueError(f"{name} needs one number per channel (channels={self.channels})")
        if self.value_range is not None and not self.value_range[0] < self.value_range[1]:
            raise ValueError("value_range needs the smaller number first")
        if self.std is not None and min(self.std) <= 0:
            raise ValueError("std must be above 0")
        return self


class SimclrView(Settings):
    """SimCLR's view with SCAN's settings: random resized crop, flip, colour jitter, grayscale."""

    kind: Literal["simclr"] = "simclr"
    crop_scale: Range = (0.2, 1.0)
    crop_ratio: Range = (3 / 4, 4 / 3)
    flip: Fraction = 0.5
    brightness: NonNegative = 0.4
    contrast: NonNegative = 0.4
    saturation: NonNegative = 0.4
    hue: Annotated[float, Field(ge=0, le=0.5)] = 0.1
    jitter: Fraction = Field(0.8, description="probability of the colour jitter")
    grayscale: Fraction = 0.2
    rotate_degrees: Annotated[float, Field(ge=0, le=180)] = 0.0


class StrongView(Settings):
    """`num_operations` random operations of Table III per image, then Cutout."""

    kind: Literal["strong"] = "strong"
    operations: tuple[Operation, ...] = Field(OPERATIONS, min_length=1)
    num_operations: Annotated[int, Field(ge=0)] = 4
    enhance: Range = Field((0.05, 0.95), description="brightness, colour, contrast, sharpness")
    posterize_bits: Annotated[tuple[Bits, Bits], AfterValidator(_ascending)] = (4, 8)
    solarize_threshold: Range = (0, 256)
    rotate_degrees: Annotated[float, Field(ge=0, le=180)] = 30.0
    shear: NonNegative = 0.1
    translate: Fraction = Field(0.1, description="of the side")
    crop_scale: Range = Field((1.0, 1.0), description="random resized crop before the operations")
    flip: Fraction = 0.5
    cutout: Annotated[int, Field(ge=0)] = Field(description="side of the square, in pixels")


View = Annotated[SimclrView | StrongView, Field(discriminator="kind")]


NO_ENCODER = "none"  # the name of the encoder if the rows are embeddings already
BUILT_IN = ("convnet", "resnet18", "resnet34", "resnet50")
LIBRARIES = ("torchvision", "timm", "pip")  # of encoders, implemented in models.libraries


def _an_encoder(name: str) -> str:
    library, _, model = name.partition(":")
    if name not in BUILT_IN and (library not in LIBRARIES or not model):
        raise ValueError(
            "use 'convnet', 'resnet18', 'resnet34' or 'resnet50', or a model of a library as "
            "torchvision:NAME, timm:NAME or pip:NAME"
        )
    return name


def _from_anywhere(weights: str) -> str:
    # An absolute path, because workers may start in another folder or on another machine.
    known = weights == "default" or "://" in weights
    return weights if known else str(expanded(weights).absolute())


def _an_encoder_or_none(name: str) -> str:
    return name if name == NO_ENCODER else _an_encoder(name)


EncoderName = Annotated[str, AfterValidator(_an_encoder)]
Weights = Annotated[str, AfterValidator(_from_anywhere)]


class FurtherEncoder(Settings):
    """A further frozen encoder, whose features are appended to those of the first."""

    name: EncoderName
    stem: Literal["small", "standard"] = "small"
    width: Count = 64
    weights: Weights


class EncoderSettings(Settings):
    name: Annotated[str, AfterValidator(_an_encoder_or_none)] = Field(
        description="convnet, resnet18, resnet34, resnet50, torchvision:NAME, timm:NAME, pip:NAME, "
        "or none: the rows are embeddings already"
    )
    stem: Literal["small", "standard"] = Field(
        "small", description="of the ResNets named here; small: 3×3, no max-pool"
    )
    width: Count = Field(64, description="of convnet: channels of the first block")
    weights: Weights | None = Field(
        None,
        description="what the encoder starts from: `default` (the library's own), or a checkpoint, "
        "file or URL; None: random",
    )
    frozen: bool = Field(
        False,
        description="do not train the encoder: compute its features once, and train an adapter and "
        "the cluster heads on them",
    )
    views: Annotated[int, Field(ge=0, le=64)] = Field(
        1,
        description="of a frozen encoder: augmented views of each image whose features are kept; "
        "of embeddings: mixtures with a neighbour",
    )
    views_seed: Annotated[int, Field(ge=0, lt=2**31)] = Field(
        0, description="of those views: not the run's seed, so that runs can share the features"
    )
    components: Annotated[int, Field(ge=0)] = Field(
        128, description="of a frozen encoder: principal components of its features; 0: all"
    )
    further: tuple[FurtherEncoder, ...] = Field(
        (), description="frozen encoders whose features are appended"
    )

    def each(self) -> tuple[EncoderSettings, ...]:
        """Return the settings of each encoder whose features are used; none for embeddings."""
        if self.name == NO_ENCODER:
            return ()
        first = self.model_copy(update={"further": (), "frozen": False})
        return first, *(EncoderSettings(**other.model_dump()) for other in self.further)

    @model_validator(mode="after")
    def _weights_fit(self) -> EncoderSettings:
        if self.name == "convnet" and self.weights == "default":
            raise ValueError(
                "convnet has no default weights; use encoder.name=resnet18, or leave "
                "encoder.weights out"
            )
        if self.name == NO_ENCODER:
            if not self.frozen or self.weights is not None or self.further:
                raise ValueError(
                    "encoder.name=none is for embeddings; set encoder.frozen=true, and leave "
                    "encoder.weights and encoder.further out"
                )
            return self
        if self.frozen and self.weights is None:
            raise ValueError(
                "a frozen encoder needs trained weights; set encoder.weights=default for the "
                "library's own, or encoder.weights=PATH"
            )
        if self.further and not self.frozen:
            raise ValueError("several encoders must be frozen; set encoder.frozen=true")
        return self


class StageSettings(Settings):
    """Settings of every stage: epochs, batch size, optimizer and learning-rate schedule."""

    epochs: Annotated[int, Field(ge=0)]
    batch_size: Annotated[int, Field(ge=2)] = Field(description="global, over all workers")
    optimizer: Literal["sgd", "adam", "adamw"] = "adam"
    learning_rate: Positive = 1e-4
    weight_decay: NonNegative = 1e-4
    momentum: Fraction = Field(0.9, description="of SGD")
    schedule: Literal["cosine", "constant", "step"] = "constant"
    warmup_epochs: NonNegative = 0
    milestones: tuple[Count, ...] = Field((), description="epochs at which `step` decays")
    decay: Positive = Field(0.1, description="factor at each milestone")
    clip_norm: Positive | None = None


class PretrainSettings(StageSettings):
    """Pretrain with Eq. 1 (SimCLR), MoCo-v2, or BYOL (which has no temperature)."""

    method: Literal["simclr", "moco", "byol"] = "simclr"
    temperature: Positive = 0.1
    projection_dim: Count = 128
    projection_hidden: Count = 512
    view: View = SimclrView()
    mined_neighbors: Count = Field(20, description="neighbours mined over the whole set at the end")
    key_momentum: Fraction = Field(
        0.999, description="MoCo, BYOL: momentum of the slow copy; BYOL's rises to 1 from here"
    )
    queue_size: Count = Field(65536, description="MoCo: number of negatives kept")


class TrainSettings(StageSettings):
    """Eqs. 2-10. `soft` works in practice, `paper` is literal, `released` is the authors' code."""

    objective: Literal["soft", "paper", "released"] = "soft"
    num_neighbors: Count = Field(10, description="K")
    entropy_weight: NonNegative = Field(5.0, description="ε")
    max_imbalance: Annotated[float, Field(ge=1, allow_inf_nan=False)] = Field(
        1.0, description="ratio of the largest to the smallest cluster that costs nothing"
    )
    local_weight: NonNegative = Field(1.0, description="α1")
    global_weight: NonNegative = Field(1.0, description="α2")
    cluster_weight: NonNegative = Field(1.0, description="of Eq. 7")
    mined_weight: NonNegative = Field(1.0, description="of neighbours mined over the whole set")
    mined_from: Literal["images", "predictions"] = Field(
        "images",
        description="images: one mined neighbour's augmented image per row, with gradient; "
        "predictions: the last predictions of all K, without (a third less work, no random access)",
    )
    temperature: Positive = Field(1.0, description="τ of Eq. 7")
    agreement: Literal["linear", "log"] = Field("linear", description="-O, or -log O")
    head: Literal["prototype", "linear"] = "prototype"
    start: Literal["kmeans", "cut", "both"] = Field(
        "kmeans",
        description="where the prototypes of the heads start: centres of k-means on the features, "
        "parts of a normalised cut of the neighbour graph, or some heads each",
    )
    adapter: Literal["none", "linear", "mlp"] = Field(
        "none",
        description="of a frozen encoder: what is trained between its features and the heads; both "
        "start as the identity",
    )
    num_heads: Count = 3
    head_scale: Positive = Field(10.0, description="prototype head: logits = scale × cosine")
    view: View
    original_view: View | None = Field(None, description="None: the clean image")

    @model_validator(mode="after")
    def _imbalance_is_for_soft(self) -> TrainSettings:
        if self.max_imbalance > 1 and self.objective != "soft":
            raise ValueError(
                f"max_imbalance={self.max_imbalance:g} is for objective=soft and has no effect "
                f"with objective={self.objective}; use objective=soft, or leave max_imbalance out"
            )
        return self


class BoostSettings(StageSettings):
    """Eqs. 11-14."""

    confidence_threshold: Fraction = Field(0.99, description="γ")
    top_fraction: Fraction = Field(0.7, description="σ")
    num_neighbors: Count = Field(10, description="K")
    soft_weight: NonNegative = Field(1.0, description="β1")
    label_weight: NonNegative = Field(1.0, description="β2")
    agreement: Literal["linear", "log", "bce"] = Field(
        "linear", description="-O, -log O, or Eq. 12 to the letter"
    )
    selection: Literal["dataset", "batch"] = Field(
        "dataset", description="pseudo-labels from a clean pass per epoch, or from the mini-batch"
    )
    score_tolerance: Fraction = Field(
        0.001,
        description="how far the label-free score may fall before Boost is undone; it falls when "
        "clusters leave the pretext's neighbours, for worse or for better",
    )
    view: View


class RuntimeSettings(Settings):
    """How to run, not what to learn: no field here changes a stage's identity."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    compile: bool = Field(
        False, description="torch.compile what is trained: minutes once, then faster steps on a GPU"
    )
    decode_workers: Annotated[int, Field(ge=0)] = Field(0, description="0: one per CPU core")
    checkpoint_seconds: NonNegative = Field(30.0, description="at most this much work is lost")
    max_failures: Annotated[int, Field(ge=0)] = Field(
        8, description="on Ray: how often lost workers are started again"
    )
    checkpoint_steps: Count | None = Field(None, description="also after so many steps")


class Recipe(Settings):
    """Everything needed to repeat a run."""

    name: str
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    precision: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="auto: bfloat16 autocast on a GPU, float32 on a CPU"
    )
    data: DataSettings
    encoder: EncoderSettings
    pretrain: PretrainSettings
    train: TrainSettings
    boost: BoostSettings
    runtime: RuntimeSettings = RuntimeSettings()

    @model_validator(mode="after")
    def _frozen_encoders_get_their_channels(self) -> Recipe:
        if self.encoder.frozen and self.data.channels == 1 and self.data.mean is None:
            raise ValueError(
                "a frozen encoder gets colour images, grey ones too: set data.channels=3, or, for "
                "an encoder trained on grey images, data.mean and data.std"
            )
        return self

    @model_validator(mode="after")
    def _enough_neighbors_are_mined(self) -> Recipe:
        if self.train.num_neighbors > self.pretrain.mined_neighbors:
            raise ValueError(
                f"train.num_neighbors={self.train.num_neighbors} is more than "
                f"pretrain.mined_neighbors={self.pretrain.mined_neighbors}; raise that too"
            )
        return self
