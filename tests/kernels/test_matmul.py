from __future__ import annotations

import threading

import pytest
import torch

from lissom.kernels import matmul as m


@pytest.mark.parametrize("dtype,tolerance", [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_products_are_exact(dtype, tolerance):
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(shape, generator=generator, dtype=dtype) for shape in ((3, 300, 64), (3, 64, 200)))
    wanted = a.double() @ b.double()
    torch.testing.assert_close(m.matmul(a, b).double(), wanted, atol=tolerance * 10, rtol=tolerance)


def test_the_setting_of_pytorch_outlives_several_threads():
    before = torch.backends.mkldnn.matmul.fp32_precision
    matrix = torch.rand(2, 64, 64)
    threads = [threading.Thread(target=lambda: [m.matmul(matrix, matrix) for _ in range(500)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert torch.backends.mkldnn.matmul.fp32_precision == before


def test_the_setting_of_pytorch_is_left_as_it_was():
    before = torch.backends.mkldnn.matmul.fp32_precision
    m.matmul(torch.ones(1, 8, 8), torch.ones(1, 8, 8))
    with pytest.raises(RuntimeError):
        m.matmul(torch.ones(1, 8, 8), torch.ones(1, 9, 8))
    assert torch.backends.mkldnn.matmul.fp32_precision == before
