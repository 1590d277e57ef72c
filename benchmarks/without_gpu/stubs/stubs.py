"""python stubs.py TORCH_LIB HEADERS OUT: builds into OUT the CUDA libraries that the shared objects in TORCH_LIB ask for.

cudart.c and driver.c say what the runtime and the driver do. Whatever else is undefined in TORCH_LIB becomes a function that
returns 0, in the library it is expected in, under the symbol version it is expected under (without versions ld.so complains).
"""

import re
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
LIBRARIES = {  # soname: the names in it
    "libcudart.so.13": "(__)?cuda[A-Z]",
    "libcuda.so.1": "cu[A-Z]",
    "libcublas.so.13": "cublas(?!Lt)",
    "libcublasLt.so.13": "cublasLt",
    "libcudnn.so.9": "cudnn",
    "libcufft.so.12": "cufft",
    "libcufile.so.0": "cuFile",
    "libcupti.so.13": "cupti",
    "libcurand.so.10": "curand",
    "libcusolver.so.12": "cusolver",
    "libcusparse.so.12": "cusparse(?!Lt)",
    "libcusparseLt.so.0": "cusparseLt",
    "libnccl.so.2": "nccl",
    "libnvrtc.so.13": "nvrtc",
    "libnvshmem_host.so.3": "nvshmem|NVSHMEM",
}
SOURCES = {"libcudart.so.13": "cudart.c", "libcuda.so.1": "driver.c"}
# Of Triton's, found by dlsym: not in TORCH_LIB.
ALSO = {
    "libcuda.so.1": ("cuCtxSetCurrent", "cuCtxSetLimit", "cuFuncSetAttribute", "cuFuncSetCacheConfig", "cuTensorMapEncodeTiled")
}
BODIES = {  # functions whose answer matters
    "cublasCreate_v2": "int {}(void **h) {{ *h = (void *)0xb1; return 0; }}",
    "cublasLtCreate": "int {}(void **h) {{ *h = (void *)0xb2; return 0; }}",
    "cublasGetVersion_v2": "int {}(void *h, int *v) {{ *v = 130000; return 0; }}",
    "cublasLtGetVersion": "size_t {}(void) {{ return 130000; }}",
    "cublasGetMathMode": "int {}(void *h, int *v) {{ *v = 0; return 0; }}",
    "cublasGetPointerMode_v2": "int {}(void *h, int *v) {{ *v = 0; return 0; }}",
    "cublasLtMatmulAlgoGetHeuristic": "int {}(void *h, void *d, void *a, void *b, void *c, void *e, void *p, int n, void *r, "
    "int *found) {{ *found = 1; return 0; }}",
    "cublasSetStream_v2": "int {}(void *h, void *s) {{ stream = s; return 0; }}",
    "cublasLtMatmul": "int {}(void *h, void *o, void *x, void *a, void *p, void *b, void *q, void *y, void *c, void *r, void *d, "
    "void *t, void *algo, void *work, size_t n, void *s) {{ stream = s; return product(); }}",
    "cudnnSetStream": "int {}(void *h, void *s) {{ stream = s; return 0; }}",
    "cudnnGetStream": "int {}(void *h, void **s) {{ *s = stream; return 0; }}",
    # One engine is found for every graph of operations; numbers are 0. Types: 15 a descriptor, 2 and 22 of one byte, 3, 5 and 6 of
    # eight.
    "cudnnBackendCreateDescriptor": "int {}(int type, void **d) {{ *d = malloc(8); return 0; }}",
    "cudnnBackendDestroyDescriptor": "int {}(void *d) {{ free(d); return 0; }}",
    "cudnnBackendGetAttribute": "int {}(void *d, int name, int type, long room, long *n, void *out) {{ if (n) *n = 1; "
    "if (out && room > 0 && type != 15) memset(out, 0, type == 2 || type == 22 ? 1 : type == 3 || type == 5 || type == 6 ? 8 : 4); "
    "return 0; }}",
    "cudnnBackendExecute": "int {}() {{ return product(); }}",
    "cudnnCreate": "int {}(void **h) {{ *h = (void *)0xb3; return 0; }}",
    "cudnnGetVersion": "size_t {}(void) {{ return 91900; }}",
    "cudnnGetCudartVersion": "size_t {}(void) {{ return 13000; }}",
    "cudnnGetProperty": "int {}(int which, int *v) {{ *v = which == 0 ? 9 : which == 1 ? 19 : 0; return 0; }}",
    "cudnnGetErrorString": 'const char *{}(int status) {{ return "error of the stub cuDNN"; }}',
    "cusolverDnCreate": "int {}(void **h) {{ *h = (void *)0xb4; return 0; }}",
    "cusparseCreate": "int {}(void **h) {{ *h = (void *)0xb5; return 0; }}",
    "ncclGetVersion": "int {}(int *v) {{ *v = 22809; return 0; }}",
    "ncclGetErrorString": 'const char *{}(int status) {{ return "error of the stub NCCL"; }}',
    "nvrtcVersion": "int {}(int *major, int *minor) {{ *major = 13; *minor = 0; return 0; }}",
}
PRODUCT = re.compile("cublas([SDCZH]gemm|Gemm|[SD]gemv)")  # one launch, on the stream that the handle was given last
PRELUDE = """#include <stdlib.h>
#include <string.h>
#include "state.h"
static void *stream;
static int product(void) { if (!gpustub_node(stream)) COUNT(LAUNCHES); return 0; }"""


