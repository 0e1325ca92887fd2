"""Picture metrics against values worked out by hand, and LPIPS through a local backbone file."""

import hashlib

import pytest
import torch
import torchvision

from sitdist.errors import ConfigError, DataError
from sitdist.evaluate import metrics
from sitdist.model.codec import PSNR_CEILING, psnr


def pictures(count=3, size=32, seed=0):
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(seed))


def test_mae_and_psnr_of_a_constant_offset_are_the_offset_and_its_decibels():
    true = torch.full((2, 3, 16, 16), 0.5)
    image = true.clone()
    image[0] += 0.1
    image[1, :, :8] += 0.2  # half of the second picture: MAE 0.1, squared error 0.02
    assert metrics.mean_absolute_error(image, true).tolist() == pytest.approx([0.1, 0.1], abs=1e-6)
    assert psnr(image, true).tolist() == pytest.approx([20.0, 16.9897], abs=1e-3)


def test_psnr_of_a_perfect_copy_is_the_finite_ceiling():
    image = pictures(1)
    assert psnr(image, image).item() == pytest.approx(PSNR_CEILING)


def test_ssim_is_one_for_copies_and_the_luminance_term_for_flat_pictures():
    image = pictures(2)
    assert metrics.ssim(image, image).tolist() == pytest.approx([1.0, 1.0], abs=1e-5)
    a, b, c1 = 0.2, 0.6, 0.01**2  # flat pictures have no variance: (2ab + c1) / (a^2 + b^2 + c1) remains
    flat = metrics.ssim(torch.full((1, 3, 16, 16), a), torch.full((1, 3, 16, 16), b))
    assert flat.item() == pytest.approx((2 * a * b + c1) / (a * a + b * b + c1), abs=1e-3)


def test_metrics_of_a_view_do_not_depend_on_its_batch():
    image, true = pictures(3, seed=1), pictures(3, seed=2)
    for metric in (metrics.mean_absolute_error, psnr, metrics.ssim):
        alone = torch.cat([metric(image[i : i + 1], true[i : i + 1]) for i in range(3)])
        torch.testing.assert_close(metric(image, true), alone, atol=1e-6, rtol=0)


def test_ssim_refuses_pictures_smaller_than_its_window():
    with pytest.raises(DataError, match="8x8 pixels; it needs 11"):
        metrics.ssim(pictures(1, 8), pictures(1, 8))


@pytest.fixture(scope="module")
def alexnet_file(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("lpips") / "alexnet.pth"
    torch.save(torchvision.models.alexnet(weights=None).state_dict(), path)
    return path


@pytest.mark.distributed
def test_lpips_uses_the_weights_of_the_local_file(alexnet_file):
    distance = metrics.Lpips(alexnet_file)
    assert distance.identity() == f"alex {hashlib.sha256(alexnet_file.read_bytes()).hexdigest()}"
    state = torch.load(alexnet_file, weights_only=True)
    convolution = distance._network.net.slice3[1]  # torchvision's features.6
    torch.testing.assert_close(convolution.weight, state["features.6.weight"], atol=0, rtol=0)
    image, true = pictures(2, 64, 1), pictures(2, 64, 2)
    assert distance(image, image).tolist() == [0.0, 0.0]
    expected = distance._network(image, true, normalize=True).flatten()  # the package's own map of [0, 1] to [-1, 1]
    torch.testing.assert_close(distance(image, true), expected)
    assert (distance(image, true) > 0).all()


def test_lpips_refuses_small_pictures_and_says_the_minimum(alexnet_file):
    with pytest.raises(DataError, match="16x16 pixels; it needs 32"):
        metrics.Lpips(alexnet_file)(pictures(1, 16), pictures(1, 16))


@pytest.mark.distributed
def test_lpips_refuses_a_file_that_is_no_backbone(tmp_path, alexnet_file):
    with pytest.raises(ConfigError, match="no such file"):
        metrics.Lpips(tmp_path / "none.pth")
    (tmp_path / "text.pth").write_text("not weights")
    with pytest.raises(ConfigError, match="not a readable state dict"):
        metrics.Lpips(tmp_path / "text.pth")
    torch.save({"layer.weight": torch.zeros(3)}, tmp_path / "other.pth")
    with pytest.raises(ConfigError, match=r"features\.0\.weight is missing"):
        metrics.Lpips(tmp_path / "other.pth")
    state = torch.load(alexnet_file, weights_only=True)
    del state["features.8.bias"]
    torch.save(state, tmp_path / "cut.pth")
    with pytest.raises(ConfigError, match=r"features\.8\.bias is missing"):
        metrics.Lpips(tmp_path / "cut.pth")


def test_psnr_on_the_object_is_over_its_pixels_alone():
    true = torch.full((2, 3, 8, 8), 0.5)
    true[0, 0, :4] = 0.9  # half of the first view
    rendered = true.clone()
    rendered[:, :, 4:] = 0.0  # wrong where there is no object
    rendered[0, :, :4] += 0.1
    values = metrics.object_psnr(rendered, true, torch.full((3,), 0.5))
    assert values[0] == pytest.approx(20.0, abs=1e-4)
    assert values[1] is None


def test_the_background_is_the_colour_of_most_corners_if_there_is_one():
    images = torch.rand(6, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    assert metrics.background_colour(images) is None
    images[:4, :, [0, 0, -1, -1], [0, -1, 0, -1]] = torch.tensor([0.2, 0.4, 0.6])[:, None]
    torch.testing.assert_close(metrics.background_colour(images), torch.tensor([0.2, 0.4, 0.6]))
