"""A fitted codec: better with training, of the measured scale, a pure function of its options, whole or not there."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from sitdist.build import codec_fit
from sitdist.build.codec_fit import HELD_OUT, CodecFit, CodecFitOptions, fit_codec, shared_views
from sitdist.build.writer import open_splits
from sitdist.config.load import parse
from sitdist.config.recipe import Recipe
from sitdist.distributed.ranks import Ranks
from sitdist.errors import CodecError, ConfigError, DataError, NonFiniteError
from sitdist.evaluate.metrics import Lpips
from sitdist.io.atomic import temporary_name
from sitdist.model.codec import VaeCodec, draw_latent, round_trip_psnr

RECIPE = parse(
    Recipe,
    {
        "name": "small",
        "image_size": 16,
        "codec": {"kind": "pca"},
        "val_views": 5,
        "splits": {"train": {"kind": "scene", "views": 45, "supersample": 1}},
    },
    "small",
)
SMALL = CodecFitOptions(channels=(4, 4), steps=1, batch=4)


@pytest.fixture(scope="module")
def train():
    return open_splits(RECIPE)["train"]


def weights(folder):
    return VaeCodec(str(folder)).identity()["weights_sha256"]


@pytest.mark.distributed
def test_a_fitted_codec_improves_and_its_latents_have_unit_variance(train, tmp_path):
    options = CodecFitOptions(channels=(8, 12), batch=8, seed=1)
    early = fit_codec(RECIPE, tmp_path / "early", replace(options, steps=2))
    late = fit_codec(RECIPE, tmp_path / "late", replace(options, steps=40))
    assert late.psnr > early.psnr + 1
    codec, views = VaeCodec(str(tmp_path / "late")), train.source.images(train.indices.tolist())
    assert codec.scale == late.scaling_factor
    moments = codec.encode_moments(views[1:])  # view 0 is held out
    noise = torch.randn(39, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    assert draw_latent(moments, noise).std().item() == pytest.approx(1.0, abs=0.02)
    assert (late.held_out, round_trip_psnr(codec, views[:1]).item()) == (1, pytest.approx(late.psnr, abs=1e-3))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["early", "late"]


@pytest.mark.distributed
def test_fitting_twice_gives_the_same_weights_and_every_option_gives_others(tmp_path):
    def fit(name, **changes):
        fit_codec(RECIPE, tmp_path / name, replace(SMALL, **changes))
        return weights(tmp_path / name)

    first = fit("first")
    assert fit("second") == first
    others = [
        fit("l1", loss="l1"),
        fit("lr", lr=1e-3),
        fit("seed", seed=1),
        fit("batch", batch=8),
        fit("views", views=20),
        fit("steps", steps=2),
        fit("bf16", precision="bf16"),
    ]
    assert len({first, *others}) == 8


def test_a_perceptual_distance_takes_part_in_the_loss(tmp_path):
    fit_codec(RECIPE, tmp_path / "without", SMALL)
    fit_codec(RECIPE, tmp_path / "with", SMALL, lambda _: lambda decoded, true: (decoded - true).abs().amax((1, 2, 3)))
    assert weights(tmp_path / "without") != weights(tmp_path / "with")


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    import torchvision

    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("lpips") / "alexnet.pth"
    torch.save(torchvision.models.alexnet(weights=None).state_dict(), path)
    return path


@pytest.mark.distributed
def test_lpips_can_be_trained_on_and_refuses_small_pictures_before_any_work(backbone, tmp_path):
    distance = Lpips(backbone).distance
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)).requires_grad_()
    distance(images, torch.zeros(2, 3, 32, 32)).sum().backward()
    assert images.grad.abs().amax() > 0
    with pytest.raises(DataError, match="LPIPS is not defined on pictures of 16x16 pixels"):
        fit_codec(RECIPE, tmp_path / "vae", SMALL, lambda device: Lpips(backbone, device).distance)
    assert list(tmp_path.iterdir()) == []


def test_a_loss_that_is_not_finite_stops_with_a_remedy_and_writes_nothing(tmp_path):
    with pytest.raises(NonFiniteError, match=r"step 0: the loss is not finite \(nan, .*lower --lr 0\.002"):
        fit_codec(RECIPE, tmp_path / "vae", SMALL, lambda _: lambda decoded, true: decoded.sum((1, 2, 3)) * torch.nan)
    with pytest.raises(NonFiniteError, match=r"step \d: the loss is not finite"):
        fit_codec(RECIPE, tmp_path / "vae", replace(SMALL, lr=1e30, steps=4))
    assert list(tmp_path.iterdir()) == []


# --------------------------------------------------------------------------------------------------------------- views


def test_val_views_and_held_out_views_are_not_fitted(train):
    val = open_splits(RECIPE)["val"].indices
    assert not torch.isin(codec_fit._views_to_fit(RECIPE, 100).indices, val).any()
    for count in (2, 63, 64, 65, 200):
        fitted = codec_fit._fitted_view(torch.arange(count - codec_fit._held_out(count)))
        assert fitted.tolist() == [view for view in range(count) if view % HELD_OUT]


def test_the_views_are_kept_as_bytes_in_a_file_without_a_name(train, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("os.getpid", lambda: 2**22 + 1)  # of no process
        temporary_name(tmp_path / "vae").write_text("of a fit that was killed")
    theirs = tmp_path / ".vae.1.views"
    theirs.write_text("of a fit of others'")
    with shared_views(train, 16, tmp_path / "vae", Ranks()) as views:
        assert list(tmp_path.iterdir()) == [theirs]
        assert isinstance(views, np.memmap)
        expected = train.source.images(train.indices.tolist())
        assert torch.equal(torch.from_numpy(np.array(views)), (expected * 255).round().to(torch.uint8))


def test_a_batch_is_shared_among_processes_and_drawn_from_all_fitted_views():
    views = np.arange(200, dtype=np.uint8)[:, None, None, None] * np.ones((1, 3, 2, 2), np.uint8)
    options = replace(SMALL, batch=24)

    def batch(step, rank, world):
        ranks, accelerator = SimpleNamespace(rank=rank, world=world), SimpleNamespace(device=torch.device("cpu"))
        fit = SimpleNamespace(options=options, ranks=ranks, accelerator=accelerator, latent_shape=(4, 1, 1))
        return CodecFit.batch(fit, views, step)

    drawn = []
    for step in range(100):
        whole, parts = batch(step, 0, 1), [batch(step, rank, 3) for rank in range(3)]
        for one, many in zip(whole, zip(*parts, strict=True), strict=True):
            assert torch.equal(one, torch.cat(many))
        drawn += (whole[0][:, 0, 0, 0] * 255).round().int().tolist()
    assert set(drawn) == {view for view in range(200) if view % HELD_OUT}


# ------------------------------------------------------------------------------------------------------------- refused


def test_a_folder_that_is_there_is_not_overwritten(tmp_path):
    with pytest.raises(DataError, match="already exists; give another name"):
        fit_codec(RECIPE, tmp_path, SMALL)


def test_a_folder_that_comes_to_exist_meanwhile_is_not_overwritten(tmp_path):
    def take_the_place(_):
        (tmp_path / "vae").mkdir()
        (tmp_path / "vae" / "mine").write_text("kept")
        return lambda decoded, true: (decoded - true).square().mean((1, 2, 3))

    with pytest.raises(DataError, match="already exists; give another name"):
        fit_codec(RECIPE, tmp_path / "vae", SMALL, take_the_place)
    assert [path.name for path in tmp_path.rglob("*")] == ["vae", "mine"]


@pytest.mark.parametrize(
    ("recipe", "options", "error", "message"),
    [
        (
            {},
            {"latent_channels": 3},
            CodecError,
            "3 latent channels: the latent needs an even size and a multiple of 4",
        ),
        ({}, {"views": 1}, CodecError, "1 view to fit on; at least 2 are needed"),
        ({"val_views": 45}, {}, DataError, "val_views 45 leaves none of the 45 training views"),
    ],
)
def test_what_cannot_be_fitted_is_refused_before_anything_is_written(tmp_path, recipe, options, error, message):
    with pytest.raises(error, match=message):
        fit_codec(RECIPE.model_copy(update=recipe), tmp_path / "new" / "vae", replace(SMALL, **options))
    assert list(tmp_path.iterdir()) == []


def test_a_batch_that_cannot_be_shared_names_the_nearest_that_can(tmp_path):
    for batch, nearest in ((33, "32 or 34"), (1, "2")):
        with pytest.raises(ConfigError, match=f"--batch {batch}: cannot be divided by 2 processes; give {nearest}, or"):
            codec_fit._check(tmp_path / "vae", replace(SMALL, batch=batch), 2)


def test_a_place_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"vae: cannot be written \(File exists\); free space or name a folder"):
        fit_codec(RECIPE, tmp_path / "file" / "vae", SMALL)
