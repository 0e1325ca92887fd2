"""Random numbers are a pure function of (seed, stream, position)."""

import torch

from sitdist.flow import draws


def test_philox_gives_the_published_known_answers() -> None:
    """Vectors of Random123's kat_vectors for philox4x32-10."""
    cases = [
        ([0, 0, 0, 0], (0, 0), [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([0xFFFFFFFF] * 4, (0xFFFFFFFF, 0xFFFFFFFF), [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            (0xA4093822, 0x299F31D0),
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ]
    for counter, key, expected in cases:
        words = draws.philox(tuple(torch.tensor([word]) for word in counter), key)
        assert words[0].tolist() == expected


def test_a_sample_draws_the_same_numbers_in_any_batch() -> None:
    positions = torch.arange(64)
    whole = draws.normal(3, "noise", positions, 1023)
    halves = [draws.normal(3, "noise", part, 1023) for part in (positions[40:], positions[:40])]
    assert torch.equal(whole, torch.cat(halves[::-1]))


def test_seed_stream_and_position_each_change_the_numbers() -> None:
    base = draws.uniform(0, "t", torch.tensor([7]), 4)
    others = [(1, "t", 7), (0, "noise", 7), (0, "t", 8), (0, "t", 7 + 2**33)]
    for seed, stream, position in others:
        assert not torch.equal(base, draws.uniform(seed, stream, torch.tensor([position]), 4))


def test_normals_have_the_moments_of_a_standard_normal() -> None:
    z = draws.normal(0, "noise", torch.arange(2000), 500).double()  # 10^6 numbers: mean has deviation 1e-3
    assert abs(z.mean()) < 4e-3
    assert abs(z.square().mean() - 1) < 6e-3
    assert abs((z**4).mean() - 3) < 0.05
    assert abs((z[:, :-1] * z[:, 1:]).mean()) < 4e-3


def test_uniforms_fill_the_open_interval_evenly() -> None:
    u = draws.uniform(0, "t", torch.arange(100_000), 1).flatten()
    assert 0 < u.min() < 1e-4
    assert 1 - 1e-4 < u.max() < 1
    counts = torch.histc(u, bins=10, min=0, max=1)
    assert (counts - 10_000).abs().max() < 500


def test_permutations_hold_every_number_once_and_differ_between_epochs() -> None:
    first, second = (draws.permutation(0, "order", 1000, epoch) for epoch in (0, 1))
    assert torch.equal(first.sort().values, torch.arange(1000))
    assert torch.equal(second.sort().values, torch.arange(1000))
    assert not torch.equal(first, second)
    assert torch.equal(first, draws.permutation(0, "order", 1000, 0))
