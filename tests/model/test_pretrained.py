"""Published checkpoints load: as they are, wrapped, and adapted to data of other sizes; nothing is run from a file."""

import argparse
import io
import os
import pickle
import tarfile
import zipfile
from collections import OrderedDict
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from sitdist.errors import CheckpointError
from sitdist.model.pretrained import initialize_from, read_weights
from sitdist.model.sit import SiT, position_embedding

REFERENCE = Path(__file__).parents[1] / "reference" / "sit_tiny.safetensors"
NUMBERS = load_file(REFERENCE)
WEIGHTS = {name.removeprefix("model."): value for name, value in NUMBERS.items() if name.startswith("model.")}


def build(**changes) -> SiT:
    """The model of the reference, or one that differs."""
    sizes = {"input_size": 8, "patch_size": 2, "in_channels": 4, "hidden_size": 64, "depth": 2, "num_heads": 4}
    return SiT(**(sizes | {"num_classes": 3, "learn_sigma": True} | changes))


def output(model: SiT) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(NUMBERS["in.x"], NUMBERS["in.t"], NUMBERS["in.y"])


@pytest.mark.parametrize("kind", ["plain", "ema", "model", "both", "safetensors", "reference"])
def test_a_published_checkpoint_computes_what_it_was_published_with(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "sit.pt"
    zeros = {name: torch.zeros_like(value) for name, value in WEIGHTS.items()}
    training = {"opt": {"state": {0: torch.ones(2)}}, "args": argparse.Namespace(model="SiT-XL/2", lr=1e-4)}
    if kind == "plain":
        torch.save(OrderedDict(WEIGHTS), path)
    elif kind == "safetensors":
        path = tmp_path / "sit.safetensors"
        save_file(WEIGHTS, path)
    elif kind == "reference":
        path = REFERENCE
    else:
        torch.save(
            {
                "model": WEIGHTS if kind == "model" else zeros,
                **({} if kind == "model" else {"ema": WEIGHTS}),
                **training,
            },
            path,
        )
    model = build()
    report = initialize_from(model, path)
    assert (output(model) - NUMBERS["out.forward"]).norm() / NUMBERS["out.forward"].norm() < 1e-5
    assert (len(report.kept), report.adapted, report.fresh, report.left_out) == (len(WEIGHTS), [], [], [])
    assert str(report) == f"started from {path}: kept {len(WEIGHTS)} tensors"


def test_without_learned_variances_the_velocity_stays_the_same_and_with_them_too() -> None:
    model = build(learn_sigma=False)
    report = initialize_from(model, REFERENCE)
    assert report.adapted == ["final_layer.linear.weight (32x64 to 16x64)", "final_layer.linear.bias (32 to 16)"]
    torch.testing.assert_close(output(model), NUMBERS["out.forward"], rtol=1e-4, atol=1e-5)


def test_variances_that_a_checkpoint_has_not_begin_anew(tmp_path: Path) -> None:
    small = build(learn_sigma=False)
    initialize_from(small, REFERENCE)
    save_file(small.state_dict(), tmp_path / "small.safetensors")
    model = build()
    initialize_from(model, tmp_path / "small.safetensors")
    torch.testing.assert_close(output(model), output(small))
    assert model.final_layer.linear.weight.unflatten(0, (4, 8))[:, 4:].abs().max() == 0  # as in a fresh model


def test_positions_are_interpolated_to_another_grid() -> None:
    model = build(input_size=16)
    report = initialize_from(model, REFERENCE)
    assert report.adapted == ["pos_embed (1x16x64 to 1x64x64)"]
    grid = model.pos_embed[0].reshape(8, 8, 64)
    # Wherever the old grid's waves are slow, the new one reads them between its points, at (i + 1/2) / 2 - 1/2.
    old = position_embedding(64, 4).reshape(4, 4, 64)
    middle = 0.5 * (grid[3, 3] + grid[4, 4])
    torch.testing.assert_close(
        middle[8:16], 0.25 * (old[1, 1] + old[2, 2] + old[1, 2] + old[2, 1])[8:16], rtol=0, atol=0.02
    )
    assert not torch.allclose(grid, position_embedding(64, 8).reshape(8, 8, 64), atol=0.1)


@pytest.mark.parametrize(("classes", "dropout"), [(1, 0.1), (2, 0.0), (5, 0.1)])
def test_label_tables_keep_their_first_labels_and_further_ones_begin_as_no_label(classes: int, dropout: float) -> None:
    model = build(num_classes=classes, class_dropout_prob=dropout)
    report = initialize_from(model, REFERENCE)
    table, given = model.y_embedder.embedding_table.weight, WEIGHTS["y_embedder.embedding_table.weight"]
    assert report.adapted == [f"y_embedder.embedding_table.weight (4x64 to {classes + (dropout > 0)}x64)"]
    shared = min(classes, 3)
    torch.testing.assert_close(table[:shared], given[:shared])
    torch.testing.assert_close(table[shared:], given[-1:].expand(len(table) - shared, 64))


def test_a_last_layer_of_the_right_size_by_chance_is_not_taken() -> None:
    report = initialize_from(build(in_channels=8, learn_sigma=False), REFERENCE)
    assert "final_layer.linear.weight (32x64 to 32x64)" in report.fresh


def test_what_has_no_counterpart_is_begun_anew_or_left_out_and_both_are_said(tmp_path: Path) -> None:
    save_file(WEIGHTS | {"head.weight": torch.ones(2)}, tmp_path / "sit.safetensors")
    model = build(in_channels=8)
    report = initialize_from(model, tmp_path / "sit.safetensors")
    assert report.left_out == ["head.weight"]
    assert report.fresh == [
        "x_embedder.proj.weight (64x4x2x2 to 64x8x2x2)",
        "final_layer.linear.weight (32x64 to 64x64)",
        "final_layer.linear.bias (32 to 64)",
    ]
    assert model.final_layer.linear.weight.abs().max() == 0
    assert f"kept {len(WEIGHTS) - 3} tensors; begun anew x_embedder.proj.weight" in str(report)
    assert str(report).endswith("; left out head.weight")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 32}, r"x_embedder.proj.bias is 64 but the model has 32; give model.preset"),
        ({"depth": 3}, r"blocks.2.attn.qkv.weight is absent but the model has 192x64"),
        ({"depth": 1}, r"blocks.1.\S+ is \S+ but the model has absent"),
        ({"mlp_ratio": 2.0}, r"blocks.0.mlp.fc1.weight is 256x64 but the model has 128x64"),
    ],
)
def test_another_transformer_is_refused_by_its_first_tensor_that_differs(changes, message) -> None:
    with pytest.raises(CheckpointError, match=message):
        initialize_from(build(**changes), REFERENCE)


