"""Compiles every GPU kernel of `pallas_kernels` for H100 and H200 (sm_90), without a GPU.

    bash scripts/check_gpu_compile.sh [words of the names of calls]

That proves that Triton and ptxas take the kernels at the shapes of Scout and Maverick, and that shared memory fits. It
proves no number and no second. Printed for each kernel: shared memory, registers and spilled bytes of a thread, the
FLOPs of its products in T and the bytes that its programs load and store in G, each with its ratio to the least that
would do (what a program loads again comes from the L2 cache as a rule). A call that does not compile gives its reason,
and exit code 1.
"""

import glob
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
import numpy as np
from jax.experimental import topologies

from tests.pallas_kernels.gpu_calls import CALLS

DUMPS = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
# From NVIDIA's H100 data sheet and the CUDA programming guide, compute capability 9.0.
H100 = """
platform_name: "CUDA"
device_description_str: "NVIDIA H100 80GB HBM3"
dnn_version_info { major: 9 minor: 10 }
gpu_device_info {
  name: "NVIDIA H100 80GB HBM3"
  device_vendor: "NVIDIA Corporation"
  cuda_compute_capability { major: 9 feature_extension: ACCELERATED_FEATURES }
  runtime_version: "13.0.0" driver_version: "13.0.0" compile_time_toolkit_version: "13.0.0"
  core_count: 132 fpus_per_core: 128 clock_rate_ghz: 1.98
  threads_per_warp: 32 threads_per_block_limit: 1024 threads_per_core_limit: 2048
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  shared_memory_per_core: 233472 shared_memory_per_block: 49152 shared_memory_per_block_optin: 232448
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
  memory_bandwidth: 3352320000000 device_memory_size: 84942979072 l2_cache_size: 52428800
  device_address_bits: 64
}
"""


def one_gpu() -> jax.sharding.Mesh:
    """Returns a mesh of an H100 that is not here."""
    topology = topologies.get_topology_desc(platform="cuda", topology_name="h100", topology="1x1x1", target_config=H100)
    return jax.sharding.Mesh(np.array(topology.devices[:1]), ("x",))


def compile_call(mesh, call) -> None:
    replicated = jax.sharding.NamedSharding(mesh, jax.P())
    arguments = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=replicated), call.arguments)
    shutil.rmtree(DUMPS.name, ignore_errors=True)
    jax.jit(call.function).lower(*arguments).compile()


def shared_bytes() -> dict[str, list[int]]:
    """Returns the shared memory of the kernels of the last program by name, in the order in which they run."""
    found = {}
    for path in glob.glob(f"{DUMPS.name}/*thunk_sequence.txt"):
        for name, size in re.findall(r"\] (\w+) grid: .* shared_memory: (\d+) bytes", Path(path).read_text()):
            found.setdefault(re.sub(r"__\d+$", "", name), []).append(int(size))
    return found


def registers() -> dict[str, str]:
    """Returns what ptxas says of the kernels of the last program: registers, and bytes spilled by a thread.

    From jax 0.11 on XLA writes no PTX of a kernel of its own accord, and nothing is found.
    """
    ptxas = next(iter(glob.glob(f"{sys.prefix}/lib/python3*/site-packages/nvidia/*/bin/ptxas")), None)
    found = {}
    for path in glob.glob(f"{DUMPS.name}/*.ptx") if ptxas else ():
        if ".version" not in Path(path).read_text():
            continue
        command = [ptxas, "-v", "-arch=sm_90a", path, "-o", os.devnull]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stderr
        pattern = r"Compiling entry function '(\w+)'.*?(\d+) bytes spill stores.*?Used (\d+) registers"
        for name, spilled, used in re.findall(pattern, report, re.DOTALL):
            found[name] = f"{used:>4} {spilled:>5}"
    return found


def main() -> int:
    os.environ["XLA_FLAGS"] = f"--xla_dump_to={DUMPS.name}"  # read when the first program is compiled
    mesh, failed = one_gpu(), []
    chosen = {name: make for name, make in CALLS.items() if all(word in name for word in sys.argv[1:])}
    print(f"jax {jax.__version__}, {mesh.devices[0].device_kind}, {len(chosen)} calls")
    print(f"{'':46}shared KB  regs spill   TFLOP (x)       GB (x)")
    # Kernels ask the mesh that is set what they are compiled for.
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        for name, make in chosen.items():
            start, call = time.perf_counter(), make()
            try:
                compile_call(mesh, call)
            except Exception as error:  # whatever one call does, the others are compiled and the failure is named
                print(f"{name}: FAILED: {type(error).__name__}: {error}", flush=True)
                failed.append(name)
                continue
            print(f"{name} ({time.perf_counter() - start:.1f} s)", flush=True)
            shared, used, seen = shared_bytes(), registers(), {}
            for work in call.works():
                nth = seen[work.kernel] = seen.get(work.kernel, -1) + 1
                one = used.get(work.kernel, "   ?     ?")  # two equal kernels are one
                own = used.get(f"{work.kernel}__{nth}", one)
                print(
                    f"    {work.kernel:42}{shared[work.kernel][nth] / 1024:9.1f} {own}"
                    f" {work.flops / 1e12:8.3f} {work.flops / work.least_flops:5.2f}"
                    f" {work.loads / 1e9:8.3f} {work.loads / work.least_bytes:5.2f}",
                    flush=True,
                )
    print(f"{len(chosen) - len(failed)} calls compiled, {len(failed)} failed: {', '.join(failed) or 'none'}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
