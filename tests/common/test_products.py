"""Matrix products by oneDNN: torch's values to rounding, in whatever form they are asked for, and torch's own after."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from pi_gguf.common import machine, products
from pi_gguf.common.products import fast_products

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch without oneDNN")


@pytest.fixture
def asked(monkeypatch) -> list[tuple[int, ...]]:
    """On a CPU of another maker: the shapes of what oneDNN multiplied."""
    monkeypatch.setattr(machine, "_cpu_flags", lambda: "vendor_id : AuthenticAMD")
    monkeypatch.setattr(products, "_LEAST", 2**22)
    shapes: list[tuple[int, ...]] = []

    def counted(a, b, bias):
        shapes.append((*a.shape, b.shape[1]))
        return whole(a, b, bias)

    whole = products.onednn_product
    monkeypatch.setattr(products, "onednn_product", counted)
    return shapes


def random(*shape, dtype=torch.float32) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(sum(shape)).normal(size=shape)).to(dtype)


def test_values_are_those_of_64_bits_to_rounding(asked):
    sizes = [(300, 200, 100), (64, 256, 512), (1, 4096, 1100), (4200, 1, 1000), (2048, 96, 64)]
    for m, k, n in sizes:
        a, b, bias = random(m, k), random(k, n), random(n)
        forms = [(a, b), (a, b.t().contiguous().t()), (a.t().contiguous().t(), b)]
        for (x, y), shift in itertools.product(forms, (None, bias)):
            exact = x.double() @ y.double() + (0 if shift is None else shift.double())
            with fast_products("cpu"):
                found = x @ y if shift is None else torch.addmm(shift, x, y)
            assert found.shape == (m, n) and found.is_contiguous()
            assert torch.allclose(found.double(), exact, rtol=1e-5, atol=1e-5 * k**0.5), (m, k, n)
    flat = sum(1 in size[:2] for size in sizes)  # as it lies, transposed or not
    assert set(asked) == {*sizes}
    assert len(asked) == 4 * len(sizes) + 2 * flat, "all but those whose left one is transposed"


@pytest.mark.parametrize("bias", [True, False])
def test_a_layer_has_the_outputs_and_gradients_of_torch(bias, asked):
    layer, x = torch.nn.Linear(320, 256, bias=bias), random(2, 40, 320).requires_grad_()
    outputs = []
    for device in ("cpu", "cuda"):  # for another device nothing is changed
        layer.zero_grad()
        x.grad = None
        with fast_products(device):
            y = layer(x)
            y.square().sum().backward()
        outputs.append([y.detach(), x.grad, *(p.grad for p in layer.parameters())])
    assert len(asked) == 2, "forward, and the gradient of what came in"
    for ours, theirs in zip(*outputs, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-3)


def test_whatever_else_is_multiplied_is_torchs(asked):
    with fast_products("cpu"):
        for dtype in (torch.float64, torch.bfloat16, torch.int64, torch.complex64):
            a, b = random(200, 200, dtype=dtype), random(200, 200, dtype=dtype)
            assert (a @ b).dtype == dtype
        for m, k, n in ((0, 5, 3), (5, 0, 3), (5, 3, 0), (2, 3, 4)):
            assert torch.equal(torch.ones(m, k) @ torch.ones(k, n), torch.full((m, n), float(k)))
        a, b, c = random(256, 256), random(256, 256), random(256, 256)
        exact = 2 * c.double() + 3 * a.double() @ b.double()
        assert torch.allclose(torch.addmm(c, a, b, beta=2, alpha=3).double(), exact, rtol=1e-4, atol=1e-3)
        row = random(256)
        exact = 2 * row.double() + 3 * a.double() @ b.double()
        assert torch.allclose(torch.addmm(row, a, b, beta=2, alpha=3).double(), exact, rtol=1e-4, atol=1e-3)
        assert torch.allclose(torch.addmm(c, a, b).double(), c.double() + a.double() @ b.double(), atol=1e-3)
        assert not asked
        for wrong in (random(255, 300), random(300, 300).bfloat16(), random(256)):
            with pytest.raises(RuntimeError):
                torch.mm(a, wrong)
        for b in (random(256, 512)[:, ::2], random(512, 256)[::2].t(), random(256, 1).expand(256, 256)):
            assert torch.allclose((a @ b).double(), a.double() @ b.double(), atol=1e-3)
            assert torch.allclose(torch.addmm(c[0, ::2].repeat(2), a, b).double(),
                                  c[0, ::2].repeat(2).double() + a.double() @ b.double(), atol=1e-3)  # fmt: skip
        assert torch.allclose(torch.addmm(random(512)[::2], a, c).double(),
                              random(512)[::2].double() + a.double() @ c.double(), atol=1e-3)  # fmt: skip
        assert torch.vmap(torch.mv)(random(4, 8, 8), random(4, 8)).shape == (4, 8)
    assert not asked


def test_torch_has_its_own_products_again_when_the_last_one_closes(asked):
    a = random(256, 256)
    with fast_products("cpu"):
        with fast_products("cpu"):
            a @ a
        a @ a
        assert len(asked) == 2
    with pytest.raises(KeyError), fast_products("cpu"):
        raise KeyError
    a @ a
    assert len(asked) == 2
    with fast_products("cpu"):
        a @ a
    assert len(asked) == 3


@pytest.mark.parametrize("said", ["vendor_id : GenuineIntel", "Features : asimd", ""])
def test_elsewhere_nothing_changes(said, asked, monkeypatch):
    monkeypatch.setattr(machine, "_cpu_flags", lambda: said)
    with fast_products("cpu"):
        random(256, 256) @ random(256, 256)
    assert not asked
