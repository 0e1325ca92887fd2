"""What a process finds out about the device that it runs on."""

import logging

import pytest
import torch

from sitdist.distributed.accelerator import backend_of_launcher, computes_in_bf16, make_accelerator, processes
from sitdist.errors import ConfigError


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


def test_a_line_of_the_log_is_one_line_whatever_is_in_it(cpu, capsys):
    cpu()
    with processes():
        logging.getLogger("sitdist").warning("%s: read", "a\nname\x1b[31m")
    assert capsys.readouterr().err == "sitdist: a\\nname\\x1b[31m: read\n"


def fsdp(**more):
    return {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", **more}


def deepspeed(**more):
    names = {"stage": "ACCELERATE_DEEPSPEED_ZERO_STAGE", "file": "ACCELERATE_DEEPSPEED_CONFIG_FILE"}
    return {"ACCELERATE_USE_DEEPSPEED": "true", **{names.get(name, name): value for name, value in more.items()}}


@pytest.mark.parametrize(
    ("variables", "backend"),
    [({}, "ddp"), (fsdp(), "fsdp2"), (deepspeed(stage="1"), "zero1"), (deepspeed(stage="2"), "zero2")],
)
def test_the_launcher_says_the_backend(variables, backend):
    assert backend_of_launcher(variables) == backend


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        (fsdp(FSDP_VERSION="1"), "FSDP_VERSION = 1: not supported; set fsdp_version: 2"),
        (fsdp(FSDP_OFFLOAD_PARAMS="true"), "FSDP_OFFLOAD_PARAMS = true: not supported"),
        (deepspeed(stage="3"), "ZeRO stage 3: not supported; .* launch/fsdp2.yaml shares out weights too"),
        (deepspeed(stage="0"), "ZeRO stage 0: not supported"),
        (deepspeed(file="ds.json"), "deepspeed_config_file: not supported; give zero_stage alone"),
        (
            deepspeed(ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE="cpu"),
            "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE = cpu: not supported",
        ),
        ({"ACCELERATE_USE_MEGATRON_LM": "true"}, "ACCELERATE_USE_MEGATRON_LM = true: not supported"),
    ],
)
def test_what_cannot_be_honoured_is_refused_with_the_remedy(variables, message, monkeypatch):
    with pytest.raises(ConfigError, match=message):
        backend_of_launcher(variables)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=message):
        make_accelerator()
