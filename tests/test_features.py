from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from rich.console import Console

from snscc_ray.answers.features import RunImages, kept_features, own_images, stage_features
from snscc_ray.answers.predict import load_model
from snscc_ray.config.errors import UserError
from snscc_ray.config.settings import STAGES, StageName
from snscc_ray.core.display import Display
from snscc_ray.core.views import clean_view
from snscc_ray.data.names import Names
from snscc_ray.runs.local import run_here
from snscc_ray.runs.run import Request
from tests.conftest import TINY

CPU = torch.device("cpu")
QUIET = Console(quiet=True)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "digits"
    run_here(Request("digits", list(TINY), folder), QUIET)
    return folder


@pytest.fixture(scope="module")
def own(finished: Path) -> RunImages:
    return own_images(finished, CPU, Display(QUIET))


@pytest.mark.parametrize("stage", STAGES)
def test_features_are_those_of_the_stage_and_are_kept(own: RunImages, stage: StageName) -> None:
    assert kept_features(own.folder, stage, len(own.catalog)) is None
    features_ND = stage_features(own, stage)
    kept = kept_features(own.folder, stage, len(own.catalog))
    assert kept is not None and torch.allclose(features_ND, kept)
    torch.testing.assert_close(
        features_ND.norm(dim=1), torch.ones(len(own.data)), atol=1e-3, rtol=0
    )
    if stage == "boost":  # the network that predict loads
        model = load_model(own.folder, "cpu")
        images = next(own.data.slices(0, len(own.data), 4096))
        model.network.eval()
        with torch.no_grad():
            z_ND = model.network(clean_view(images, model.normalize))[0]
        torch.testing.assert_close(features_ND, F.normalize(z_ND, dim=1), atol=1e-3, rtol=0)


def test_a_stage_trained_again_has_other_features(own: RunImages) -> None:
    stage_features(own, "boost")
    path = own.folder / "boost" / "stage.json"
    before = path.read_text()
    try:
        path.write_text(before.replace('"identity": "', '"identity": "0'))
        assert kept_features(own.folder, "boost", len(own.catalog)) is None
    finally:
        path.write_text(before)


def test_other_images_are_refused(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import snscc_ray.answers.features as features

    real = features.bring

    def fewer(*arguments):  # type: ignore[no-untyped-def]
        catalog, data = real(*arguments)
        names = Names.of(["another", *catalog.ids[1:]])
        catalog = replace(catalog, ids=names, fingerprint="another")
        return catalog, data

    monkeypatch.setattr(features, "bring", fewer)
    with pytest.raises(UserError, match=r"does not hold .*1 came and 1 went"):
        own_images(finished, CPU, Display(QUIET))