def test_a_file_that_would_run_code_is_refused_in_one_line(tmp_path: Path) -> None:
    torch.save({"model": WEIGHTS, "args": Fraction(1, 2)}, tmp_path / "sit.pt")
    with pytest.raises(CheckpointError) as caught:
        initialize_from(build(), tmp_path / "sit.pt")
    assert str(caught.value) == (
        f"{tmp_path / 'sit.pt'}: refused: it would run fractions.Fraction; "
        "give one of tensors alone, such as a .safetensors"
    )


def test_a_checkpoint_of_something_else_is_refused(tmp_path: Path) -> None:
    torch.save({"weight": torch.ones(2)}, tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match=r"holds no x_embedder.proj.weight, so these are no weights of a SiT"):
        initialize_from(build(), tmp_path / "a.pt")


def pt(value):
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


def compressed(value):
    """A checkpoint whose zip is compressed, so that a small file may become a large one."""
    file = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(pt(value))) as plain, zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as small:
        for entry in plain.infolist():
            small.writestr(entry.filename, plain.read(entry))
    return file.getvalue()


def tar():
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("weights"))
    return file.getvalue()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"some text\n" * 100,
        tar(),
        pickle.dumps({"a": 1}),
        b"\x80\x02" + b"]" * 10_000 + b"a" * 9_999 + b".",
        pt({"weight": np.zeros(3)}),
        pt({"weight": Fraction(1, 2)}),
        pt(WEIGHTS)[:-2000],
        pt(torch.zeros(3)),
        pt({"opt": {"state": {0: {"exp_avg": torch.ones(2)}}, "param_groups": []}}),
        pt({"ema": {"weight": 3}}),
        pt({0: torch.zeros(2)}),
        pt({"weight": torch.zeros(1).expand(10**12)}),
        pt({"weight": torch.zeros(2, device="meta")}),
        pt({"weight": torch.zeros(2).to_sparse()}),
        pt({"weight": torch.zeros(2, dtype=torch.complex64)}),
        pt({"weight": torch.tensor([1.0, torch.nan])}),
        pt({"weight": torch.tensor([1e300], dtype=torch.float64)}),
        compressed({"weight": torch.zeros(10**6)}),
        "folder",
        "fifo",
    ],
)
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_a_file_of_another_kind_is_refused_in_one_line(tmp_path: Path, content, suffix) -> None:
    path = tmp_path / f"sit{suffix}"
    if content == "folder":
        path.mkdir()
    elif content == "fifo":
        os.mkfifo(path)
    else:
        path.write_bytes(content)
    with pytest.raises(CheckpointError, match=f"^{path}: ") as caught:
        read_weights(path)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_numbers_of_other_precisions_become_float32(tmp_path: Path, dtype) -> None:
    weight = torch.tensor([1.0, -0.5, 3.0])
    save_file({"weight": weight.to(dtype)}, tmp_path / "a.safetensors")
    torch.save({"weight": weight.to(dtype)}, tmp_path / "a.pt")
    for path in (tmp_path / "a.safetensors", tmp_path / "a.pt"):
        found = read_weights(path)["weight"]
        assert found.dtype == torch.float32
        assert torch.equal(found, weight)


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("pos_embed", torch.zeros(1, 15, 64)),
        ("y_embedder.embedding_table.weight", torch.zeros(4)),
        ("final_layer.linear.weight", torch.zeros(3, 64)),
        ("final_layer.linear.bias", torch.zeros(())),
    ],
)
def test_tensors_that_cannot_be_adapted_begin_anew(tmp_path: Path, name, tensor) -> None:
    save_file(WEIGHTS | {name: tensor}, tmp_path / "sit.safetensors")
    assert any(fresh.startswith(name) for fresh in initialize_from(build(), tmp_path / "sit.safetensors").fresh)


def test_whole_numbers_are_no_weights(tmp_path: Path) -> None:
    save_file(WEIGHTS | {"x_embedder.proj.bias": torch.zeros(64, dtype=torch.int64)}, tmp_path / "sit.safetensors")
    with pytest.raises(CheckpointError, match=r"x_embedder\.proj\.bias holds torch\.int64"):
        initialize_from(build(), tmp_path / "sit.safetensors")
