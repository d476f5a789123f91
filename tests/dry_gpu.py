r"""Runs Python as on an H100, without a GPU: CUDA's calls are answered, and compute nothing.

  python tests/dry_gpu.py train.py config/mom_demo.py --device=cuda --compile=True
  python tests/dry_gpu.py bench.py train config/mom_large_k2h6s.py --micro_batch=8
  python tests/dry_gpu.py -m torch.distributed.run --nproc_per_node=2 \
    train.py config/mom_medium_k2h6s.py ...
  python tests/dry_gpu.py -m pytest tests/test_gpu.py -k 'not compiles'
  DRY_GPUS=1 python tests/dry_gpu.py gpu.py --budget=15

Memory is handed out, up to the 79 GiB of an H100, of which there are 8, or as many as DRY_GPUS
says; copies between it and the CPU are made; kernels of torch, cuBLAS, NCCL and Triton are not run.
So it shows that every tensor is on the device, and of a type and shape, that the next call takes;
that torch.compile gets through to code for an H100; and how much memory torch's allocator hands
out, with torch's own attention, not cuDNN's (no card was compared). It shows no result and no time.
Losses are 0 or garbage, and what goes by values read from the device may break off, such as the
loop over modules (all but bfloat16) and XSUM's summaries; gpu.py reports such a command as failed
and goes on. A process that ends right after backward() may abort at its end (pytorch issue 190489).

Needs, in the environment that runs it, a CUDA build of torch (2.12.1 was tried), and gcc and nm.
"""
import glob
import os
import re
import subprocess
import sys
from importlib.util import find_spec

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
FOLDER = os.path.join(ROOT, 'out', 'dry_gpu')

