"""Codecs: what they keep, how they scale, that they are the same when they come back, and what they refuse."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from sitdist.build.sources import open_source
from sitdist.config.recipe import SceneSource
from sitdist.errors import CodecError
from sitdist.model.codec import NO_VARIANCE, PcaCodec, VaeCodec, draw_latent, latent_mean, load_codec, round_trip_psnr


def noise(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def views():
    source = open_source(SceneSource(kind="scene", views=40, supersample=1), 16)
    return source.images(range(40))


# ---------------------------------------------------------------------------------------------------------- moments


def test_a_latent_is_drawn_with_the_posteriors_mean_and_deviation():
    mean, log_variance = torch.tensor([1.0, -2.0]), torch.tensor([0.0, 2.0]).log() * 2  # deviations 0 and 2
    moments = torch.cat([mean, log_variance.clamp_min(NO_VARIANCE)])[None, :, None, None]
    assert latent_mean(moments).flatten().tolist() == [1.0, -2.0]
    latent = draw_latent(moments, torch.tensor([3.0, 1.5])[None, :, None, None])
    torch.testing.assert_close(latent.flatten(), torch.tensor([1.0, 1.0]), rtol=0, atol=1e-5)


# -------------------------------------------------------------------------------------------------------------- pca


def test_pca_latents_have_unit_variance_and_no_mean_over_the_pictures_it_is_fitted_on(views):
    codec = PcaCodec.fit(views, patch=4, channels=4)
    latents = latent_mean(codec.encode_moments(views))
    assert latents.shape == (40, 4, 4, 4)
    by_channel = latents.transpose(0, 1).flatten(1)
    torch.testing.assert_close(by_channel.mean(1), torch.zeros(4), rtol=0, atol=1e-3)
    torch.testing.assert_close(by_channel.cov(correction=0), torch.eye(4), rtol=0, atol=2e-3)


def test_pca_finds_the_directions_of_known_pictures_in_the_order_of_their_variance():
    directions = torch.linalg.qr(noise(12, 12, seed=1).double())[0][:, :2]  # two of a patch of 2x2 pixels
    weights = torch.randn(5000, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    patches = 0.5 + weights * torch.tensor([0.02, 0.05]) @ directions.T
    codec = PcaCodec.fit(patches.reshape(-1, 3, 2, 2).float(), patch=2, channels=2)
    torch.testing.assert_close(codec.scale, torch.tensor([0.05, 0.02]), rtol=0.03, atol=0)
    overlap = (codec.basis.double().T @ directions).abs()
    torch.testing.assert_close(overlap, torch.tensor([[0.0, 1.0], [1.0, 0.0]]).double(), rtol=0, atol=0.05)
    assert (codec.basis.gather(0, codec.basis.abs().argmax(0, keepdim=True)) > 0).all()  # signs are fixed


def test_pca_with_every_component_gives_the_pictures_back():
    images = noise(8, 3, 8, 8)
    codec = PcaCodec.fit(images, patch=2, channels=12)
    torch.testing.assert_close(codec.decode(latent_mean(codec.encode_moments(images))), images, rtol=0, atol=1e-5)
    assert (round_trip_psnr(codec, images) > 90).all()


def test_pca_keeps_more_of_the_views_with_more_channels(views):
    few, many = (round_trip_psnr(PcaCodec.fit(views[:30], 4, channels), views[30:]).mean() for channels in (4, 16))
    assert 15 < few < many - 3


def test_pca_has_no_posterior_and_decodes_into_the_pictures_range(views):
    codec = PcaCodec.fit(views, 4, 4)
    moments = codec.encode_moments(views)
    assert (moments[:, 4:] == NO_VARIANCE).all()
    torch.testing.assert_close(draw_latent(moments, torch.ones(40, 4, 4, 4)), latent_mean(moments), rtol=0, atol=1e-6)
    far = codec.decode(100.0 * latent_mean(moments))
    assert (far.min(), far.max()) == (0.0, 1.0)


def test_a_component_that_does_not_vary_does_not_turn_rounding_into_signal():
    grey = 0.2 + 0.6 * noise(64, 1, 1, 1).expand(64, 3, 4, 4)  # one direction of 48 varies
    codec = PcaCodec.fit(grey, patch=4, channels=4)
    assert codec.scale[1:].tolist() == [1.0, 1.0, 1.0]
    latents = latent_mean(codec.encode_moments(grey))
    assert latents[:, 0].std(correction=0).item() == pytest.approx(1.0, abs=1e-3)
    assert latents[:, 1:].abs().max() < 1e-5
    other = latent_mean(codec.encode_moments(noise(8, 3, 4, 4)))  # pictures that do vary there stay in float16's range
    assert other[:, 1:].abs().max() < 10
    flat = PcaCodec.fit(torch.full((4, 3, 4, 4), 0.3), patch=4, channels=4)
    torch.testing.assert_close(flat.decode(torch.zeros(1, 4, 1, 1)), torch.full((1, 3, 4, 4), 0.3))


def test_pca_refuses_more_channels_than_a_patch_has_numbers():
    with pytest.raises(CodecError, match=r"codec\.channels 16: a patch of 2x2 pixels has only 12 numbers"):
        PcaCodec.fit(noise(4, 3, 8, 8), patch=2, channels=16)


def test_a_pca_codec_comes_back_the_same_and_another_has_another_identity(views, tmp_path):
    codec = PcaCodec.fit(views, 4, 4)
    codec.save(tmp_path / "codec")
    again = load_codec(tmp_path / "codec")
    assert again.identity() == codec.identity() == PcaCodec.fit(views, 4, 4).identity()
    assert torch.equal(again.encode_moments(views), codec.encode_moments(views))
    other = PcaCodec.fit(views[:20], 4, 4).identity()
    assert other["weights_sha256"] != codec.identity()["weights_sha256"]
    assert json.loads(json.dumps(other)) == other


@pytest.mark.parametrize(
    "description",
    [
        "[]",
        "{",
        "[" * 100_000,
        '{"kind": "pca"}',
        '{"kind": "pca", "patch": 0}',
        '{"kind": "pca", "patch": "4"}',
        '{"kind": "pca", "patch": 2}',
        '{"kind": "pca", "patch": 1000000000000}',
        '{"kind": "jpeg", "patch": 4}',
        '{"kind": "vae", "dtype": "fp64"}',
        '{"kind": "vae", "dtype": "fp32"}',
        None,
    ],
)
def test_a_codec_that_is_described_wrongly_is_refused_in_one_line(views, tmp_path, description):
    PcaCodec.fit(views, 4, 4).save(tmp_path / "codec")
    path = tmp_path / "codec" / "codec.json"
    path.unlink() if description is None else path.write_text(description)
    with pytest.raises(CodecError) as refused:
        load_codec(tmp_path / "codec")
    assert "\n" not in str(refused.value)
    assert len(str(refused.value)) < 600


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("mean", torch.full((48,), torch.nan)),
        ("mean", torch.zeros(47)),
        ("mean", torch.zeros(48, dtype=torch.float64)),
        ("mean", None),
        ("basis", torch.full((48, 4), torch.inf)),
        ("basis", torch.zeros(48, 3)),
        ("scale", torch.tensor([1.0, 1.0, 0.0, 1.0])),
        ("scale", torch.ones(())),
        ("extra", torch.ones(4)),
    ],
)
def test_a_pca_of_other_shapes_types_or_numbers_is_refused_in_one_line(views, tmp_path, name, tensor):
    PcaCodec.fit(views, 4, 4).save(tmp_path / "codec")
    path = tmp_path / "codec" / "weights.safetensors"
    tensors = load_file(path) | {name: tensor}
    save_file({key: value for key, value in tensors.items() if value is not None}, path)
    with pytest.raises(CodecError, match=r"weights\.safetensors: .*; put the codec back") as refused:
        load_codec(tmp_path / "codec")
    assert "\n" not in str(refused.value)


# -------------------------------------------------------------------------------------------------------------- vae


@pytest.fixture(scope="module")
def autoencoder(tmp_path_factory):
    """A tiny AutoencoderKL with random weights, and its folder."""
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    model = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(4, 8),
        layers_per_block=1,
        norm_num_groups=4,
        latent_channels=4,
        scaling_factor=0.25,
        shift_factor=0.5,
    ).eval()
    folder = tmp_path_factory.mktemp("vae") / "model"
    model.save_pretrained(folder)
    return model, folder


@torch.no_grad()
def test_the_vae_sees_pictures_in_minus_one_to_one_and_its_latents_are_shifted_and_scaled(autoencoder):
    model, folder = autoencoder
    codec, images = VaeCodec(str(folder)), noise(2, 3, 16, 16)
    assert (codec.channels, codec.downsample) == (4, 2)
    posterior = model.encode(2.0 * images - 1.0).latent_dist
    moments = codec.encode_moments(images)
    torch.testing.assert_close(latent_mean(moments), (posterior.mean - 0.5) * 0.25)
    standard_normal = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    expected = (posterior.mean + posterior.std * standard_normal - 0.5) * 0.25
    torch.testing.assert_close(draw_latent(moments, standard_normal), expected)
    decoded = (model.decode(posterior.mean).sample * 0.5 + 0.5).clamp(0.0, 1.0)
    torch.testing.assert_close(codec.decode(latent_mean(moments)), decoded, rtol=0, atol=1e-5)


def test_a_vae_comes_back_the_same_in_its_own_precision(autoencoder, tmp_path):
    _, folder = autoencoder
    images = noise(2, 3, 16, 16)
    identities = []
    for dtype in ("fp32", "bf16"):
        codec = VaeCodec(str(folder), dtype)
        codec.save(tmp_path / dtype)
        again = load_codec(tmp_path / dtype)
        assert again.identity() == codec.identity()
        assert torch.equal(again.encode_moments(images), codec.encode_moments(images))
        assert codec.encode_moments(images).dtype == torch.float32
        identities.append(codec.identity())
    assert (identities[0]["latent_scale"], identities[0]["latent_shift"]) == (0.25, 0.5)
    assert identities[0]["weights_sha256"] != identities[1]["weights_sha256"]
    assert identities[1]["dtype"] == "bfloat16"


def test_a_vae_that_is_not_there_is_named_without_asking_the_network(tmp_path):
    for path in (str(tmp_path / "vae"), "./vae", "~/no/such/vae", "vae"):
        with pytest.raises(CodecError, match=r"codec\.path .*vae: no such folder; give a diffusers AutoencoderKL"):
            VaeCodec(path)
    with pytest.raises(CodecError, match=r"config\.json: cannot be read"):
        VaeCodec(str(tmp_path))


def test_the_vae_of_a_folder_that_we_wrote_is_never_asked_of_a_hub(autoencoder, tmp_path, monkeypatch):
    """Not where its folder is missing, though its path reads like a hub id, and not for what is missing in it."""
    from diffusers import AutoencoderKL

    VaeCodec(str(autoencoder[1])).save(tmp_path / "codec")
    monkeypatch.chdir(tmp_path)
    asked, load = [], AutoencoderKL.from_pretrained
    monkeypatch.setattr(
        AutoencoderKL,
        "from_pretrained",
        lambda path, **how: (asked.append(how["local_files_only"]), load(path, **how))[1],
    )
    load_codec(Path("codec"))
    VaeCodec("codec/vae")
    assert asked == [True, True]
    shutil.rmtree("codec/vae")
    with pytest.raises(CodecError, match=r"codec/vae: no such folder"):
        load_codec(Path("codec"))
    assert len(asked) == 2


@pytest.mark.parametrize(
    "changes",
    [
        *({"scaling_factor": factor} for factor in (0.0, math.nan, None, "large")),
        {"shift_factor": "left"},
        {"block_out_channels": [200_000, 200_000]},
        {"block_out_channels": 4},
        {"block_out_channels": [4, 8] * 8},
        {"layers_per_block": 10**9},
        {"layers_per_block": 2},
        {"latent_channels": "four"},
        {"in_channels": 1},
        {"down_block_types": ["Foo", "Bar"]},
        {"norm_num_groups": 3},
    ],
)
def test_a_vae_with_an_absurd_config_is_refused_in_one_line(autoencoder, tmp_path, changes):
    shutil.copytree(autoencoder[1], tmp_path / "vae")
    config = json.loads((tmp_path / "vae" / "config.json").read_text())
    (tmp_path / "vae" / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(CodecError) as refused:
        VaeCodec(str(tmp_path / "vae"))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("tensor", [None, torch.zeros(2), torch.full((8, 4, 3, 3), torch.nan)])
def test_a_vae_with_other_weights_is_refused_in_one_line(autoencoder, tmp_path, tensor):
    shutil.copytree(autoencoder[1], tmp_path / "vae")
    path = tmp_path / "vae" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path) | {"decoder.conv_in.weight": tensor}
    save_file({name: each for name, each in tensors.items() if each is not None}, path, {"format": "pt"})
    with pytest.raises(CodecError, match=r"decoder\.conv_in\.weight") as refused:
        VaeCodec(str(tmp_path / "vae"))
    assert "\n" not in str(refused.value)


def test_a_vae_whose_weights_are_a_pickle_is_not_loaded(autoencoder, tmp_path):
    model, _ = autoencoder
    model.save_pretrained(tmp_path / "pickled", safe_serialization=False)
    with pytest.raises(CodecError, match="no AutoencoderKL could be loaded"):
        VaeCodec(str(tmp_path / "pickled"))
