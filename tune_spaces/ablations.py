"""The paper's ablations (Section IV-D) and its comparison of pretext methods (Section IV-E-4)."""

from __future__ import annotations

from typing import Any

from snscc_ray.config.settings import Recipe
from tune_spaces.paper import TABLE_IV, TABLE_V, TABLE_VII
from tune_spaces.space import Claim, Point, Space

# Every kind of soft neighbours in our objectives: from the batch, its views and the dataset.
NO_SOFT_NEIGHBORS = {
    "train.local_weight": 0.0,
    "train.global_weight": 0.0,
    "train.mined_weight": 0.0,
    "boost.soft_weight": 0.0,
}


def ablation_train(recipe: Recipe) -> Space:
    """Table V: one, two or three losses of Train. The entropy is always on.

    The loss on neighbours mined over the whole dataset (train.mined_weight) is not one of the
    table's three losses but an addition of `soft`. It is off in all five rows. Otherwise even the
    row without neighbours would gain the effect that the other rows measure.
    """
    rows = {
        "local": (1, 0, 0),
        "global": (0, 1, 0),
        "cluster": (0, 0, 1),
        "local + global": (1, 1, 0),
        "local + global + cluster": (1, 1, 1),
    }

    def overrides(local: int, wide: int, cluster: int) -> dict[str, Any]:
        return {
            "train.local_weight": local * recipe.train.local_weight,
            "train.global_weight": wide * recipe.train.global_weight,
            "train.cluster_weight": cluster * recipe.train.cluster_weight,
            "train.mined_weight": 0.0,
        }

    best = "local + global + cluster"
    return Space(
        name="ablation-train",
        title="Losses of Train",
        points=tuple(Point(name, overrides(*used), "train") for name, used in rows.items()),
        axis="losses",
        stages=("train",),
        form="bar",
        claims=(
            Claim(
                best, "train", "the three losses together are the best of five choices", "Table V"
            ),
        ),
        paper={name: {"train": figures} for name, figures in TABLE_V.items()},
        where="Table V",
    )


def ablation_boost(recipe: Recipe) -> Space:
    """Fig. 7: Train without Boost, and Boost with either or both of its losses."""
    return Space(
        name="ablation-boost",
        title="Losses of Boost",
        points=(
            Point("Train alone", {}, last_stage="train"),
            Point("pseudo-label loss", {"boost.soft_weight": 0.0}),
            Point("soft loss", {"boost.label_weight": 0.0}),
            Point("both", {}),
        ),
        axis="losses",
        stages=("boost",),
        form="bar",
        claims=(
            Claim(
                "both",
                "boost",
                "both losses together are better than either, and than Train alone",
                "Fig. 7, Section IV-D-2",
            ),
        ),
        paper={
            name: {"boost": {"Train alone": figures["train"], "both": figures["boost"]}}
            for name, figures in TABLE_IV.items()
        },
        where="Fig. 7",
    )


def train_longer(recipe: Recipe) -> Space:
    """Fig. 8: Train for as many epochs as Train and Boost have together (in the paper 700)."""
    train, boost = recipe.train.epochs, recipe.boost.epochs
    longer, both = f"Train {train + boost}", f"Train {train} + Boost {boost}"
    return Space(
        name="train-longer",
        title="Train for longer, or Train and Boost",
        points=(
            Point(longer, {"train.epochs": train + boost}, last_stage="train"),
            Point(both, {}),
        ),
        axis="epochs",
        stages=("boost",),
        form="curves",
        claims=(
            Claim(
                both,
                "boost",
                "Train and Boost are better than as many epochs of Train",
                "Fig. 8, Section IV-D-3",
            ),
        ),
        paper={name: {"boost": {both: figures["boost"]}} for name, figures in TABLE_IV.items()},
        where="Fig. 8",
    )


def pretext(recipe: Recipe) -> Space:
    """Table VII: SimCLR and MoCo, each without and with soft neighbours (SN).

    Without them, Train has its cluster loss and the entropy, and Boost its pseudo-label loss.
    All other Pretrain settings are the recipe's, made for one of the two methods. With a SimCLR
    recipe, MoCo gets a queue of four batches and a key momentum of 0.99. The values for ImageNet
    (65,536 and 0.999) are too long for a short run, and a queue larger than the dataset contains
    every row's own image.
    """
    moco: dict[str, Any] = {"pretrain.method": "moco"}
    if recipe.pretrain.method == "simclr":
        moco["pretrain.queue_size"] = 4 * recipe.pretrain.batch_size
        moco["pretrain.key_momentum"] = 0.99
    simclr = {"pretrain.method": "simclr"}
    return Space(
        name="pretext",
        title="Pretext, without and with soft neighbours (SN)",
        points=(
            Point("SimCLR", simclr | NO_SOFT_NEIGHBORS),
            Point("SimCLR + SN", simclr),
            Point("MoCo", moco | NO_SOFT_NEIGHBORS),
            Point("MoCo + SN", moco),
        ),
        axis="pretext",
        stages=("train", "boost"),
        form="bar",
        claims=(
            Claim(
                "MoCo + SN", "train", "MoCo with soft neighbours is the best of four", "Table VII"
            ),
            Claim(
                "MoCo + SN",
                "boost",
                "MoCo with soft neighbours is the best of four in Boost too",
                "Table VII, all but ACC on ImageNet-10",
            ),
        ),
        paper=TABLE_VII,
        where="Table VII",
    )
