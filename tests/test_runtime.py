"""What a process finds out about the device that it runs on."""

import pytest
import torch

from sitdist.runtime import computes_in_bf16, make_accelerator, processes


@pytest.fixture
def cpu(monkeypatch):
    """A CPU with or without instructions for bfloat16."""

    def pretend(**capabilities):
        monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True, **capabilities})

    return pretend


@pytest.mark.parametrize(
    ("capabilities", "precision"),
    [({}, "no"), ({"avx512_bf16": False}, "no"), ({"avx512_bf16": True}, "bf16"), ({"amx_bf16": True}, "bf16")],
)
def test_precision_auto_is_bf16_where_the_device_computes_in_it(cpu, capabilities, precision):
    cpu(**capabilities)
    assert computes_in_bf16(cpu=True) == (precision == "bf16")
    assert make_accelerator("auto").mixed_precision == precision
    assert make_accelerator("fp32").mixed_precision == "no"
    assert make_accelerator("bf16").mixed_precision == "bf16"


def test_emulated_bf16_is_warned_of(cpu, capsys):
    def told(precision, **capabilities):
        cpu(**capabilities)
        with processes(precision):
            return capsys.readouterr().err

    assert "this CPU emulates it" in told("bf16")
    assert told("auto") == told("bf16", avx512_bf16=True) == ""
