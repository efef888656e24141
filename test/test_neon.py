"""The kernels in C as ARM processors run them: made for NEON by the same clang and run by QEMU, against the same kernels made for this processor,
whose numbers the tests of each hold against float64."""
import platform, shutil, subprocess, sys
import numpy as np, pytest
from tinygrad import Tensor, dtypes
from tinydet.nn import (conv_cpu, depthwise_cpu, kernel_cpu, norm_cpu, pointwise_cpu, strided_gradient_cpu, update_cpu, weight_gradient_cpu,
                        winograd_cpu, winograd_gradient_cpu)
from tinydet.nn.conv import conv2d
from tinydet.training import optim
from test_conv import CASES, DEPTHWISE, PIECES, POINTWISE, WINOGRAD

QEMU = shutil.which("qemu-aarch64-static") or shutil.which("qemu-aarch64")
pytestmark = [pytest.mark.skipif(QEMU is None, reason="needs qemu-aarch64 (Debian's qemu-user-static)"),
              pytest.mark.skipif(platform.machine().lower() not in ("x86_64", "amd64"), reason="compares with an x86 processor's kernels")]
MODULES = (conv_cpu, depthwise_cpu, norm_cpu, pointwise_cpu, strided_gradient_cpu, update_cpu, weight_gradient_cpu, winograd_cpu,
           winograd_gradient_cpu)


@pytest.fixture
def kernels(monkeypatch):
  """What is traced in the test: (name, source, parts, what it writes, what it reads); of the latter dtype, numbers, and whether it has values before,
  None for memory to work in."""
  found = []
  def record(name, code, size, products, tensors, sizes, scratch=0, others=list, *, make=kernel_cpu.c_kernel):
    cores = kernel_cpu.parts_of(products)
    outs = (size,) if isinstance(size, int) else size
    written = [(t.dtype, t.numel(), True) if isinstance(t, Tensor) else (dtypes.float32, t, False) for t in outs]
    if scratch: written.append((dtypes.float32, cores * scratch, None))
    found.append((name, kernel_cpu.spelled(name, code, cores, sizes), cores, written, [(t.dtype, t.numel(), True) for t in tensors]))
    return make(name, code, size, products, tensors, sizes, scratch, others)
  for module in MODULES: monkeypatch.setattr(module, "c_kernel", record)
  monkeypatch.setattr(kernel_cpu, "_traced", {})
  return found


def run(folder, kernel, target: str, values: list[np.ndarray]) -> list[np.ndarray]:
  """What a kernel made for `target` leaves in what it writes."""
  name, source, cores, written, read = kernel
  buffers = [*written, *read]
  (folder / "kernel.c").write_text(source)
  arguments = ", ".join(f"b{i}" for i in range(len(buffers)))
  lines = [f"  char *b{i} = aligned_alloc(64, {-(-count * dtype.itemsize // 64) * 64 + 64}); fread(b{i}, 1, {count * dtype.itemsize}, file);"
           for i, (dtype, count, _) in enumerate(buffers)]
  lines += [f"  for (int core = 0; core < {cores}; core++) {name}({arguments}, core);"]
  lines += [f"  fwrite(b{i}, 1, {count * dtype.itemsize}, stdout);" for i, (dtype, count, before) in enumerate(written) if before is not None]
  (folder / "main.c").write_text("\n".join([
    "#include <stdio.h>", "#include <stdlib.h>", f"void {name}({', '.join(['char *'] * len(buffers))}, int);",
    "int main(int count, char **words) {", '  FILE *file = fopen(words[1], "rb");', *lines, "  return 0;", "}"]))
  (folder / "values").write_bytes(b"".join(v.tobytes() for v in values))
  command = [sys.executable, "-m", "ziglang", "cc", "-target", f"{target}-linux-musl", "-static", "-O2", "-fno-math-errno", "-o", folder / target]
  subprocess.run([*command, folder / "kernel.c", folder / "main.c"], check=True, capture_output=True)
  program = [folder / target, folder / "values"]
  out, results, at = subprocess.run([QEMU, *program] if target == "aarch64" else program, check=True, capture_output=True).stdout, [], 0
  for dtype, count, before in written:
    if before is None: continue
    results.append(np.frombuffer(out, np.float32 if dtype == dtypes.float32 else np.int64, count, at))
    at += count * dtype.itemsize
  assert at == len(out)
  return results


def check(folder, kernels, among=(-1.5, 1.5)) -> None:
  assert kernels
  for kernel in {kernel[1]: kernel for kernel in kernels}.values():
    rng = np.random.default_rng(list(kernel[0].encode()))
    values = [rng.uniform(*among, count).astype(np.float32) if dtype == dtypes.float32 else rng.integers(1, 9, count) for dtype, count, _ in
              [*kernel[3], *kernel[4]]]
    for ours, theirs in zip(run(folder, kernel, "aarch64", values), run(folder, kernel, "x86_64", values), strict=True):
      np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=3e-5 * max(1, abs(theirs).max()), err_msg=kernel[0])
      assert np.isfinite(theirs).all() and theirs.any()


@pytest.mark.parametrize("case", [CASES[0], CASES[4], CASES[5], CASES[11], *WINOGRAD[::3], PIECES[1], POINTWISE, *DEPTHWISE[:4:2]], ids=str)
def test_convolutions(case, kernels, tmp_path):
  batch, cin, cout, height, width, k, stride, padding, groups = case
  tensors = [Tensor.empty(*shape).realize() for shape in ((batch, cin, height, width), (cout, cin // groups, k, k), (cout,))]
  conv2d(*tensors, stride, padding, groups, silu=True).sum().gradient(*tensors)
  assert any("gradient" in kernel[0] for kernel in kernels)
  check(tmp_path, kernels)


@pytest.mark.parametrize("activation", ["", "silu"])
def test_norms(activation, kernels, tmp_path):
  tensors = [Tensor.empty(*shape).realize() for shape in ((3, 5, 7, 19), (5,), (5,))]
  norm_cpu.batch_norm(*tensors, 1e-3, activation)[0].sum().gradient(*tensors)
  assert len(kernels) == 2
  check(tmp_path, kernels, (0.5, 1.5))   # variances among them


@pytest.mark.parametrize("kind", optim.OPTIMIZERS)
def test_updates(kind, kernels, tmp_path):
  params = {name: Tensor.empty(size).realize() for name, size in (("a", 37), ("b.bias", 5))}
  optimizer = optim.Optimizer(params, kind, optim.schedule("constant", 0.1, 9), weight_decay=0.1, clip_norm=1.0, ema_decay=0.9)
  optimizer.update([Tensor.empty(size).realize() for size in (37, 5)])
  check(tmp_path, kernels, (0.5, 1.5))
