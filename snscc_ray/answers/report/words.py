"""Names and settings in words, for readers who do not know the paper."""

from __future__ import annotations

from snscc_ray.config.settings import (
    NO_ENCODER,
    BoostSettings,
    EncoderSettings,
    PretrainSettings,
    Recipe,
    TrainSettings,
)
from snscc_ray.texts import counted

STAGE_NAMES = {"pretrain": "Pretrain", "train": "Train", "boost": "Boost"}

STAGE_MEANING = {
    "pretrain": "learns, without any clusters, which images look alike",
    "train": "puts images and their look-alikes into the same cluster",
    "boost": "trains on its most confident answers, to sharpen the clusters",
}

# Figures shown over time: title, meaning, and whether the scale starts at 0.
FIGURES = {
    "loss/total": ("Loss", "The value that training lowers; only its trend means anything.", False),
    "health/score": ("Score", "Neighbour agreement times balance; higher is better.", True),
    "health/neighbor_agreement": (
        "Neighbour agreement",
        "How many of an image's ten closest look-alikes share its cluster.",
        True,
    ),
    "health/balance": ("Balance", "1: clusters of equal size. 0: all in one cluster.", True),
    "health/clusters_in_use": (
        "Clusters in use",
        "Clusters with at least a tenth of an equal share of the images.",
        True,
    ),
    "health/confidence": ("Mean confidence", "The mean confidence of all answers.", True),
    "health/confident_share": ("Confident share", "Images placed with 99% confidence.", True),
    "health/selected_share": ("Selected share", "Images that Boost learns from.", True),
    "health/projection_spread": (
        "Spread",
        "How far apart images are projected; near 0, all look the same to the network.",
        True,
    ),
    "health/effective_rank": (
        "Effective rank",
        "How many independent directions the features use.",
        True,
    ),
}

CRITERIA = {
    "stability": ("Stability", "How little the clusters change when the images are sampled again."),
    "silhouette": ("Silhouette", "How much closer images are to their own cluster than to others."),
    "eigengap": ("Eigengap", "How clearly the graph of look-alikes falls into that many parts."),
}

_ENCODERS = {
    "convnet": "a small ConvNet",
    "resnet18": "a ResNet-18",
    "resnet34": "a ResNet-34",
    "resnet50": "a ResNet-50",
}
_METHODS = {"simclr": "SimCLR", "moco": "MoCo", "byol": "BYOL"}


def in_words(recipe: Recipe, images: int) -> list[str]:
    """Describe the settings of a run in a few sentences."""
    data = recipe.data
    given = recipe.encoder.name == NO_ENCODER
    colour = "in colour" if data.channels == 3 else "in grey"
    what = f"images, resized to {data.image_size}×{data.image_size} pixels {colour}"
    if given:
        before = ["There was no encoder: the embeddings were given.", _mixed(recipe.encoder.views)]
    else:
        before = _frozen(recipe) if recipe.encoder.frozen else _trained(recipe)
    return [
        f"{images:,} {'embeddings' if given else what}, in {data.num_clusters} clusters.",
        *before,
        _train(recipe.train),
        _boost(recipe.boost),
        f"All random numbers come from the seed {recipe.seed}.",
    ]


def _trained(recipe: Recipe) -> list[str]:
    weights = recipe.encoder.weights
    start = "trained from scratch" if weights is None else "with pretrained weights"
    return [f"The encoder is {_name(recipe.encoder)}, {start}.", _pretrain(recipe.pretrain)]


def _frozen(recipe: Recipe) -> list[str]:
    parts = recipe.encoder.each()
    names, many = " and ".join(map(_name, parts)), len(parts) > 1
    learns = "the cluster heads" if recipe.train.adapter == "none" else "an adapter and the heads"
    labels = (
        "It was trained on ImageNet with its labels, so the clusters are not learned from your "
        "images alone."
        if any(part.name.startswith("pip:") for part in parts)
        else "What it was trained on, and whether with labels, is not known here."
    )
    return [
        f"The encoder{'s are' if many else ' is'} {names}, with pretrained weights.",
        f"{'They keep their' if many else 'It keeps its'} weights, so Pretrain was skipped: the "
        f"features were computed once, and only {learns} learnt from these images.",
        labels,
        "On such features it cannot be measured whether clusters were forced to be of even sizes.",
    ]


def _name(encoder: EncoderSettings) -> str:
    width = f" of width {encoder.width}" if encoder.name == "convnet" else ""
    return f"{_ENCODERS.get(encoder.name, encoder.name)}{width}"


def _pretrain(pretrain: PretrainSettings) -> str:
    if pretrain.epochs == 0:
        return "Pretrain was skipped: the encoder keeps its weights."
    method = _METHODS.get(pretrain.method, pretrain.method)
    return (
        f"Pretrain: {_epochs(pretrain.epochs)} by {method}, in batches of {pretrain.batch_size}. "
        "It learns similar features for two augmented views of the same image."
    )


def _mixed(views: int) -> str:
    if not views:
        return "No views were made of the embeddings."
    return (
        f"Each embedding has {counted(views, 'view')}: a mixture of it with a near one, which "
        "stands for an augmented image."
    )


def _train(train: TrainSettings) -> str:
    uneven = (
        f"; the largest cluster may be {train.max_imbalance:g} times the smallest"
        if train.max_imbalance > 1
        else ""
    )
    return (
        f"Train: {_epochs(train.epochs)}. It puts each image into the cluster of its "
        f"{counted(train.num_neighbors, 'nearest neighbour')}; closer ones count more. "
        f"An entropy term (weight {train.entropy_weight:g}) keeps clusters from becoming "
        f"empty{uneven}."
    )


def _boost(boost: BoostSettings) -> str:
    if boost.epochs == 0:
        return "Boost was skipped."
    return (
        f"Boost: {_epochs(boost.epochs)}, on the clusters of images with a confidence of at least "
        f"{boost.confidence_threshold:.0%}."
    )


def _epochs(count: int) -> str:
    return counted(count, "pass", "passes") + " over the images"