# Calls that return more than "done" (0). What an H100 says of itself is from its data sheet.
ANSWERS = r'''
#include <driver_types.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#define GIB ((size_t)1 << 30)
static struct { void *p; size_t n; } lent[1 << 16];
static size_t held;

// Gives zeros, which take no memory of ours until something is copied there.
int cudaMalloc(void **p, size_t n) {
  int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
  *p = NULL;
  for (int i = 0; i < 1 << 16 && held + n <= 79 * GIB; i++)
    if (!lent[i].p) {
      *p = mmap(NULL, n, PROT_READ | PROT_WRITE, flags, -1, 0);
      if (*p == MAP_FAILED) break;
      lent[i].p = *p, lent[i].n = n, held += n;
      return 0;
    }
  return cudaErrorMemoryAllocation;
}
int cudaFree(void *p) {
  for (int i = 0; p && i < 1 << 16; i++)
    if (lent[i].p == p) munmap(p, lent[i].n), held -= lent[i].n, lent[i].p = NULL;
  return 0;
}
int cudaMemGetInfo(size_t *rest, size_t *all) { *all = 79 * GIB; *rest = *all - held; return 0; }
int cudaHostAlloc(void **p, size_t n, unsigned flags) { *p = calloc(1, n); return 0; }
int cudaFreeHost(void *p) { free(p); return 0; }
int cudaMemcpy(void *to, const void *from, size_t n, int kind) { memcpy(to, from, n); return 0; }
int cudaMemcpyAsync(void *to, const void *from, size_t n, int kind, void *stream) {
  // Large copies within the device are left out: they would take our memory.
  if (kind != cudaMemcpyDeviceToDevice || n < 1 << 20) memcpy(to, from, n);
  return 0;
}
int cudaPointerGetAttributes(struct cudaPointerAttributes *a, const void *p) {
  memset(a, 0, sizeof *a);
  return 0;
}

static __thread int current;
int cudaGetDeviceCount(int *n) { char *s = getenv("DRY_GPUS"); *n = s ? atoi(s) : 8; return 0; }
int cudaGetDevice(int *n) { *n = current; return 0; }
int cudaSetDevice(int n) { current = n; return 0; }
int cudaDriverGetVersion(int *n) { *n = 13000; return 0; }
int cudaRuntimeGetVersion(int *n) { *n = 13000; return 0; }
int cudaDeviceGetPCIBusId(char *s, int n, int device) { strncpy(s, "0000:01:00.0", n); return 0; }
int cudaGetDeviceProperties(struct cudaDeviceProp *p, int device) {
  memset(p, 0, sizeof *p);
  strcpy(p->name, "none (dry run of an H100)");
  p->major = 9, p->totalGlobalMem = 79 * GIB, p->l2CacheSize = 50 << 20;
  p->multiProcessorCount = 132, p->warpSize = 32;
  p->maxThreadsPerBlock = 1024, p->maxThreadsPerMultiProcessor = 2048;
  p->sharedMemPerBlock = 48 << 10, p->sharedMemPerBlockOptin = 227 << 10;
  p->sharedMemPerMultiprocessor = 228 << 10;
  p->regsPerBlock = p->regsPerMultiprocessor = 64 << 10;
  p->maxThreadsDim[0] = p->maxThreadsDim[1] = 1024, p->maxThreadsDim[2] = 64;
  p->maxGridSize[0] = 2147483647, p->maxGridSize[1] = p->maxGridSize[2] = 65535;
  return 0;
}
int cudaDeviceGetAttribute(int *n, int attribute, int device) {
  struct cudaDeviceProp p;
  cudaGetDeviceProperties(&p, device);
  *n = attribute == cudaDevAttrComputeCapabilityMajor ? p.major
     : attribute == cudaDevAttrComputeCapabilityMinor ? 0
     : attribute == cudaDevAttrMultiProcessorCount ? p.multiProcessorCount
     : attribute == cudaDevAttrWarpSize ? 32
     : attribute == cudaDevAttrMaxSharedMemoryPerBlockOptin ? (int)p.sharedMemPerBlockOptin
     : attribute == cudaDevAttrMaxSharedMemoryPerMultiprocessor ? (int)p.sharedMemPerMultiprocessor
     : attribute == cudaDevAttrMaxThreadsPerMultiProcessor ? p.maxThreadsPerMultiProcessor
     : attribute == cudaDevAttrMaxRegistersPerBlock ? p.regsPerBlock
     : attribute == cudaDevAttrMaxRegistersPerMultiprocessor ? p.regsPerMultiprocessor : 1024;
  return 0;
}
int cuDeviceGetAttribute(int *n, int attribute, int device) {
  return cudaDeviceGetAttribute(n, attribute, device);
}
int cudaFuncGetAttributes(struct cudaFuncAttributes *a, const void *f) {
  memset(a, 0, sizeof *a);
  a->maxThreadsPerBlock = 1024, a->numRegs = 32, a->ptxVersion = a->binaryVersion = 90;
  return 0;
}
int cuFuncGetAttribute(int *n, int attribute, void *f) {
  *n = attribute == 0 ? 1024 : attribute == 4 ? 32 : 0;  // threads in a block, registers
  return 0;
}
int cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *n) { *n = 1; return 0; }
int cuOccupancyMaxActiveBlocksPerMultiprocessor(int *n) { *n = 1; return 0; }
int cuOccupancyMaxActiveClusters(int *n) { *n = 1; return 0; }

int cudaStreamIsCapturing(void *stream, int *n) { *n = 0; return 0; }
int cudaStreamGetCaptureInfo(void *stream, int *n) { *n = 0; return 0; }
int cudaStreamGetPriority(void *stream, int *n) { *n = 0; return 0; }
int cudaDeviceGetStreamPriorityRange(int *least, int *most) { *least = 0; *most = -1; return 0; }
int cudaEventElapsedTime(float *ms) { *ms = 1; return 0; }
const char *cudaGetErrorName(int error) { return error ? "out of memory" : "no error"; }
const char *cudaGetErrorString(int error) { return cudaGetErrorName(error); }
static int done(void) { return 0; }
int __cudaLaunchKernel(void) { return 0; }  // CUDA 13's name for what <<< >>> becomes
int cudaGetDriverEntryPointByVersion(const char *name, void **f, unsigned v,
                                     unsigned long long flags, int *found) {
  *f = done;
  if (found) *found = 0;
  return 0;
}

int cuDeviceGetCount(int *n) { return cudaGetDeviceCount(n); }
int cuDeviceGet(int *device, int n) { *device = n; return 0; }
int cuDriverGetVersion(int *n) { *n = 13000; return 0; }
int cuDevicePrimaryCtxGetState(int device, unsigned *flags, int *active) {
  *flags = 0, *active = 1;
  return 0;
}
int cuPointerGetAttribute(void **to, int attribute, void *p) { *to = p; return 0; }
int cuGetErrorString(int error, const char **s) { *s = "error"; return 0; }

int cublasLtMatmulAlgoGetHeuristic(void *a, void *b, void *c, void *d, void *e, void *f, void *g,
                                   int wanted, void *results, int *n) {
  memset(results, 0, 96);  // one cublasLtMatmulHeuristicResult_t
  *n = 1;
  return 0;
}
int cublasGetMathMode(void *handle, int *n) { *n = 0; return 0; }
int cublasGetPointerMode_v2(void *handle, int *n) { *n = 0; return 0; }
size_t cublasLtGetVersion(void) { return 130000; }

// Among several processes each hears itself: sums are its own share, gathered parts all its own.
struct comm { int ranks, rank; };
struct id { char bytes[128]; };
static int bytes_of[] = {1, 1, 4, 4, 8, 8, 2, 4, 8, 2, 1, 1};  // of ncclDataType_t
int ncclCommInitRankConfig(struct comm **c, int ranks, struct id id, int rank, void *config) {
  *c = malloc(sizeof **c);
  (*c)->ranks = ranks, (*c)->rank = rank;
  return 0;
}
int ncclCommInitRank(struct comm **c, int ranks, struct id id, int rank) {
  return ncclCommInitRankConfig(c, ranks, id, rank, NULL);
}
int ncclCommCount(struct comm *c, int *n) { *n = c->ranks; return 0; }
int ncclCommUserRank(struct comm *c, int *n) { *n = c->rank; return 0; }
int ncclCommGetAsyncError(struct comm *c, int *error) { *error = 0; return 0; }
int ncclGetVersion(int *n) { *n = 22800; return 0; }
const char *ncclGetErrorString(int error) { return "error"; }
const char *ncclGetLastError(struct comm *c) { return "error"; }
int ncclAllReduce(const void *from, void *to, size_t n, int type) {
  memmove(to, from, n * bytes_of[type]);
  return 0;
}
int ncclBroadcast(const void *from, void *to, size_t n, int type) {
  memmove(to, from, n * bytes_of[type]);
  return 0;
}
int ncclAllGather(const void *from, void *to, size_t n, int type, struct comm *c, void *stream) {
  size_t bytes = n * bytes_of[type];
  for (int i = 0; i < c->ranks; i++) memmove((char *)to + i * bytes, from, bytes);
  return 0;
}
size_t cudnnGetVersion(void) { return 0; }  // too old for attention: torch takes its own kernels
'''
HANDLES = ('cudaEventCreate cudaEventCreateWithFlags cudaStreamCreate cudaStreamCreateWithPriority '
           'cublasCreate_v2 cublasLtMatmulDescCreate cublasLtMatmulPreferenceCreate '
           'cublasLtMatrixLayoutCreate cuCtxGetCurrent cuDevicePrimaryCtxRetain cuModuleLoad '
           'cuModuleLoadData cuModuleLoadDataEx cuModuleGetFunction').split()


