"""Measure the peak speed of this machine: operations of matrix products and bytes of memory, each per second."""

from __future__ import annotations

import torch

from openril.benchmarking.clock import Clock


class Limits:
    """Measure peaks on request, between the turns of the contenders."""

    def __init__(self, device: str, dtype: torch.dtype) -> None:
        self.clock = Clock(device)
        self.dtype = dtype
        big = device == "cuda"
        sizes = (2048, 4096, 8192) if big else (768, 1024, 2048)
        generator = torch.Generator(device).manual_seed(0)
        self.matrices = [torch.randn(n, n, device=device, dtype=dtype, generator=generator) for n in sizes]
        numbers = (1 << 28) // 4  # far beyond any cache
        self.source = torch.ones(numbers, device=device)
        self.other = torch.ones(numbers, device=device)
        self.target = torch.empty(numbers, device=device)

    def measure(self, repeats: int = 2) -> dict[str, float]:
        """Return ``matmul_flops`` (operations per second of the fastest square product), ``matmul_flops_per_cpu_second``
        (of processor time) and ``bandwidth`` (bytes per second, the faster of copy and triad)."""
        best = best_of_cpu = 0.0
        for matrix in self.matrices:
            n = matrix.shape[0]
            out = matrix @ matrix
            for _ in range(repeats):
                with self.clock.elapsed() as elapsed:
                    torch.matmul(matrix, matrix, out=out)
                best = max(best, 2 * n**3 / elapsed.seconds)
                best_of_cpu = max(best_of_cpu, 2 * n**3 / elapsed.cpu_seconds)
        moved = 0.0
        size = self.source.numel() * self.source.element_size()
        for _ in range(repeats):
            started = self.clock.now()
            self.target.copy_(self.source)
            moved = max(moved, 2 * size / (self.clock.now() - started))
            started = self.clock.now()
            torch.add(self.source, self.other, alpha=3.0, out=self.target)
            moved = max(moved, 3 * size / (self.clock.now() - started))
        return {"matmul_flops": best, "matmul_flops_per_cpu_second": best_of_cpu, "bandwidth": moved}
