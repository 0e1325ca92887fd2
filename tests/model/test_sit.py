"""SiT computes what the published code computes."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from sitdist.flow.interpolant import get_interpolant
from sitdist.flow.solve import generate, invert
from sitdist.model.sit import SiT

REFERENCE = load_file(Path(__file__).parents[1] / "reference" / "sit_tiny.safetensors")


def relative(value: torch.Tensor, expected: torch.Tensor) -> float:
    return float((value - expected).norm() / expected.norm())


@pytest.fixture(scope="module")
def model() -> SiT:
    model = SiT(
        input_size=8, patch_size=2, in_channels=4, hidden_size=64, depth=2, num_heads=4, num_classes=3, learn_sigma=True
    )
    model.load_state_dict({k.removeprefix("model."): v for k, v in REFERENCE.items() if k.startswith("model.")})
    return model.eval()


def test_position_embedding_is_the_published_one() -> None:
    fresh = SiT(input_size=8, patch_size=2, in_channels=4, hidden_size=64, depth=1, num_heads=4)
    torch.testing.assert_close(fresh.pos_embed, REFERENCE["model.pos_embed"], rtol=0, atol=1e-7)


@torch.no_grad()
def test_forward_pass_equals_the_published_code(model: SiT) -> None:
    velocity = model(REFERENCE["in.x"], REFERENCE["in.t"], REFERENCE["in.y"])
    assert relative(velocity, REFERENCE["out.forward"]) < 1e-5


@pytest.mark.parametrize("method", ["euler", "midpoint", "heun3", "dopri5"])
@torch.no_grad()
def test_ode_results_equal_the_published_code(model: SiT, method: str) -> None:
    path, z, y = get_interpolant("linear"), REFERENCE["in.z"], REFERENCE["in.y"]
    assert relative(generate(model, path, z, y, method, steps=8), REFERENCE[f"ode.{method}"]) < 1e-5
    assert relative(invert(model, path, z, y, method, steps=8), REFERENCE[f"ode_reverse.{method}"]) < 1e-5


@torch.no_grad()
def test_dropped_labels_use_the_extra_row_and_others_keep_theirs(model: SiT) -> None:
    x, t, y = REFERENCE["in.x"], REFERENCE["in.t"], REFERENCE["in.y"]
    drop = torch.tensor([True, False, False, True, False])
    out = model(x, t, y, drop)
    null = model(x, t, torch.full_like(y, 3))
    torch.testing.assert_close(out[drop], null[drop])
    torch.testing.assert_close(out[~drop], model(x, t, y)[~drop])


def test_a_fresh_model_is_the_zero_velocity() -> None:
    fresh = SiT(input_size=8, patch_size=4, in_channels=4, hidden_size=32, depth=2, num_heads=2)
    out = fresh(torch.randn(2, 4, 8, 8), torch.rand(2), torch.zeros(2, dtype=torch.int64))
    assert out.shape == (2, 4, 8, 8)
    assert out.abs().max() == 0


def test_a_pose_is_a_condition_only_of_a_model_that_asks_for_one() -> None:
    torch.manual_seed(0)
    plain = SiT(input_size=8, patch_size=4, in_channels=4, hidden_size=32, depth=2, num_heads=2)
    conditioned = SiT(
        input_size=8, patch_size=4, in_channels=4, hidden_size=32, depth=2, num_heads=2, pose_condition=True
    )
    extra = conditioned.state_dict().keys() - plain.state_dict().keys()
    assert {name.split(".")[0] for name in extra} == {"pose_embedder"}
    for module in conditioned.modules():
        if isinstance(module, torch.nn.Linear):
            torch.nn.init.normal_(module.weight, std=0.1)
    x, t, y = torch.randn(2, 4, 8, 8), torch.rand(2), torch.zeros(2, dtype=torch.int64)
    poses = torch.randn(2, 4, 4)
    out = conditioned(x, t, y, None, poses)
    assert not torch.allclose(out, conditioned(x, t, y, None, poses + 0.1), atol=1e-4)
    with pytest.raises(AssertionError, match="a pose is given to models with pose_condition"):
        plain(x, t, y, None, poses)


def test_swiglu_is_a_gated_perceptron_with_as_many_weights() -> None:
    sizes = {"input_size": 8, "patch_size": 4, "in_channels": 4, "hidden_size": 192, "depth": 1, "num_heads": 2}
    gelu, swiglu = SiT(**sizes), SiT(**sizes, mlp="swiglu")
    counts = [sum(parameter.numel() for parameter in model.parameters()) for model in (gelu, swiglu)]
    assert counts[1] == pytest.approx(counts[0], rel=2e-3)
    mlp, x = swiglu.blocks[0].mlp, torch.randn(3, 5, 192)
    gate, value = x @ mlp.fc1_g.weight.T + mlp.fc1_g.bias, x @ mlp.fc1_x.weight.T + mlp.fc1_x.bias
    expected = (torch.nn.functional.silu(gate) * value) @ mlp.fc2.weight.T + mlp.fc2.bias
    torch.testing.assert_close(mlp(x), expected)