def build(torch_folder, headers):
    """FOLDER/libcuda.so.1: those calls of the driver, the runtime, cuBLAS and NCCL that torch and
    Triton may make."""
    called = set()
    for library in ('libc10_cuda.so', 'libtorch_cuda.so', 'libtorch_python.so'):
        command = ['nm', '-D', '--undefined-only', os.path.join(torch_folder, 'lib', library)]
        symbols = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        called |= set(re.findall(r' U (cuda[A-Z]\w+|cublas[A-Z]\w+|nccl[A-Z]\w+)', symbols))
    with open(os.path.join(headers, 'cuda.h'), encoding='utf-8', errors='replace') as f:
        called |= set(re.findall(r'\bcu[A-Z]\w+', f.read()))
    called -= set(re.findall(r'\b((?:cu|nccl)[a-zA-Z]\w+)\(', ANSWERS))
    code = [ANSWERS, *(f'int {f}(void **to) {{ *to = malloc(64); return 0; }}' for f in HANDLES),
            *(f'int {f}() {{ return 0; }}' for f in sorted(called - set(HANDLES)))]
    os.makedirs(FOLDER, exist_ok=True)
    source, library = (os.path.join(FOLDER, name) for name in ('cuda.c', 'libcuda.so.1'))
    with open(source, 'w') as f:
        f.write('\n'.join(code))
    subprocess.run(['gcc', '-shared', '-fPIC', '-w', '-I', headers, '-Wl,-soname,libcuda.so.1',
                    '-o', library, source], check=True)


if len(sys.argv) < 2:
    sys.exit(__doc__)
torch_folder = find_spec('torch').submodule_search_locations[0]
headers = os.path.join(os.path.dirname(torch_folder), 'triton', 'backends', 'nvidia', 'include')
has_cuda = glob.glob(os.path.join(torch_folder, 'lib', 'libtorch_cuda.so'))
if not has_cuda or not os.path.isdir(headers):
    sys.exit(f'{torch_folder} is no CUDA build of torch: make an environment with one '
             '(pip install torch==2.12.1)')
build(torch_folder, headers)
os.execve(sys.executable, [sys.executable, *sys.argv[1:]], {
    **os.environ, 'LD_PRELOAD': os.path.join(FOLDER, 'libcuda.so.1'), 'LD_LIBRARY_PATH': FOLDER})