def undefined(folder: Path) -> dict[str, str]:
    """{symbol: the version it is expected under, or ""} of all shared objects in a folder."""
    found = {}
    for path in sorted(folder.glob("*.so*")):
        for line in subprocess.check_output(["nm", "-D", "--undefined-only", path], text=True).splitlines():
            name, _, version = line.split()[-1].partition("@")
            found[name] = version.lstrip("@")
    return found


def gcc(*arguments: object) -> None:
    subprocess.run(["gcc", "-O2", "-fPIC", "-w", *map(str, arguments)], check=True)


def main(torch_lib: Path, headers: Path, out: Path) -> None:
    made = out / "generated"
    made.mkdir(parents=True, exist_ok=True)
    gcc("-shared", "-o", out / "libgpustub.so", HERE / "state.c", "-Wl,-soname,libgpustub.so", "-lpthread")
    wanted = undefined(torch_lib)
    for soname, pattern in LIBRARIES.items():
        names = {name: version for name, version in wanted.items() if re.match(pattern, name)}
        inputs, defined = [], set()
        if soname in SOURCES:
            compiled = made / (soname + ".o")
            gcc("-c", "-I", headers, "-I", HERE, HERE / SOURCES[soname], "-o", compiled)
            defined = {
                line.split()[-1] for line in subprocess.check_output(["nm", "--defined-only", compiled], text=True).splitlines()
            }
            inputs.append(compiled)
        lines = [PRELUDE]
        for name in sorted((names.keys() | set(ALSO.get(soname, ()))) - defined):
            plain = "int {}() {{ return product(); }}" if PRODUCT.match(name) else "int {}() {{ return 0; }}"
            lines.append(BODIES.get(name, plain).format(name))
        source = made / (soname + ".c")
        source.write_text("\n".join(lines) + "\n")
        versions = sorted(set(names.values()) - {""})
        if versions:
            script = made / (soname + ".map")
            script.write_text("".join(f"{version} {{ global: *; }};\n" for version in versions[:1]))
            inputs.append(f"-Wl,--version-script={script}")
        gcc("-shared", "-I", HERE, "-o", out / soname, source, *inputs, f"-Wl,-soname,{soname}", "-L", out, "-lgpustub", "-ldl")
        print(f"{soname:22} {len(names):4} symbols, {len(versions)} version(s), {len(lines) - 1:4} answered with 0 or a constant")
    link = out / "libcuda.so"
    link.unlink(missing_ok=True)
    link.symlink_to("libcuda.so.1")


if __name__ == "__main__":
    if len(sys.argv) != 4:
        sys.exit(__doc__)
    main(*map(Path, sys.argv[1:]))
